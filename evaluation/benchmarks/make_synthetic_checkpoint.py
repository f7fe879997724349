"""A checkpoint with the shapes of a named model and random weights: for measuring speed and memory where no trained weights are at hand.

    python -m evaluation.benchmarks.make_synthetic_checkpoint --config data/vicuna_7B_config.json --dtype bfloat16 --exits 3 15 --outdir DIR

DIR gets what a published checkpoint has (config.json, safetensors shards with an index, a tokenizer: the test fixture's, whose ids are
valid in any vocabulary that is not smaller) and `adapters/exit<l>` for every exit. The text of such a model means nothing.

Weights are normal with standard deviation 0.02, norms are 1, so activations stay finite in float16. Only one block of normals is
drawn: each tensor reads it from a place of its own, over and over. The block's length is prime, so no two rows of a matrix are equal.
Tensors are written one after the other, nothing but the block lies in memory, and a shard gets its name when it is on the disk: a run
that was interrupted goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from cats.adapter import AdapterModel
from cats.checkpoint import CONFIG_FAULTS, DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from cats.records import check_agreement
from training.provenance import read_json, write_json

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SETTINGS = "SYNTHETIC.json"
BLOCK = 4_194_301
"""Normals drawn; a prime."""
STANDARD_DEVIATION = 0.02
LAYERS_OF = {(4096, 11008): 32, (5120, 13824): 40}
"""Decoder layers of the bases that the one-layer adapter configurations in data/ belong to, by hidden and intermediate width."""
STORED_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint: tensor names with their shapes, in order."""

    name: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    dtype: torch.dtype

    @property
    def header(self) -> bytes:
        """The safetensors header, its length field included."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.tensors:
            start, end = end, end + bytes_of(shape, self.dtype)
            entries[name] = {"dtype": STORED_NAMES[self.dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(bytes_of(shape, self.dtype) for _, shape in self.tensors)


class Block:
    """The drawn normals and as many ones, as bytes of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self._normals = as_bytes((torch.randn(BLOCK, generator=generator) * STANDARD_DEVIATION).to(dtype))
        self._ones = as_bytes(torch.ones(BLOCK, dtype=dtype))

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of tensor `name`, in pieces; a function of the seed and the name alone."""
        left = bytes_of(shape, self.dtype)
        source = self._ones if name.endswith("norm.weight") else self._normals
        place = zlib.crc32(name.encode()) % BLOCK * self.dtype.itemsize
        while left:
            piece = source[place : place + left]
            yield piece
            left, place = left - len(piece), 0

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The same as a tensor."""
        return torch.frombuffer(bytearray(b"".join(self.pieces(name, shape))), dtype=self.dtype).reshape(shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor."""
    return tensor.view(torch.uint8).numpy().data


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return int(torch.Size(shape).numel()) * dtype.itemsize


def base_config(path: Path, layers: int | None) -> LlamaConfig:
    """The base model's configuration, from its own config.json or from an adapter's (one layer, everything else the base's)."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields = {name: value for name, value in fields.items() if name not in ("exit_layer", "torch_dtype", "architectures")}
        named = fields["num_hidden_layers"]
        known = LAYERS_OF.get((fields["hidden_size"], fields["intermediate_size"])) if named == 1 else named
        if layers is None and known is None:
            raise CatsError(f"{path} is an adapter's configuration of an unknown base; say with --layers how many layers that has.")
        config = LlamaConfig.from_dict({**fields, "num_hidden_layers": layers or known})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, *CONFIG_FAULTS) as error:
        raise CatsError(f"cannot use {path} as a Llama configuration: {error!r}; give the config.json of a model or adapter.") from error
    config.architectures = ["LlamaForCausalLM"]
    return config


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors, in the order in which published checkpoints hold them."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if name != "lm_head.weight" or not config.tie_word_embeddings}


def cut_into_shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int) -> list[Shard]:
    """Fill shards up to `shard_bytes`, tensors in order and whole."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = bytes_of(shape, dtype)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += size
    names = [f"model-{place:05d}-of-{len(groups):05d}.safetensors" for place in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group), dtype) for name, group in zip(names, groups, strict=True)]


def missing_shards(shards: Sequence[Shard], outdir: Path) -> list[Shard]:
    """Those that are not there in full."""
    return [shard for shard in shards if not (outdir / shard.name).is_file() or (outdir / shard.name).stat().st_size != shard.nbytes]


def check_space(outdir: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold."""
    free = shutil.disk_usage(next(folder for folder in (outdir, *outdir.resolve().parents) if folder.exists())).free
    if needed > free:
        raise CatsError(
            f"the checkpoint needs {needed / 1e9:.2f} GB more and the disk of {outdir} has {free / 1e9:.2f} GB free; "
            "choose another --outdir or fewer --layers."
        )


