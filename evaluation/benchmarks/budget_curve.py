"""Tokens per second over the memory budget: methods in turns at each of several budgets, next to their bounds, as a picture.

    python -m evaluation.benchmarks.budget_curve --nested-model-path NESTED --flash-bandwidth 100MB/s --output curve.json \
        --budgets 85MB 110MB 140MB 170MB 184MB 200MB 230MB 290MB
    python -m evaluation.benchmarks.budget_curve --output curve.json --merge          only draw what is there

Measured as streaming.py measures at one budget: budgets are of weights, every method has a plan of its own, all answer
the same questions in turns, and their text must be plain decoding's. Methods that draft with a coarse form run on the nested checkpoint.
The bound of a cycle is the longer of what the link needs for the bytes streamed and what the processor needs for the arithmetic. A method
that does not fit a budget is left out there, and the result says why. One record a budget: an interrupted run goes on with the next.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cats
from cats.checkpoint import weight_files
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.memory_flags import PROMPT_POSITIONS, drafts_coarsely
from cats.cli.progress import heartbeat, live_bar
from cats.errors import BudgetError, CatsError
from cats.files import write_atomically
from cats.planning.plan import amount, parse_amount
from cats.runtime.link import measure_read_rate, rate_text
from cats.settings import as_record
from evaluation.benchmarks.streaming import PLAIN, Contender, answer_in_turns, figures_of, imitated, loaded
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.cycles import streams
from evaluation.options import ADAPTERS, add_place_flags
from evaluation.presets import PRESET_HELP, parse_presets, title_of
from evaluation.record_file import Record, append_record, check_settings, read_records, write_json
from evaluation.subject import weights_fingerprint
from evaluation.timing import environment

DEFAULT_METHODS = ("prompt_lookup", "cascade_tree", "nested_adaptive")
MARKS = "osv^D<>"
COLOURS = ("#797979", "#956cb4", "#4878d0", "#ee854a", "#6acc64", "#d65f5f", "#d5bb67")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_flags(parser)
    parser.add_argument("--nested-model-path", help="nested checkpoint of the same model, for methods that draft with a coarse form")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=PRESET_HELP)
    parser.add_argument("--budgets", nargs="+", metavar="BYTES", help="of weights, like 85MB 184MB")
    parser.add_argument("--flash-bandwidth", help="like 100MB/s: the link that is imitated (default: the disk as it is)")
    parser.add_argument("--ring-buffers", type=int, default=3)
    parser.add_argument("--bench-name", default="mt_bench")
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); a picture (.png) lies beside it")
    parser.add_argument("--merge", action="store_true", help="only draw what is recorded; takes no other flag than --output")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Field:
    """Who is measured, by label, and on which checkpoint."""

    methods: dict[str, cats.MethodConfig]
    places: dict[str, ChosenModel]


def field_of(args: argparse.Namespace) -> Field:
    """Plain decoding and the chosen methods; `CatsError` where one lacks its checkpoint."""
    methods = parse_presets([PLAIN, *args.methods])
    coarse = {label for label, method in methods.items() if drafts_coarsely(method)}
    if bool(coarse) != (args.nested_model_path is not None):
        raise CatsError("methods that draft with a coarse form and --nested-model-path belong together; give both or neither.")
    plain = chosen_model([method for label, method in methods.items() if label not in coarse], args)
    places = dict.fromkeys(methods, plain)
    if coarse:
        none = dict.fromkeys(("adapters", *(f"{role}_{what}" for role in ADAPTERS for what in ("adapter_path", "layer"))))
        nested = argparse.Namespace(**vars(args) | none | {"model_path": args.nested_model_path})
        places |= dict.fromkeys(coarse, chosen_model([methods[label] for label in methods if label in coarse], nested))
    return Field(methods, places)


def settings_of(args: argparse.Namespace, field: Field) -> dict[str, Any]:
    """Everything that decides a figure, the budget left out."""
    names = ("flash_bandwidth", "ring_buffers", "bench_name", "questions", "max_new_tokens", "dtype", "threads")
    return {
        "methods": {label: as_record(method) for label, method in field.methods.items()},
        "weights": {label: weights_fingerprint(place.directory) for label, place in field.places.items()},
        **{name: getattr(args, name) for name in names},
    }


def measured(args: argparse.Namespace, field: Field, budget: int) -> Record:
    """All methods that fit one budget."""
    positions = PROMPT_POSITIONS + args.max_new_tokens
    memory = cats.MemoryOptions(budget, "weights", ring_buffers=args.ring_buffers, positions=positions)
    linked = replace(memory, flash_bandwidth=imitated(args))  # which is refused where nothing is streamed
    contenders, left_out = dict[str, Contender](), dict[str, str]()
    with heartbeat(f"loading {len(field.methods)} models at {amount(budget)}"):
        for label, method in field.methods.items():
            try:
                place = field.places[label]
                contenders[label] = loaded(place, method, linked if streams(place, method, memory, args.dtype) else memory, args.dtype)
            except BudgetError as error:
                left_out[label] = str(error)
    if PLAIN in left_out:
        raise CatsError(f"plain decoding does not fit {amount(budget)}: {left_out[PLAIN]}")
    directory = field.places[PLAIN].directory
    bandwidth = imitated(args) or measure_read_rate(weight_files(directory)[0])
    try:
        answer_in_turns(args, directory, contenders)
        figures = {label: figures_of(contender, bandwidth) for label, contender in contenders.items()}
    finally:
        for contender in contenders.values():
            contender.model.close()
    return {"budget_bytes": budget, "bandwidth": bandwidth, "methods": figures, "left_out": left_out, "environment": environment()}


def record_all(args: argparse.Namespace, records: Path, kept: Path) -> None:
    """Whatever budgets are missing, the smallest first."""
    if not args.budgets:
        raise CatsError("there is no budget to measure at; give --budgets, like --budgets 85MB 184MB.")
    budgets = sorted({parse_amount(budget, "--budgets") for budget in args.budgets})
    torch.set_num_threads(args.threads)
    field = field_of(args)
    settings = settings_of(args, field)
    check_settings(kept, settings, records)
    write_json(kept, {"settings": settings})
    done = {record["budget_bytes"] for record in read_records(records)}
    for budget in live_bar([budget for budget in budgets if budget not in done], desc="budgets", unit="budget"):
        append_record(records, measured(args, field, budget))


def table(records: Sequence[Record], labels: Sequence[str]) -> str:
    """Tokens per second, and the bound, by budget."""
    lines = ["| budget | " + " | ".join(title_of(label) for label in labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for record in records:
        rows = [record["methods"].get(label) for label in labels]
        cells = [f"{row['tokens_per_second']:.1f} of {row['bound_tokens_per_second']:.1f}" if row else "does not fit" for row in rows]
        lines.append(f"| {amount(record['budget_bytes'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(records: Sequence[Record], labels: Sequence[str], path: Path) -> None:
    """A line with marks for each method, and a thin one for its bound."""
    from matplotlib.figure import Figure  # only this picture needs it, and it takes a second to load

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for place, label in enumerate(labels):
        points = [(record["budget_bytes"] / 1e6, record["methods"][label]) for record in records if label in record["methods"]]
        colour, budgets = COLOURS[place % len(COLOURS)], [budget for budget, _ in points]
        speeds = [row["tokens_per_second"] for _, row in points]
        axes.plot(budgets, speeds, marker=MARKS[place % len(MARKS)], color=colour, label=title_of(label))
        axes.plot(budgets, [row["bound_tokens_per_second"] for _, row in points], linestyle="--", linewidth=1, color=colour)
    axes.plot([], [], linestyle="--", linewidth=1, color="black", label="bounds: the link, or the arithmetic")
    axes.set_xlabel(f"memory budget of weights, MB (link of {rate_text(records[0]['bandwidth'])})")
    axes.set_ylabel("tokens per second")
    axes.set_yscale("log")
    for write in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        write("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=150))


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, draw."""
    args = parse(argv)
    recorded, kept = args.output.with_suffix(".records.jsonl"), args.output.with_suffix(".settings.json")
    if not args.merge:
        record_all(args, recorded, kept)
    records = sorted(read_records(recorded), key=lambda record: record["budget_bytes"])
    if not records:
        raise CatsError(f"{recorded} holds no budget yet; run the command without --merge first.")
    settings = json.loads(kept.read_text(encoding="utf-8"))["settings"]
    labels = list(settings["methods"])
    write_json(args.output, {"budgets": records, "settings": settings})
    draw(records, labels, args.output.with_suffix(".png"))
    print(table(records, labels))


if __name__ == "__main__":
    main()
