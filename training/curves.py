"""Pictures of a training run: loss, acceptance, agreement, accepted length and learning rate from training_log.json."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from cats.errors import CatsError
from cats.files import write_atomically
from training.provenance import read_json

matplotlib.use("Agg")

SMOOTHING = 0.95


def draw_curves(log_path: Path, picture: Path) -> None:
    """Draw one PNG with six panels, one line per exit; a log without steps raises `CatsError`."""
    from matplotlib import pyplot

    log = read_json(log_path, "training/train_finetune.py")
    if not log.get("steps"):
        raise CatsError(f"{log_path} holds no training step yet; train before drawing.")
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    exits = list(log["steps"][0]["loss"])
    draw_steps(axes[0, 0], log["steps"], exits)
    for place, (name, title) in zip(((0, 1), (0, 2), (1, 0), (1, 1)), PANELS, strict=True):
        draw_reports(axes[place], log["reports"], exits, name, title)
    axes[1, 2].plot([entry["step"] for entry in log["steps"]], [entry["lr"] for entry in log["steps"]])
    axes[1, 2].set(title="learning rate", xlabel="optimizer step")
    write_atomically(picture, lambda part: figure.savefig(part, format="png", dpi=110))
    pyplot.close(figure)


PANELS = (
    ("loss", "held-out loss (nats)"),
    ("acceptance", "held-out acceptance probability"),
    ("top1", "held-out top-1 agreement"),
    ("accepted_length", "simulated accepted length"),
)


def draw_steps(axis: Axes, steps: list[dict[str, Any]], exits: list[str]) -> None:
    """Training loss of every exit, smoothed."""
    for exit_layer in exits:
        axis.plot([entry["step"] for entry in steps], smoothed([entry["loss"][exit_layer] for entry in steps]), label=f"exit {exit_layer}")
    axis.set(title="training loss (nats, smoothed)", xlabel="optimizer step")
    axis.legend()


def draw_reports(axis: Axes, reports: list[dict[str, Any]], exits: list[str], name: str, title: str) -> None:
    """One validation figure of every exit."""
    for exit_layer in exits:
        points = [(report["step"], report["validation"][exit_layer][name]) for report in reports if exit_layer in report["validation"]]
        axis.plot([step for step, _ in points], [value for _, value in points], marker="o", label=f"exit {exit_layer}")
    axis.set(title=title, xlabel="optimizer step")


def smoothed(values: list[float]) -> list[float]:
    """Exponential moving average that starts at the first value."""
    averages, average = [], values[0]
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        averages.append(average)
    return averages
