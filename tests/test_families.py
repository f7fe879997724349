"""The table of families against transformers' own layers, and what no row of it covers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

import cats
from cats.adapter import AdapterModel
from cats.earlyexit import EarlyExitLlamaForCausalLM, read_config
from cats.families import ATTENTION, FAMILIES, check_layers, usable_context
from cats.linear import Linear
from cats.loading import checkpoint_of, sizes_of_checkpoint
from tests import tiny_models
from tests.tiny_models import CONTEXT, LAYERS, SIZES, TinyModel
from training.adapter_start import starting_adapters

Tiny = Callable[[str], TinyModel]
NORMS = ("input_layernorm", "post_attention_layernorm")
WITH_BIASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-biases": lambda: Qwen3Config(**(SIZES | {"head_dim": 12, "attention_bias": True})),
    "llama-attention-biases": lambda: LlamaConfig(**(SIZES | {"attention_bias": True})),
}
CONFIGS = tiny_models.FAMILIES | WITH_BIASES


def test_every_family_has_a_tiny_model() -> None:
    assert {make().model_type for make in tiny_models.FAMILIES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_names_every_tensor_of_a_layer(name: str) -> None:
    config = CONFIGS[name]()
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    family = FAMILIES[config.model_type]
    weights = (*family.matrices, *family.head_norms, *NORMS)
    assert set(layer.state_dict()) == {f"{part}.weight" for part in weights} | {f"{part}.bias" for part in family.biased(config.to_dict())}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_matrices_are_used_in_the_order_of_the_row(tiny: Tiny, name: str) -> None:
    """The stream brings them in this order, so another one would stop it."""
    base, used = EarlyExitLlamaForCausalLM.from_pretrained(tiny(name).base), []
    for part, module in base.layers[0].named_modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda *_, part=part: used.append(part))
    base.hidden_states(torch.tensor([[3, 4]]), [1])
    assert tuple(used) == FAMILIES[name].matrices


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_sizes_of_a_checkpoint_are_those_of_its_layers(tiny: Tiny, name: str) -> None:
    """What the plan counts, against the parameters of transformers' own model."""
    base = tiny(name).base
    config = read_config(base)
    checkpoint = checkpoint_of(base, ("float32", "float32"), torch.device("cpu"))
    found = sizes_of_checkpoint(checkpoint, [AdapterModel(AdapterModel.config_for(config), 1)])
    layers = tiny_models.reload(tiny(name), torch.float32).get_decoder().layers
    parts = [dict(layer.named_parameters()) for layer in layers]
    matrices = {(index, part): weight.nbytes for index, own in enumerate(parts) for part, weight in own.items() if weight.dim() == 2}
    assert {(piece.layer, f"{piece.matrix}.weight"): piece.nbytes for piece in found.pieces} == matrices
    assert found.other_layer_bytes == sum(weight.nbytes for weight in parts[0].values() if weight.dim() == 1)
    assert found.kv_width * config.hidden_size * 4 == matrices[0, "self_attn.k_proj.weight"]


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (MistralConfig(**(SIZES | {"sliding_window": None})), CONTEXT),
        (MistralConfig(**(SIZES | {"sliding_window": 4096})), CONTEXT),
        (Qwen2Config(**(SIZES | {"sliding_window": 24})), CONTEXT),
        (Qwen2Config(**(SIZES | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": LAYERS})), CONTEXT),
        (Qwen3Config(**(SIZES | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": LAYERS - 1})), 24),
        (LlamaConfig(**(SIZES | {"sliding_window": 24})), CONTEXT),
    ],
    ids=["mistral without", "mistral beyond", "qwen2 off", "qwen2 no layer slides", "qwen3 the last layer slides", "llama ignores it"],
)
def test_a_window_counts_where_a_layer_slides(config: PreTrainedConfig, context: int) -> None:
    assert usable_context(config) == context


def rewritten(tiny: TinyModel, directory: Path, **fields: Any) -> Path:
    """The checkpoint again with other fields in its configuration."""
    (directory / "model.safetensors").write_bytes((tiny.base / "model.safetensors").read_bytes())
    config = json.loads((tiny.base / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))
    return directory


SIX_ON, SIX_OFF = ["sliding_attention"] * LAYERS, ["full_attention"] * LAYERS
LONGROPE: dict[str, Any] = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    "original_max_position_embeddings": 24,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("llama", {"model_type": "gemma2"}, "type 'gemma2'; supported are llama, mistral, qwen2, qwen3"),
    "no family": ("llama", {"model_type": None}, "type None; supported are"),
    "longrope": ("llama", {"rope_parameters": LONGROPE}, "depends on the length of the text"),
    "a rope of other families": ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional' is not"),
    "a rope that lacks a field": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "cannot read .*low_freq"),
    "weights of another kind": ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'; supported are plain"),
    "windows without a size": ("qwen3", {"layer_types": SIX_ON}, "no window for them; set use_sliding_window"),
}


@pytest.mark.parametrize("memory", [None, cats.MemoryOptions(pinning=False)], ids=["resident", "streamed"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_row_covers_is_refused_in_a_sentence(tiny: Tiny, tmp_path: Path, case: str, memory: cats.MemoryOptions | None) -> None:
    family, fields, sentence = REFUSED[case]
    with pytest.raises(cats.CatsError, match=sentence):
        cats.load(rewritten(tiny(family), tmp_path, **fields), memory=memory)


@pytest.mark.parametrize(
    ("types", "sentence"), [(["chunked_attention", *SIX_OFF[1:]], "type 'chunked_attention'"), (SIX_OFF[1:], "types of 5 layers and has 6")]
)
def test_layers_of_another_kind_are_refused(types: list[str], sentence: str) -> None:
    config = CONFIGS["qwen3"]()
    config.layer_types = types
    with pytest.raises(cats.CatsError, match=sentence):
        check_layers(config, "the checkpoint")


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_an_adapter_takes_heads_and_rope_from_its_base(name: str) -> None:
    base = tiny_models.FAMILIES[name]()
    adapter = AdapterModel.config_for(base)
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    assert (adapter.head_dim, adapter.num_key_value_heads, adapter.rms_norm_eps) == (head_dim, base.num_key_value_heads, base.rms_norm_eps)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(base)
    positions = torch.arange(CONTEXT)
    rotary = type(theirs.model.rotary_emb)(config=base)(torch.empty(0), position_ids=positions[None])
    for ours, expected in zip(AdapterModel(adapter, 1).rope.rows(positions, torch.float32), rotary, strict=True):
        torch.testing.assert_close(ours, expected, atol=0, rtol=0)


def test_a_width_that_is_no_multiple_of_the_heads_is_refused() -> None:
    with pytest.raises(cats.CatsError, match="32 wide and has 5 heads"):
        AdapterModel.config_for(Qwen3Config(**(SIZES | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8})))


@pytest.mark.parametrize(
    ("name", "block", "parts"),
    [
        ("qwen2", "attention", r"q_proj\.bias, self_attn\.k_proj\.bias, self_attn\.v_proj\.bias, which"),
        ("qwen3", "decoder", r"self_attn\.q_norm\.weight, self_attn\.k_norm\.weight, which"),
        ("llama-biases", "attention", r"self_attn\.o_proj\.bias, which"),
        ("llama-biases", "decoder", r"self_attn\.o_proj\.bias, mlp.*down_proj\.bias, which"),
    ],
)
def test_a_layer_with_more_parts_than_the_adapters_is_no_start(tiny: Tiny, name: str, block: str, parts: str) -> None:
    with pytest.raises(cats.CatsError, match=f"{parts}.*--init fitted or --init fresh"):
        starting_adapters(tiny(name).base, [1], "base", [], 0, None, block)
    assert starting_adapters(tiny(name).base, [1], "fresh", [], 0, None, block)[1].exit_layer == 1


@pytest.mark.parametrize("name", ["llama-grouped", "llama-rope-llama3", "mistral"])
def test_attention_with_the_adapters_parts_is_the_start(tiny: Tiny, name: str) -> None:
    adapter = starting_adapters(tiny(name).base, [1], "base", [], 0, None)[1]
    base = EarlyExitLlamaForCausalLM.from_pretrained(tiny(name).base)
    for matrix in ATTENTION:
        assert torch.equal(adapter.get_parameter(f"layers.0.{matrix}.weight"), base.get_parameter(f"layers.1.{matrix}.weight"))
