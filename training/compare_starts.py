"""Train adapters from every kind of start for a few hundred steps, and write how each is doing on the way.

Every start sees the same rows in the same order. What stands after `--` goes to train_finetune as it stands. A start that
is finished is kept and one that was interrupted goes on, so the same command, or one with more starts, can be run again;
the result (.json, and a table .md beside it) is written after each start.

    python -m training.compare_starts --model-path MODEL --exit-layers 3 10 15 20 --data-home states --work-dir runs/starts \\
        --output starts.json -- --optimizer muon --rows 12
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.errors import CatsError
from cats.files import write_atomically
from training import train_finetune
from training.adapter_run import INITS
from training.base_model import model_path_of
from training.provenance import agree, read_json, write_json

CHOSEN = ("--init", "--init-adapter", "--steps", "--epochs", "--hours", "--report-steps", "--outdir", "--exit-layers")
"""Flags of train_finetune that this command sets, or that would make the starts differ in more than their start."""
SHOWN = {"loss": "loss (nats)", "top1": "top-1", "top5": "top-5", "accepted_length": "accepted length"}
Result = dict[str, Any]


def arguments_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="base checkpoint directory; default: the environment variable CATS_BASE_MODEL")
    parser.add_argument("--exit-layers", type=int, nargs="+", required=True)
    parser.add_argument("--data-home", help="states stored by ge_data")
    parser.add_argument("--data-path", help="ShareGPT conversations, in the place of --data-home")
    parser.add_argument("--starts", nargs="+", choices=INITS, default=list(INITS), help=f"default: {' '.join(INITS)}")
    parser.add_argument("--at", type=int, nargs="+", default=[0, 50, 200], help="optimizer steps in the table (default: 0 50 200)")
    parser.add_argument("--work-dir", required=True, help="one folder per start")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); the table (.md) lies beside it")
    return parser


def check_arguments(arguments: argparse.Namespace, extra: Sequence[str]) -> None:
    """Refuse contradictions before anything is trained."""
    if min(arguments.at) < 0 or max(arguments.at) < 1:
        raise CatsError(f"--at {arguments.at} must be optimizer steps from 0 on, one of them above 0.")
    if bool(arguments.data_home) == bool(arguments.data_path):
        raise CatsError("give either --data-home (states stored by ge_data) or --data-path (conversations, trained on the fly).")
    taken = [flag for flag in extra if flag.split("=")[0] in CHOSEN]
    if taken:
        raise CatsError(f"{taken[0]} is decided by this command; leave it out after --.")


def train(arguments: argparse.Namespace, extra: Sequence[str], start: str) -> None:
    """Train from one start to the last step of the table, unless that is done."""
    outdir, steps = Path(arguments.work_dir) / start, max(arguments.at)
    log = outdir / "training_log.json"
    if log.exists() and read_json(log, "training/train_finetune.py")["optimizer_steps"] == steps:
        return
    source = ["--data-home", arguments.data_home] if arguments.data_home else ["--data-path", arguments.data_path]
    flags = ["--model-path", str(model_path_of(arguments.model_path)), "--exit-layers", *map(str, arguments.exit_layers), *source, *extra]
    flags += ["--init", start, "--steps", str(steps), "--report-steps", str(math.gcd(*arguments.at)), "--outdir", str(outdir)]
    train_finetune.main(flags)


def gathered(work_dir: Path, starts: Sequence[str], at: Sequence[int]) -> Result:
    """The figures of every finished start."""
    paths = {start: work_dir / start / "training_log.json" for start in starts}
    logs = {start: read_json(path, "training/train_finetune.py") for start, path in paths.items() if path.exists()}
    finished = {start: log for start, log in logs.items() if log["optimizer_steps"] == max(at)}
    first = next(iter(finished.values()))
    shared = {name: first[name] for name in ("block", "adapter_parameters", "data_identity", "machine")}
    run = {name: value for name, value in first["run"].items() if name != "init"}
    points = {start: [report for report in log["reports"] if report["step"] <= max(at)] for start, log in finished.items()}
    what = "adapters trained from several starts on the same rows; figures on held-out rows, accepted length of a simulated greedy chain"
    return {"what": what, "uniform_loss": math.log(first["vocabulary"]), "at": list(at), "run": run} | shared | {"starts": points}


def table(result: Result) -> str:
    """The Markdown file: one row per exit and start, one group of columns per figure."""
    at, run = result["at"], result["run"]
    text = (
        f"# Starts of adapter training\n\nBlock: {result['block']}. Every cell: after {', '.join(map(str, at))} optimizer steps, on "
        f"held-out rows. A guess that takes every token for equally likely has a loss of {result['uniform_loss']:.2f} nats. Accepted "
        f"length: simulated, greedy chain of {run['drafts']}, 1 = plain decoding.\n\n"
    )
    head = ["exit", "start", *SHOWN.values()]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for exit_layer in map(str, run["exits"]):
        for start, reports in result["starts"].items():
            figures = {report["step"]: report["validation"][exit_layer] for report in reports}
            cells = [" / ".join(f"{figures[step][name]:.2f}" for step in at) for name in SHOWN]
            lines.append("| " + " | ".join([exit_layer, start, *cells]) + " |")
    return text + "\n".join(lines) + "\n"


def write_results(output: Path, result: Result) -> None:
    """The result file and its table."""
    write_json(output, result)
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(table(result), encoding="utf-8"))


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    arguments, extra = arguments_parser().parse_args(given[:cut]), given[cut + 1 :]
    check_arguments(arguments, extra)
    work_dir = Path(arguments.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("model_path", "exit_layers", "data_home", "data_path", "at")}
    agree(work_dir / "settings.json", settings | {"flags": extra}, write=True)
    for start in arguments.starts:
        train(arguments, extra, start)
        write_results(arguments.output, gathered(work_dir, arguments.starts, arguments.at))


if __name__ == "__main__":
    main()
