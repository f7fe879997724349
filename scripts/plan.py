"""Which settings a device, a model and a memory budget call for: the plan, what it holds, what it predicts, and why.

    python -m scripts.plan --config data/vicuna_7B_config.json --layers 32 --profile data/profiles/paper_orin_8GB.json --memory-budget 8GB
    python -m scripts.plan --model-path DIR --profile FILE --acceptance FILE --shallow-exits 10 15 --memory-budget 6GB

Reads a configuration and two profiles (`python -m scripts.measure_device` writes a device's), loads no weights. Settings given
as flags stay as they are. The last lines are the flags to give to evaluation.CATS_dynamic.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.config import CascadeConfig
from cats.errors import CatsError
from cats.planning.cost import paper_bytes_per_token, sizes_of, streamed_bytes_per_token
from cats.planning.plan import ModelSizes, amount, parse_amount
from cats.planning.planner import CASCADE_SETTINGS, Candidate, Choice, choose
from cats.planning.profile import AcceptanceProfile, DeviceProfile, load_acceptance, load_device

PROFILES = Path(__file__).resolve().parent.parent / "data" / "profiles"
ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
ARITHMETIC = {2: "bfloat16", 4: "float32", 8: "float64"}
"""Bytes of one number -> the dtype that a profile of such arithmetic stands for, where weights are stored otherwise."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-path", type=Path, help="checkpoint directory of the base model; only its config.json is read")
    model.add_argument("--config", type=Path, help="a config.json, or one of data/*_config.json with --layers")
    parser.add_argument("--layers", type=int, help="decoder layers, where the configuration is an adapter's (default: what it says)")
    parser.add_argument("--stored-dtype", choices=tuple(ITEMSIZES), help="of the weights on disk (default: what the configuration says)")
    parser.add_argument("--profile", type=Path, required=True, help="device profile, from scripts.measure_device or data/profiles")
    parser.add_argument(
        "--acceptance",
        type=Path,
        default=PROFILES / "paper_vicuna_7B_acceptance.json",
        help="acceptance profile (default: the paper's of Vicuna-7B)",
    )
    parser.add_argument("--memory-budget", help="8GB, 500MB, 2GiB (default: no limit)")
    parser.add_argument("--budget-covers", choices=("process", "weights"), default="process", help="default: %(default)s")
    parser.add_argument("--flash-bandwidth", help="1GB/s: a flash to be imitated, instead of the profile's")
    parser.add_argument("--method", choices=("cascade", "autoregressive"), help="default: whichever is faster")
    parser.add_argument("--draft-exit", type=int, help="default: what acceptance was measured with")
    parser.add_argument("--shallow-exits", type=int, nargs="+", help="exits with an adapter (default: those of the acceptance profile)")
    parser.add_argument("--shallow-exit", type=int, help="this one and no other")
    for name in CASCADE_SETTINGS:
        parser.add_argument("--" + name.replace("_", "-"), type=float if name == "threshold" else int, help="default: planned")
    parser.add_argument("--ring-buffers", type=int, help="size of the ring in largest matrices (default: planned)")
    parser.add_argument("--budget-positions", type=int, help="prompt and answer together, at most (default: the context)")
    parser.add_argument("--no-pinning", action="store_true", help="the paper's way: nothing beyond the front stays in memory")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def read_configuration(path: Path) -> dict[str, Any]:
    """A config.json as a mapping."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CatsError(f"cannot read the configuration {path}: {str(error).splitlines()[0]}; give a model's config.json.") from error
    if not isinstance(config, dict):
        raise CatsError(f"{path} is no configuration; give a model's config.json.")
    return config


def model_of(args: argparse.Namespace, device: DeviceProfile) -> tuple[ModelSizes, int, str]:
    """The sizes of the model, its context, and the dtype that it is stored in."""
    config = read_configuration(args.config or args.model_path / "config.json")
    if config.get("num_hidden_layers") == 1 and args.layers is None:
        raise CatsError(
            f"{args.config or args.model_path} has one layer, as an adapter's configuration has; give --layers of the base model."
        )
    dtype = args.stored_dtype or config.get("dtype") or config.get("torch_dtype")
    if dtype not in ITEMSIZES:
        raise CatsError(f"the configuration names the dtype {dtype!r}; give --stored-dtype, one of {', '.join(ITEMSIZES)}.")
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or context < 1:
        raise CatsError("the configuration does not say max_position_embeddings; give --budget-positions with a complete config.json.")
    return sizes_of(config, ITEMSIZES[dtype], device, args.layers), context, dtype


def fixed_settings(args: argparse.Namespace, context: int) -> dict[str, Any]:
    """What was given on the command line."""
    given = {name: getattr(args, name) for name in (*CASCADE_SETTINGS, "method", "draft_exit", "shallow_exit", "ring_buffers")}
    fixed = {name: value for name, value in given.items() if value is not None}
    if args.budget_positions is not None and args.budget_positions < 1:
        raise CatsError(f"budget-positions is {args.budget_positions}; it must be at least 1.")
    fixed["positions"] = min(args.budget_positions or context, context)
    if args.no_pinning:
        fixed["pinning"] = False
    if args.ring_buffers is not None and args.ring_buffers < 1:
        raise CatsError(f"ring-buffers is {args.ring_buffers}; it must be at least 1.")
    return fixed


def dtype_flags(compute_itemsize: int, stored: str) -> list[str]:
    """Flags for arithmetic of so many bytes a number with weights that are stored in `stored`."""
    if compute_itemsize == ITEMSIZES[stored]:
        return [f"--compute-dtype {stored}"]
    if compute_itemsize not in ARITHMETIC:
        return []
    computed = ARITHMETIC[compute_itemsize]
    return [f"--dtype {computed}"] * (compute_itemsize < ITEMSIZES[stored]) + [f"--compute-dtype {computed}"]


def flags_of(choice: Choice, args: argparse.Namespace, stored: str) -> list[str]:
    """What to give to evaluation.CATS_dynamic, beside model and adapters."""
    best, memory = choice.best, choice.memory
    flags = [f"--method {best.method.name}"]
    if isinstance(best.method, CascadeConfig):
        flags += [f"--draft-layer {best.exits[0]}", f"--shallow-layer {best.exits[1]}"]
        flags += [f"--{name.replace('_', '-')} {getattr(best.method, name)}" for name in CASCADE_SETTINGS]
    flags += dtype_flags(memory.demand.compute_itemsize, stored)
    if memory.budget_bytes is not None:
        flags += [f"--memory-budget {args.memory_budget.replace(' ', '')}", f"--budget-covers {memory.covers}"]
        flags += [f"--budget-positions {memory.demand.positions}"] if memory.covers == "process" else []
    if memory.streamed:
        flags.append(f"--ring-buffers {memory.demand.ring_buffers}")
        flags += [f"--flash-bandwidth {args.flash_bandwidth.replace(' ', '')}"] if args.flash_bandwidth else []
    if not memory.demand.pinning:
        flags.append("--no-pinning")
    return flags


def priced(candidate: Candidate, sizes: ModelSizes) -> dict[str, Any]:
    """A candidate as JSON."""
    seconds, accepted = candidate.seconds, candidate.accepted.accepted
    layer_bytes = sizes.layer_bytes + sizes.other_layer_bytes
    steps, exits = (candidate.method.steps, candidate.exits) if isinstance(candidate.method, CascadeConfig) else (1, (0,))
    return {
        "label": candidate.label,
        "settings": {"method": candidate.method.name, **vars(candidate.method)},
        "exits": list(candidate.exits),
        "accepted_length": accepted,
        "tokens_per_second": candidate.tokens_per_second,
        "seconds": {**vars(seconds), "total": seconds.total},
        "streamed_bytes": candidate.memory.streamed_bytes,
        "streamed_bytes_per_token": streamed_bytes_per_token(candidate.memory, accepted),
        "paper_bytes_per_token": paper_bytes_per_token(steps, exits[0], sizes.layers, layer_bytes, accepted),
        "ring_bytes": candidate.memory.ring_bytes,
        "charges": dict(candidate.memory.charges),
        "charged": candidate.memory.charged,
    }


def report(choice: Choice, sizes: ModelSizes, device: DeviceProfile, acceptance: AcceptanceProfile, flags: list[str]) -> str:
    """The plan as text."""
    facts, memory, seconds = priced(choice.best, sizes), choice.memory, choice.seconds
    held = len(memory.pinned) / max(len(memory.pinned) + len(memory.streamed), 1)
    lines = [f"device      {device.name}", f"acceptance  {acceptance.name}", f"plan        {choice.best.label}", "", "memory"]
    lines += [f"  {name:<28}{amount(nbytes):>12}" for name, nbytes in memory.charges]
    limit = "no limit" if memory.budget_bytes is None else f"of {amount(memory.budget_bytes)} for the {memory.covers}"
    lines += [f"  {'in all':<28}{amount(memory.charged):>12} {limit}; {held:.0%} of the layers' matrices stay", "", "predicted"]
    for name in ("draft", "shallow", "target"):
        lines.append(f"  {name:<28}{getattr(seconds, name):>10.4f} s")
    lines += [
        f"  {'  of it waiting for flash':<28}{seconds.stream_wait:>10.4f} s",
        f"  {'cycle':<28}{seconds.total:>10.4f} s",
        f"  {'tokens per target pass':<28}{choice.best.accepted.accepted:>10.3f}",
        f"  {'tokens/s':<28}{choice.tokens_per_second:>10.3f}",
        f"  {'streamed per token':<28}{facts['streamed_bytes_per_token'] / 1e9:>10.4f} GB",
        f"  {'the paper would count':<28}{facts['paper_bytes_per_token'] / 1e9:>10.4f} GB",
        "",
        "why",
    ]
    lines += [f"  - {reason}" for reason in choice.reasons]
    if choice.alternatives:
        lines += ["", "instead"]
        lines += [f"  {other.label:<52}{other.tokens_per_second:>9.3f} tokens/s" for other in choice.alternatives]
    return "\n".join([*lines, "", "flags", "  " + " ".join(flags)])


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Read, choose, print."""
    args = parser().parse_args(argv)
    device, acceptance = load_device(args.profile), load_acceptance(args.acceptance)
    if args.flash_bandwidth is not None:
        device = replace(device, flash_bytes_per_second=float(parse_amount(args.flash_bandwidth, "--flash-bandwidth")))
    sizes, context, stored = model_of(args, device)
    budget = None if args.memory_budget is None else parse_amount(args.memory_budget, "--memory-budget")
    exits = args.shallow_exits or sorted({point.shallow_exit for point in acceptance.points} - {acceptance.draft_exit})
    choice = choose(sizes, device, acceptance, budget, args.budget_covers, exits, fixed_settings(args, context))
    flags = flags_of(choice, args, stored)
    if args.json:
        others = [priced(candidate, sizes) for candidate in choice.alternatives]
        best = priced(choice.best, sizes)
        print(json.dumps({**best, "reasons": list(choice.reasons), "flags": flags, "alternatives": others}, indent=1))
    else:
        print(report(choice, sizes, device, acceptance, flags))


if __name__ == "__main__":
    main()
