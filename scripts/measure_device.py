"""What this device can do, as a profile for the planner: the disk's rate, memory's rate, seconds of a layer and of the head.

    python -m scripts.measure_device --model-path DIR --output profile.json
    python -m scripts.measure_device --config data/vicuna_7B_config.json --dtype float32 --directory DIR --output profile.json

Layers have the shapes of the configuration and random weights in the stored dtype (of the model's own weights only the disk's
rate is read), go through the engine's own layers, projections and cache behind `--context` positions, and are as many as
keep the processor's cache from holding them, as long as the model has so many. Reads the disk through a file of the
checkpoint, or through one of `--file-size` that is made in `--directory` and removed. Medians are reported.
"""

import argparse
import copy
import math
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cats.checkpoint import DTYPES, parse_dtype, weight_files
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.earlyexit import EarlyExitLlamaForCausalLM, read_config
from cats.errors import CatsError
from cats.linear import WorkSpace, replace_projections, work_bytes
from cats.planning.plan import amount, parse_amount
from cats.planning.profile import DeviceProfile, Table, save_device
from cats.runtime.budget import interpreter_bytes
from cats.runtime.link import measure_read_rate
from evaluation.timing import cpu_model, environment, seconds_of

NODES = (1, 2, 4, 6, 8, 16, 32, 64, 128, 256)
BEYOND_CACHE = 256_000_000
"""Bytes of layers that no processor's cache holds."""
MEMORY_BYTES = 512_000_000
WRITTEN_AT_ONCE = 16 << 20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-path", type=Path, help="checkpoint directory")
    model.add_argument("--config", type=Path, help="a config.json, such as data/vicuna_7B_config.json")
    parser.add_argument("--stored-dtype", choices=tuple(DTYPES), help="of weights (default: what the configuration says)")
    parser.add_argument("--dtype", choices=(*DTYPES, "auto"), default="auto", help="of the arithmetic (default: as stored)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES), help="of a pass (default: %(default)s)")
    parser.add_argument("--context", type=int, default=256, help="positions in the cache (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of every timing (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured, for --config (default: here)")
    parser.add_argument("--file-size", default="1GB", help="of the file made there (default: %(default)s)")
    parser.add_argument("--name", help="of the profile (default: the processor or accelerator)")
    parser.add_argument("--output", type=Path, required=True, help="profile to write")
    return parser.parse_args(argv)


def read_shape(args: argparse.Namespace) -> PretrainedConfig:
    """The configuration of the model whose layers are timed."""
    if args.model_path is not None:
        return read_config(args.model_path)
    if not args.config.is_file():
        raise CatsError(f"there is no file {args.config}; give a config.json such as data/vicuna_7B_config.json.")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(args.config, Path(folder) / "config.json")
        return read_config(folder)


def dtypes_of(args: argparse.Namespace, config: PretrainedConfig) -> tuple[torch.dtype, torch.dtype]:
    """Of the stored weights and of the arithmetic."""
    named = args.stored_dtype or str(config.dtype).removeprefix("torch.")
    if named not in DTYPES:
        raise CatsError(f"the configuration names the dtype {named!r}; give --stored-dtype, one of {', '.join(DTYPES)}.")
    return DTYPES[named], parse_dtype(args.dtype, DTYPES[named])


def build(
    config: PretrainedConfig, stored: torch.dtype, compute: torch.dtype, device: torch.device, layers: int
) -> EarlyExitLlamaForCausalLM:
    """A model of `layers` layers with random matrices in `stored`."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    with torch.device("meta"):
        causal_lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    work = WorkSpace()
    replace_projections(causal_lm, work)
    causal_lm.model.embed_tokens = torch.nn.Identity()
    for name, parameter in list(causal_lm.named_parameters()):
        owner, _, last = name.rpartition(".")
        held = stored if parameter.dim() == 2 else compute
        values = torch.randn(parameter.shape, dtype=torch.float32).mul_(0.02).to(device, held)
        setattr(causal_lm.get_submodule(owner), last, torch.nn.Parameter(values, requires_grad=False))
    return EarlyExitLlamaForCausalLM(causal_lm, config, compute, work=work).eval()


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """Of one call, after one untimed."""
    seconds_of(action)
    return statistics.median(seconds_of(action) for _ in range(repeats))


@torch.inference_mode()
def time_layers(model: EarlyExitLlamaForCausalLM, nodes: Sequence[int], context: int, repeats: int) -> tuple[Table, Table]:
    """(nodes, seconds) of one layer and of norm and head, `context` positions being in the cache."""
    layers: list[tuple[int, float]] = []
    heads: list[tuple[int, float]] = []
    cache = model.new_cache(context + max(nodes))
    for count in live_bar(nodes, desc="nodes of a pass"):
        states = torch.randn(1, count, model.config.hidden_size, dtype=model.dtype, device=model.device)
        positions = torch.arange(context, context + count, device=model.device)
        bias = torch.zeros(1, 1, count, context + count, dtype=model.dtype, device=model.device)

        def run_layers(states: torch.Tensor = states, positions: torch.Tensor = positions, bias: torch.Tensor = bias) -> None:
            with cache.writing(slice(context, context + len(positions)), context + len(positions)):
                model.forward_draft_or_large_model(hidden_states=states, past_key_values=cache, attention_mask=bias, positions_T=positions)

        layers.append((count, median_seconds(run_layers, repeats) / model.layer_count))
        heads.append((count, median_seconds(lambda states=states: model.target_logits(states), repeats)))  # type: ignore[misc]
    return tuple(layers), tuple(heads)


def work_bytes_of(model: EarlyExitLlamaForCausalLM, stored: torch.dtype) -> int:
    """What the runtime charges for the projections' work space."""
    largest = max(weight.numel() for weight in (*model.layers.parameters(), *model.lm_head.parameters()))
    return work_bytes(largest, [stored], stored, model.dtype) if model.device.type == "cpu" else 0


def memory_rate(device: torch.device, repeats: int) -> float:
    """Bytes per second of reading a block that no cache holds."""
    block = torch.ones(MEMORY_BYTES // 4, dtype=torch.float32, device=device)
    return MEMORY_BYTES / median_seconds(block.sum, repeats)


@contextmanager
def file_to_read(args: argparse.Namespace) -> Iterator[Path]:
    """A file on the disk to be measured: the checkpoint's largest, or one that is made and removed."""
    if args.model_path is not None:
        yield max(weight_files(args.model_path), key=lambda path: path.stat().st_size)
        return
    if not args.directory.is_dir():
        raise CatsError(f"there is no directory {args.directory}; give --directory on the disk to be measured.")
    size, free = parse_amount(args.file_size, "--file-size"), shutil.disk_usage(args.directory).free
    if size > free:
        raise CatsError(f"{args.directory} has {amount(free)} free and --file-size is {amount(size)}; give less, or another --directory.")
    descriptor, name = tempfile.mkstemp(prefix="read_rate_", suffix=".part", dir=args.directory)
    path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for _ in live_bar(range(math.ceil(size / WRITTEN_AT_ONCE)), desc="file to read"):
                file.write(os.urandom(WRITTEN_AT_ONCE))
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        with suppress(FileNotFoundError):
            path.unlink()


def measure(args: argparse.Namespace) -> DeviceProfile:
    """Everything, one after the other."""
    interpreter = interpreter_bytes()
    config, device = read_shape(args), torch.device(args.device)
    stored, compute = dtypes_of(args, config)
    with file_to_read(args) as path:
        rates = [measure_read_rate(path) for _ in live_bar(range(args.repeats), desc="disk")]
    memory = memory_rate(device, args.repeats)
    model = build(config, stored, compute, device, 1)
    layer_bytes = sum(weight.nbytes for weight in model.layers.parameters() if weight.dim() == 2)
    wanted = max(1, min(math.ceil(BEYOND_CACHE / layer_bytes), config.num_hidden_layers))
    if wanted > 1:
        model = build(config, stored, compute, device, wanted)
    layers, heads = time_layers(model, sorted({1, *args.nodes}), args.context, args.repeats)
    made_on = environment()
    where = made_on["gpus"][0] if device.type == "cuda" else cpu_model()
    return DeviceProfile(
        name=args.name or f"{where}, {torch.get_num_threads()} threads" if device.type == "cpu" else args.name or where,
        flash_bytes_per_second=round(statistics.median(rates)),
        memory_bytes_per_second=round(memory),
        layer_bytes=layer_bytes,
        layer_seconds=layers,
        lm_head_bytes=next(model.lm_head.parameters()).nbytes,
        lm_head_seconds=heads,
        interpreter_bytes=interpreter,
        compute_itemsize=compute.itemsize,
        widen_bytes=work_bytes_of(model, stored),
        notes=notes_of(args, rates, wanted, stored, compute, made_on),
    )


def notes_of(
    args: argparse.Namespace, rates: Sequence[float], layers: int, stored: torch.dtype, compute: torch.dtype, made_on: dict[str, Any]
) -> tuple[str, ...]:
    """How it was measured."""
    spread = f"{min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f} GB/s in {len(rates)} runs"
    source = "a file of the checkpoint" if args.model_path else f"a file of {args.file_size} made for it"
    return (
        f"flash: direct sequential reads of {source}; {spread}.",
        f"layers: {layers} with random weights in {stored}, arithmetic in {compute}, {args.context} positions in the cache; medians of "
        f"{args.repeats}.",
        f"made on {made_on['system']}, {made_on['cores']} cores, torch {made_on['torch']}, Python {platform.python_version()}, "
        f"commit {made_on['commit']}, {made_on['time']}.",
    )


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, say where."""
    args = parse(argv)
    if args.repeats < 1 or args.context < 1 or min(args.nodes) < 1:
        raise CatsError("repeats, context and nodes must be at least 1.")
    profile = measure(args)
    save_device(profile, args.output)
    first, last = profile.layer_seconds[0], profile.layer_seconds[-1]
    print(f"{args.output}: flash {profile.flash_bytes_per_second / 1e9:.2f} GB/s, memory {profile.memory_bytes_per_second / 1e9:.1f} GB/s,")
    print(f"one layer of {amount(profile.layer_bytes)} {first[1] * 1e3:.2f} ms for {first[0]} node, {last[1] * 1e3:.2f} ms for {last[0]}.")


if __name__ == "__main__":
    main()
