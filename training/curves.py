"""Draw what adapters gain from the tokens they see: figures on held-out rows from the training_log.json of one or several runs.

Beside the picture (.png) stand its points (.json) and a table of the last ones (.md), with the bytes that each adapter holds in
bfloat16, so that accepted length can be read per byte. Logs hold as many points as the run made reports: see --report-steps
of train_finetune.

    python -m training.curves runs/attention/training_log.json runs/decoder/training_log.json --output curves.json
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from cats.cli.command import CommandParser, exit_with_sentence
from cats.errors import CatsError
from cats.files import write_atomically
from training.provenance import read_json, write_json

matplotlib.use("Agg")

PANELS = {"accepted_length": "accepted length (tokens per target pass)", "top1": "top-1 agreement (share)", "loss": "loss (nats)"}
FIGURES = ("loss", "top1", "top5", "accepted_length")
LINES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D", "v", "P", "X", "*")
BF16_BYTES = 2
Result = dict[str, Any]


def points_of(log_path: Path) -> Result:
    """Block, settings and, per exit, bytes and points of a run; a log without reports, or of before tokens were counted: `CatsError`."""
    log = read_json(log_path, "training/train_finetune.py")
    reports = log.get("reports") or []
    if not reports:
        raise CatsError(f"{log_path} holds no validation yet; train before drawing.")
    if "tokens" not in reports[0] or "adapter_parameters" not in log:
        raise CatsError(f"{log_path} does not say how many tokens the run had seen; it comes from another version, train again.")
    exits = {}
    for exit_layer, parameters in log["adapter_parameters"].items():
        points = [
            {name: report[name] for name in ("step", "tokens", "positions")}
            | {name: report["validation"][exit_layer][name] for name in FIGURES}
            for report in reports
        ]
        exits[exit_layer] = {"bytes_bf16": BF16_BYTES * parameters, "points": points}
    return {"run": log_path.resolve().parent.name, "block": log["block"], "settings": log["run"], "hours": log["hours"], "exits": exits}


def publish(log_paths: Sequence[Path], output: Path) -> None:
    """Write `output` (.json), and beside it the table (.md) and the picture (.png)."""
    runs = [points_of(path) for path in log_paths]
    what = "adapters on held-out rows over the tokens seen; accepted length of a simulated greedy chain, 1 = plain decoding"
    write_json(output, {"what": what, "runs": runs})
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(table(runs), encoding="utf-8"))
    draw(runs, output.with_suffix(".png"))


def draw(runs: Sequence[Result], picture: Path) -> None:
    """One panel per figure; exits differ by marker and by lightness, runs by the kind of line, so that it can be read in grey."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4.4), constrained_layout=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        draw_panel(axis, runs, name)
        axis.set(title=f"held-out {title}", xlabel="tokens seen (thousands)", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    write_atomically(picture, lambda part: figure.savefig(part, format="png", dpi=110))
    pyplot.close(figure)


def draw_panel(axis: Axes, runs: Sequence[Result], name: str) -> None:
    """One line per run and exit."""
    exits = sorted({int(exit_layer) for run in runs for exit_layer in run["exits"]})
    shades = matplotlib.colormaps["cividis"]
    for number, run in enumerate(runs):
        for exit_layer, curve in run["exits"].items():
            place = exits.index(int(exit_layer))
            axis.plot(
                [point["tokens"] / 1000 for point in curve["points"]],
                [point[name] for point in curve["points"]],
                linestyle=LINES[number % len(LINES)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=4,
                color=shades(0.85 * place / max(1, len(exits) - 1)),
                label=f"{run['run']} ({run['block']}), exit {exit_layer}",
            )


def table(runs: Sequence[Result]) -> str:
    """The Markdown file: the last point of every run and exit."""
    text = (
        "# Adapters over the tokens seen\n\nThe last point of every run, on held-out rows; every point is in the .json beside this file. "
        "Accepted length: simulated, greedy chain, 1 = plain decoding. Gain per MB: accepted length - 1, per megabyte resident in "
        "bfloat16.\n\n"
    )
    head = ("run", "block", "exit", "MB resident", "tokens seen", "of them answers", "top-1", "top-5", "accepted length", "gain per MB")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run in runs:
        for exit_layer, curve in run["exits"].items():
            last, megabytes = curve["points"][-1], curve["bytes_bf16"] / 1e6
            figures = [f"{last[name]:.3f}" for name in ("top1", "top5", "accepted_length")]
            gain = f"{(last['accepted_length'] - 1) / megabytes:.3g}"
            cells = [run["run"], run["block"], exit_layer, f"{megabytes:.3g}", f"{last['tokens']:,}", f"{last['positions']:,}"]
            lines.append("| " + " | ".join([*cells, *figures, gain]) + " |")
    return text + "\n".join(lines) + "\n"


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="training_log.json of a run; a run is called as its folder")
    parser.add_argument("--output", type=Path, required=True, help="points (.json); the table (.md) and the picture (.png) lie beside it")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix != ".json":
        raise CatsError(f"--output {arguments.output} must end in .json; the table and the picture take its name.")
    publish(arguments.logs, arguments.output)


if __name__ == "__main__":
    main()