def write_shard(shard: Shard, block: Block, part: Path, bar: Any) -> None:
    """Write a shard, flush it, and let the page cache forget it."""
    with part.open("wb") as file:
        file.write(shard.header)
        for name, shape in shard.tensors:
            write_tensor(file, block, name, shape, bar)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_tensor(file: BinaryIO, block: Block, name: str, shape: tuple[int, ...], bar: Any) -> None:
    """Write one tensor."""
    for piece in block.pieces(name, shape):
        file.write(piece)
        bar.update(len(piece))


def write_adapter(config: LlamaConfig, exit_layer: int, block: Block, directory: Path) -> None:
    """A random adapter in the format of trained ones."""
    with torch.device("meta"):
        adapter = AdapterModel(AdapterModel.config_for(config), exit_layer)
    tensors = {name: block.tensor(f"exit{exit_layer}.{name}", tuple(meta.shape)) for name, meta in adapter.state_dict().items()}
    adapter.load_state_dict(tensors, strict=True, assign=True)
    adapter.save_pretrained(directory)


def write_small_files(config: LlamaConfig, shards: Sequence[Shard], outdir: Path) -> None:
    """Configuration, tokenizer, and last the index, without which the directory holds no weights."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    write_atomically(outdir / "config.json", lambda part: part.write_text(json.dumps(fields, indent=1) + "\n"))
    for name in TOKENIZER_FILES:
        write_atomically(outdir / name, lambda part, name=name: shutil.copyfile(TINY / name, part))  # type: ignore[misc]
    index = {
        "metadata": {"total_size": sum(bytes_of(shape, shard.dtype) for shard in shards for _, shape in shard.tensors)},
        "weight_map": {name: shard.name for shard in shards for name, _ in shard.tensors},
    }
    write_atomically(outdir / "model.safetensors.index.json", lambda part: part.write_text(json.dumps(index, indent=1) + "\n"))


def check_settings(outdir: Path, settings: dict[str, Any]) -> None:
    """Say what the directory is, or refuse to mix it with what was begun otherwise."""
    path = outdir / SETTINGS
    if path.exists():
        check_agreement(outdir, read_json(path, "this command"), settings, "remove it or choose another --outdir.")
    elif outdir.exists() and any(outdir.iterdir()):
        raise CatsError(f"{outdir} holds other files; choose an empty or new --outdir.")
    else:
        write_json(path, settings)


def make_checkpoint(
    config: LlamaConfig, dtype: torch.dtype, exits: Sequence[int], outdir: Path, seed: int = 0, shard_bytes: int = 5 * 10**9
) -> None:
    """Write whatever of the checkpoint is not there yet."""
    config.dtype = dtype
    for exit_layer in exits:
        if not 0 < exit_layer < config.num_hidden_layers:
            raise CatsError(f"exit {exit_layer} is none of this model; exits are 1 to {config.num_hidden_layers - 1}.")
    tokens = json.loads((TINY / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if config.vocab_size < tokens:
        raise CatsError(f"the configuration has {config.vocab_size} tokens, the tokenizer beside it {tokens}; use a larger vocabulary.")
    settings = {"what": "random weights, not a trained model", "seed": seed, "shard_bytes": shard_bytes}
    check_settings(outdir, {**settings, "config": json.loads(json.dumps(config.to_dict(), default=str))})
    shards = cut_into_shards(tensor_shapes(config), dtype, shard_bytes)
    missing = missing_shards(shards, outdir)
    adapters = {exit_layer: outdir / "adapters" / f"exit{exit_layer}" for exit_layer in exits}
    absent = {exit_layer: path for exit_layer, path in adapters.items() if not (path / "config.json").exists()}
    adapter_bytes = bytes_of((4, config.hidden_size, config.num_attention_heads * (config.head_dim or 0)), dtype)
    check_space(outdir, sum(shard.nbytes for shard in missing) + len(absent) * adapter_bytes + 2**24)
    block = Block(dtype, seed)
    with live_bar(total=sum(shard.nbytes for shard in missing), unit="B", unit_scale=True, desc=str(outdir)) as bar:
        for shard in missing:
            write_atomically(outdir / shard.name, lambda part, shard=shard: write_shard(shard, block, part, bar))  # type: ignore[misc]
    for exit_layer, path in absent.items():
        write_adapter(config, exit_layer, block, path)
    write_small_files(config, shards, outdir)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Write the checkpoint."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="config.json of a Llama model, or of an adapter for one")
    parser.add_argument("--layers", type=int, help="decoder layers (default: those of the base)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="of the stored weights (default: %(default)s)")
    parser.add_argument("--exits", type=int, nargs="*", default=[], metavar="LAYER", help="write a random adapter for each of these exits")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9, help="largest shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--outdir", type=Path, required=True, help="where the checkpoint goes")
    args = parser.parse_args(argv)
    if args.layers is not None and args.layers < 1:
        raise CatsError(f"--layers is {args.layers}; it must be at least 1.")
    if args.shard_bytes < 1:
        raise CatsError(f"--shard-bytes is {args.shard_bytes}; it must be at least 1.")
    make_checkpoint(base_config(args.config, args.layers), DTYPES[args.dtype], args.exits, args.outdir, args.seed, args.shard_bytes)


if __name__ == "__main__":
    main()
