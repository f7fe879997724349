"""Small random models on disk, one per architectural feature that the engine must carry, with adapters that often agree with them.

Knows transformers' config classes and the adapter format; knows nothing of the engine. Weights are large enough for the
greedy text to wander, and later layers change the residual stream little enough for early exits to be right about half
of the time, so that every verdict (accepted, rejected, corrected) occurs in a few dozen tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from cats.adapter import AdapterModel

VOCAB = 48
CONTEXT = 96
LAYERS = 6
DRAFT_EXIT = 1
SHALLOW_EXIT = 3
EOS = 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
YARN: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(SIZES | changes))


def _rope(**parameters: Any) -> LlamaConfig:
    return _llama(rope_parameters={"rope_theta": 10000.0, **parameters})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama-grouped": lambda: _llama(num_key_value_heads=2),
    "llama-one-key-head": lambda: _llama(num_key_value_heads=1),
    "llama-head-width": lambda: _llama(head_dim=12, num_key_value_heads=2),
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-rope-linear": lambda: _rope(rope_type="linear", factor=2.0),
    "llama-rope-dynamic": lambda: _rope(rope_type="dynamic", factor=2.0),
    "llama-rope-yarn": lambda: _llama(rope_parameters=YARN),
    "llama-rope-llama3": lambda: _rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
    ),
    "qwen3": lambda: Qwen3Config(**(SIZES | {"num_key_value_heads": 2, "head_dim": 12})),
    "qwen3-tied-yarn": lambda: Qwen3Config(**(SIZES | {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN})),
    "qwen2": lambda: Qwen2Config(**(SIZES | {"num_key_value_heads": 2})),
    "qwen2-tied": lambda: Qwen2Config(**(SIZES | {"tie_word_embeddings": True})),
    "mistral": lambda: MistralConfig(**(SIZES | {"num_key_value_heads": 2, "sliding_window": None})),
}


@dataclass(frozen=True)
class TinyModel:
    """Where a random model and its two adapters lie."""

    base: Path
    draft: Path
    shallow: Path

    @property
    def adapters(self) -> dict[str, tuple[Path, int | None]]:
        return {"draft": (self.draft, DRAFT_EXIT), "shallow": (self.shallow, SHALLOW_EXIT)}


def build(directory: Path, config: PreTrainedConfig, seed: int = 0) -> TinyModel:
    """Write a random model of this config and adapters for exits 1 and 3 under `directory`."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, generator)
    model.save_pretrained(directory / "base")
    tiny = TinyModel(directory / "base", directory / "draft", directory / "shallow")
    for path, exit_layer in ((tiny.draft, DRAFT_EXIT), (tiny.shallow, SHALLOW_EXIT)):
        adapter = AdapterModel(AdapterModel.config_for(model.config), exit_layer)
        _randomise(adapter, generator)
        adapter.norm.weight.data.copy_(model.get_decoder().norm.weight)
        adapter.save_pretrained(path)
    return tiny


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` ids that hold no EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(EOS + 1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def reload(tiny: TinyModel, dtype: torch.dtype) -> PreTrainedModel:
    """The base as plain transformers loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=dtype)
    return model.eval()


@torch.no_grad()
def _randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.copy_(_gain(name) * noise)
        elif "embed_tokens" in name or "lm_head" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(0.3 * noise)


def _gain(name: str) -> float:
    """Size of what a layer adds to the residual stream: the layers beyond each exit add less than those before it."""
    layer = int(name.split("layers.")[1].split(".")[0])
    return 0.2 if layer < DRAFT_EXIT else 0.08 if layer < SHALLOW_EXIT else 0.04
