"""A Llama in llama.cpp's GGUF format as an ordinary Hugging Face directory: config, bfloat16 safetensors, tokenizer, chat template.

Quantised matrices are dequantised by the `gguf` library and rounded once, to bfloat16. Rows of the q and k projections
come back in Hugging Face's order (llama.cpp stores the two halves of each rotary pair next to each other).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from cats.errors import CatsError

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: never split, and left out of decoded text
DIGIT_SPLITTERS = ("smollm",)
"""Pre-tokenisers, by llama.cpp's name, that this module rebuilds: every digit a token of its own, then GPT-2's byte level."""


@dataclass(frozen=True)
class GgufLlama:
    """An open GGUF file: `fields` (key -> value), and the reader that yields its tensors."""

    path: Path
    fields: dict[str, Any]
    reader: Any

    def field(self, key: str) -> Any:
        """A field that must be there."""
        if key not in self.fields:
            raise CatsError(f"{self.path} has no field {key}; it is not a GGUF file of a Llama with its tokenizer.")
        return self.fields[key]


def open_gguf(path: Path) -> GgufLlama:
    """Open a GGUF file of a Llama; another architecture, tokenizer or a damaged file raises `CatsError`."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise CatsError(f"cannot read {path}: {error}; the file is damaged or no GGUF file, fetch it again.") from error
    model = GgufLlama(path, {key: field.contents() for key, field in reader.fields.items()}, reader)
    for key, known in (("general.architecture", ("llama",)), ("tokenizer.ggml.model", ("gpt2",)), ("tokenizer.ggml.pre", DIGIT_SPLITTERS)):
        if model.field(key) not in known:
            raise CatsError(f"{path} has {key} {model.field(key)!r}; this conversion knows {', '.join(known)}.")
    return model


def config_of(model: GgufLlama) -> dict[str, Any]:
    """The fields of `config.json`."""
    tied = all(tensor.name != "output.weight" for tensor in model.reader.tensors)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": model.field("llama.embedding_length"),
        "intermediate_size": model.field("llama.feed_forward_length"),
        "max_position_embeddings": model.field("llama.context_length"),
        "num_attention_heads": model.field("llama.attention.head_count"),
        "num_hidden_layers": model.field("llama.block_count"),
        "num_key_value_heads": model.field("llama.attention.head_count_kv"),
        "rms_norm_eps": float(f"{model.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32: 1e-05, not 9.99..e-06
        "rope_theta": float(model.field("llama.rope.freq_base")),
        "tie_word_embeddings": tied,
        "vocab_size": len(model.field("tokenizer.ggml.tokens")),
        "dtype": "bfloat16",
        **special_ids(model),
    }


def special_ids(model: GgufLlama) -> dict[str, int]:
    """Ids of the special tokens, as Hugging Face's configurations name them."""
    return {f"{name}_token_id": model.field(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_KEYS.items() if name != "unk"}


SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER_NAMES:
        raise CatsError(f"the GGUF file has a tensor {name}, which a Llama has not; this conversion does not know its architecture.")
    return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"


def unpermuted(rows_RK: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in Hugging Face's order: of each head first all first halves of the rotary pairs, then the second."""
    pairs = rows_RK.reshape(heads, rows_RK.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows_RK.shape)


def tensors_of(model: GgufLlama) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its Hugging Face name, float32, in the order of the file."""
    from gguf.quants import dequantize

    heads = {"attn_q": model.field("llama.attention.head_count"), "attn_k": model.field("llama.attention.head_count_kv")}
    for tensor in model.reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        yield hugging_face_name(tensor.name), torch.from_numpy(unpermuted(numbers, heads[kind]) if kind in heads else numbers.copy())


def tokenizer_of(model: GgufLlama) -> Any:
    """The byte-level BPE tokenizer (of the `tokenizers` library), control tokens included."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = model.field("tokenizer.ggml.tokens"), model.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in model.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config_of(model: GgufLlama) -> dict[str, Any]:
    """The fields of `tokenizer_config.json`."""
    tokens = model.field("tokenizer.ggml.tokens")
    special = {f"{name}_token": tokens[model.field(f"tokenizer.ggml.{key}_token_id")] for name, key in SPECIAL_KEYS.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        **special,
    }


def convert(path: Path, directory: Path, on_tensor: Callable[[str], object] = lambda name: None) -> None:
    """Write the Hugging Face directory of a GGUF file; `directory` must exist. `on_tensor` is called with each name when it is done."""
    model = open_gguf(path)
    tensors: dict[str, torch.Tensor] = {}
    for name, numbers in tensors_of(model):
        tensors[name] = numbers.to(torch.bfloat16)
        on_tensor(name)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer_of(model).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(model.field("tokenizer.chat_template"), encoding="utf-8")
    for name, fields in (
        ("config.json", config_of(model)),
        ("generation_config.json", special_ids(model)),
        ("tokenizer_config.json", tokenizer_config_of(model)),
    ):
        (directory / name).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
