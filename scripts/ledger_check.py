"""The memory ledger beside what the kernel says the process holds, at several budgets.

    python -m scripts.ledger_check --model-path M [--adapters FOLDER --draft-layer 3 --shallow-layer 15] \
        --budgets 2GB 6GB 8GB --output evaluation/results/ledger.json

Every budget is a fresh process: it loads, answers a short prompt, and reports the most that the ledger counted and the most that was
resident (VmHWM) while it did. With adapters CATS runs where the plan takes it, else plain decoding. Linux only.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cats
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.methods import needs_of, with_needs
from cats.planning.plan import amount, parse_amount
from evaluation.chosen_model import chosen_model
from evaluation.options import add_place_flags
from evaluation.record_file import write_json
from evaluation.timing import environment

STATUS, PEAK_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PROMPT = 32
COLUMNS = ("budget", "of", "method", "granted", "ledger", "process", "ledger / process", "streamed a pass")


def resident_peak() -> int:
    """Bytes that were resident at most since the peak was reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    if found is None:
        raise cats.CatsError("the system does not say how much of a process is resident; this command needs Linux.")
    return int(found[1]) * 1024


def measured(args: argparse.Namespace, budget: int) -> dict[str, Any]:
    """One budget, in this process."""
    tree = cats.CascadeConfig(steps=5, tree_topk=10, total_tokens=40)
    method: cats.MethodConfig = tree if args.cats else cats.AutoregressiveConfig()
    place = chosen_model([method], args)
    memory = cats.MemoryOptions(budget, args.budget_covers, positions=PROMPT + args.new_tokens)
    adapters = {role: place.adapters[role] for role in needs_of(method).adapters}
    model = cats.load(place.directory, adapters, memory=with_needs(memory, method), plan=None)
    ledger, plan = model.base.source.ledger, model.base.source.plan
    PEAK_RESET.write_text("5")
    config, most = cats.GenerationConfig(max_new_tokens=args.new_tokens, eos_token_ids=()), 0
    for _ in cats.stream(model, list(range(5, 5 + PROMPT)), method, config):
        most = max(most, ledger.total)
    return {
        "model": place.name,
        "budget": budget,
        "covers": args.budget_covers,
        "method": method.name,
        "granted": plan.charged,
        "ledger": most,
        "process": resident_peak(),
        "streamed": plan.streamed_bytes,
        "ring": plan.ring_bytes,
    }


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
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.child:
        print(json.dumps(measured(args, parse_amount(args.budgets[0], "--budgets"))))
        return
    given, rows = list(sys.argv[1:] if argv is None else argv), []
    for budget in live_bar(args.budgets, desc="budgets"):
        child = [sys.executable, "-m", "scripts.ledger_check", *given, "--budgets", budget, "--child"]
        run = subprocess.run(child, capture_output=True, text=True)
        if run.returncode:
            raise cats.CatsError(f"at {budget}: {run.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
        rows.append(json.loads(run.stdout.strip().splitlines()[-1]))
    if args.output:
        earlier = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
        rows = [*earlier, *rows]
        write_json(args.output, {"rows": rows, "environment": environment()})
    print(table(rows))


if __name__ == "__main__":
    main()
