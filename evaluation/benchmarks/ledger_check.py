"""The memory ledger beside what the kernel says the process holds, at several budgets.

    python -m evaluation.benchmarks.ledger_check --model-path M [--adapters FOLDER --draft-layer 3 --shallow-layer 15] \
        --budgets 2GB 6GB 8GB --output evaluation/results/ledger.json

Every budget is a fresh process: it loads, answers a short prompt, and reports the most that the ledger counted and the most that was
resident (VmHWM) while it did. With adapters CATS runs where the plan takes it, else plain decoding. Linux only.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.methods import PRESETS
from cats.planning.plan import amount, parse_amount
from evaluation.chosen_model import chosen_model
from evaluation.memory_parts import Request, in_child
from evaluation.options import add_place_flags
from evaluation.record_file import write_json
from evaluation.timing import environment

PROMPT = 32
COLUMNS = ("budget", "of", "method", "granted", "ledger", "process", "ledger / process", "streamed a pass")


def requests_of(args: argparse.Namespace) -> Iterator[tuple[str, Request]]:
    """One a budget, with the model's name."""
    label = "cascade_tree" if args.cats else "autoregressive"
    place = chosen_model([PRESETS[label]], args)
    adapters = {role: [str(path.resolve()), exit_layer] for role, (path, exit_layer) in place.adapters.items()}
    for budget in args.budgets:
        nbytes = parse_amount(budget, "--budgets")
        yield (
            place.name,
            Request(str(place.directory.resolve()), label, nbytes, args.budget_covers, adapters, "auto", PROMPT, args.new_tokens),
        )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        figures = [amount(row[name]) for name in ("granted", "ledger", "process")]
        share = f"{row['ledger'] / row['process']:.3f}"
        lines.append(
            f"| {amount(row['budget'])} | {row['covers']} | {row['method']} | {' | '.join(figures)} | {share} | {amount(row['streamed'])} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_flags(parser)
    parser.add_argument("--budgets", nargs="+", required=True, help="like 2GB 6GB")
    parser.add_argument("--budget-covers", choices=("process", "weights"), default="process", help="default: %(default)s")
    parser.add_argument("--cats", action="store_true", help="decode with CATS (default: plain decoding)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens of the answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="result file; rows are added to those that are there")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every budget, report."""
    args = parse(argv)
    rows = [
        {"model": name, "budget": request.budget, "covers": request.covers, "method": request.method, **in_child(request)}
        for name, request in live_bar(list(requests_of(args)), desc="budgets")
    ]
    if args.output:
        earlier = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
        rows = [*earlier, *rows]
        write_json(args.output, {"rows": rows, "environment": environment()})
    print(table(rows))


if __name__ == "__main__":
    main()
