"""A Llama checkpoint as one GGUF file for llama.cpp, matrices in half precision, norms in float32.

    python -m evaluation.benchmarks.write_gguf MODEL FILE.gguf [--type bf16]

The file has no tokenizer: benchmarks give and take token ids. float16 is what llama.cpp's own conversion writes by default. Of bfloat16
weights it rounds the smallest (below 2**-17) and cannot hold the largest (from 65504 on): how many values changed is said at the end, and
a value out of range ends the command. --type bf16 changes none. One tensor is in memory at a time.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from cats.checkpoint import UNUSED_ENTRIES, locate_tensors, read_tensor
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from cats.from_gguf import LAYER_NAMES, OUTER_NAMES

KINDS = {
    "f16": (torch.float16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
GGUF_PARTS = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
GGUF_OUTER = {theirs: ours for ours, theirs in OUTER_NAMES.items()}


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    if name in GGUF_OUTER:
        return GGUF_OUTER[name]
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    if not layer.isdigit() or part not in GGUF_PARTS or not name.endswith(".weight"):
        raise CatsError(f"the checkpoint has a tensor {name}, which a Llama has not; this command writes Llamas without biases.")
    return f"blk.{layer}.{GGUF_PARTS[part]}.weight"


def permuted(rows_RK: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection in llama.cpp's order: the two halves of each rotary pair next to each other."""
    return rows_RK.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def read_config(directory: Path) -> dict[str, Any]:
    """The configuration, if a GGUF of plain Llama can say all of it."""
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatsError(f"cannot read {path}: {error}; give the directory of a checkpoint.") from error
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if config.get("model_type") != "llama" or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CatsError(f"{path} is of another family than Llama, or scales its rope; llama.cpp's own conversion knows those.")
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {**config, "rope_theta": rope["rope_theta"], "head_dim": width}


def describe(writer: GGUFWriter, config: dict[str, Any], file_type: LlamaFileType) -> None:
    """Everything but tensors."""
    writer.add_file_type(file_type)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def written_form(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> tuple[np.ndarray, int]:
    """The tensor as the file holds it, and how many values that changed. Matrices are the bits alone: NumPy has no bfloat16."""
    if tensor.dim() == 1:
        return tensor.float().numpy(), 0
    rounded = tensor.to(dtype)
    if not all(end.isfinite() for end in rounded.aminmax()):
        raise CatsError(f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold; use --type bf16.")
    return rounded.view(torch.int16).numpy(), int((rounded.to(tensor.dtype) != tensor).count_nonzero())


def matrices_and_norms(directory: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the file holds, by their names in the checkpoint."""
    unused = ("lm_head.weight",) if config.get("tie_word_embeddings") else ()
    return {name: place.shape for name, place in locate_tensors(directory).items() if not name.endswith((*UNUSED_ENTRIES, *unused))}


def declare(writer: GGUFWriter, shapes: dict[str, tuple[int, ...]], matrices: GGMLQuantizationType) -> None:
    """Say what tensors will follow."""
    for name, shape in shapes.items():
        kind, width = (matrices, 2) if len(shape) > 1 else (GGMLQuantizationType.F32, 4)
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(f"i{width}"), math.prod(shape) * width, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write_gguf(directory: Path, path: Path, kind: str, on_bytes: Callable[[int], object] = int) -> tuple[int, int]:
    """Write the file; (values that its number format changed, values in all). `on_bytes` is told of every tensor's bytes."""
    config = read_config(directory)
    dtype, matrices, file_type = KINDS[kind]
    shapes = matrices_and_norms(directory, config)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config.get("num_key_value_heads", config["num_attention_heads"])}
    changed = 0
    writer = GGUFWriter(path, "llama")
    describe(writer, config, file_type)
    declare(writer, shapes, matrices)
    for name in shapes:
        tensor, part = read_tensor(directory, name), gguf_name(name).split(".")[-2]
        data, different = written_form(permuted(tensor, heads[part]) if part in heads else tensor, dtype, name)
        writer.write_tensor_data(data)
        changed += different
        on_bytes(data.nbytes)
    writer.close()
    return changed, sum(map(math.prod, shapes.values()))


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Write the file, below a bar."""
    parser = CommandParser(
        prog="python -m evaluation.benchmarks.write_gguf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint directory of a Llama, in safetensors")
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--type", choices=tuple(KINDS), default="f16", help="of the matrices (default: %(default)s)")
    args = parser.parse_args(argv)
    counts: list[tuple[int, int]] = []
    with live_bar(unit="B", unit_scale=True, desc=str(args.file), leave=False) as bar:
        write_atomically(args.file, lambda part: counts.append(write_gguf(args.model, part, args.type, bar.update)))
    changed, numbers = counts[0]
    sys.stdout.write(f"{args.file}: {changed} of {numbers} values differ from the checkpoint's\n")


if __name__ == "__main__":
    main()
