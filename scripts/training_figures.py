"""Result file, Markdown table and picture of the training comparison, from the files that its cells have written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from cats.errors import CatsError
from cats.files import write_atomically
from evaluation.timing import environment
from training.provenance import read_json, write_json

matplotlib.use("Agg")

Result = dict[str, Any]
METHODS = {"kangaroo": "Kangaroo", "cascade_chain": "CATS chain", "cascade_tree": "CATS tree"}
REFERENCE = "corpus.topk=20"
RESAMPLES = 2000
GRID_SETTINGS = {"topk"}


def write_results(root: Path, output: Path, facts: Result) -> None:
    """Write `output` (.json), and beside it the table (.md) and the picture (.png); no finished cell raises `CatsError`."""
    from matplotlib import pyplot

    cells = read_results(root / "cells")
    adapters = read_results(root / "adapters")
    if not cells and not adapters:
        raise CatsError(f"{root} holds no finished cell and no measured adapters; run the command without --merge first.")
    for result in (*cells, *adapters):
        result["summary"] = summary(result, reference_of(cells if result in cells else adapters))
    write_json(output, facts | {"cells": cells, "adapters": adapters, "environment": environment()})
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(report(cells, adapters, facts), encoding="utf-8"))
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4.2), constrained_layout=True)
    for axis, method in zip(axes, METHODS, strict=False):
        draw_grid(axis, cells, method)
    draw_adapters(axes[3], adapters)
    write_atomically(output.with_suffix(".png"), lambda part: figure.savefig(part, format="png", dpi=110))
    pyplot.close(figure)


def read_results(folder: Path) -> list[Result]:
    """All results of a folder: plain grid cells first."""
    found = [read_json(path, "scripts/compare_training.py") for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda result: (not in_grid(result), "run" in result.get("training", {}) and grid_place(result)))


def grid_place(result: Result) -> tuple[str, float]:
    """Order in the grid: targets, then the number of target tokens, the full loss last."""
    return result["targets"], result["training"]["run"]["topk"] or float("inf")


def in_grid(result: Result) -> bool:
    """Whether a cell differs from the others in targets and topk alone."""
    return {change.split("=")[0] for change in result.get("cell", "").split(".")[1:]} <= GRID_SETTINGS


def reference_of(results: Sequence[Result]) -> Result | None:
    """What the others are compared with: the cell of the corpus with k=20, or the adapters called `before`."""
    return next((result for result in results if result.get("cell") == REFERENCE or result.get("label") == "before"), None)


def summary(result: Result, reference: Result | None) -> Result:
    """Per pair of exits and method: accepted length, its standard error over prompts, and the ratio to the reference, prompts paired."""
    made: Result = {}
    for exits, methods in result["accepted"].items():
        made[exits] = {}
        for method in METHODS.keys() & methods.keys():
            own = methods[method]
            figures = {"accepted_length": own["accepted_length"], "standard_error": float(np.std(resampled(own)))}
            if reference is not None and reference is not result and exits in reference["accepted"]:
                base = reference["accepted"][exits][method]
                ratios = resampled(own) / resampled(base)
                figures["ratio"] = own["accepted_length"] / base["accepted_length"]
                figures["ratio_90_percent"] = [float(value) for value in np.quantile(ratios, (0.05, 0.95))]
            made[exits][method] = figures
    return made


def resampled(counts: Result) -> np.ndarray:
    """Accepted length over prompts drawn with replacement, the same draws for every result with as many prompts. Shape [RESAMPLES]."""
    tokens, passes = np.asarray(counts["tokens"]), np.asarray(counts["passes"])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(RESAMPLES, len(tokens)))
    return tokens[drawn].sum(1) / np.maximum(1, passes[drawn].sum(1))


def report(cells: Sequence[Result], adapters: Sequence[Result], facts: Result) -> str:
    """The Markdown file."""
    data, settings = facts["data"], facts["settings"]
    text = "# Targets and losses of adapter training\n\n"
    if cells:
        text += (
            f"{data['train_on']} prompts of {data['corpus']}, answers of at most {data['new_tokens']} tokens; {settings['steps']} steps of "
            f"{settings['rows']} rows unless the cell says otherwise, from the base's own attention. Validation: {data['validation']} "
            f"held-out prompts, loss = cross-entropy to the full target in nats, on the corpus's answers / on the model's own greedy "
            f"ones. Accepted length: {data['selection']} other held-out prompts, at most {settings['decode_tokens']} tokens each, greedy, "
            f"± standard error over prompts; ratio to {REFERENCE} with its 90% interval, prompts paired.\n\n" + table(cells, "cell") + "\n"
        )
    if adapters:
        text += (
            f"## Shipped adapters\n\nOn {data['test']} held-out prompts that no cell was chosen by (part `test`); ratio to `before`.\n\n"
            + table(adapters, "label")
        )
    return text


def table(results: Sequence[Result], name: str) -> str:
    """One row per result and pair of exits."""
    head = [name, "exits", "loss draft", "loss shallow", "top-1 draft", "top-1 shallow", *METHODS.values(), "CATS chain, ratio"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        for exits, methods in result["summary"].items():
            places = exits.removeprefix("exits ").split(", ")
            row = [result[name], ", ".join(places)]
            row += [over_kinds(result, place, figure) for figure in ("loss", "top1") for place in places]
            row += [length(methods[method]) if method in methods else "-" for method in METHODS]
            lines.append("| " + " | ".join([*row, ratio(methods["cascade_chain"])]) + " |")
    return "\n".join(lines) + "\n"


def over_kinds(result: Result, exit_layer: str, figure: str) -> str:
    """A validation figure on every kind of answer."""
    form = "{:.3f}" if figure == "loss" else "{:.1%}"
    return " / ".join(form.format(exits[exit_layer][figure]) for exits in result["validation"].values())


def length(figures: Result) -> str:
    """Accepted length with its standard error."""
    return f"{figures['accepted_length']:.3f} ± {figures['standard_error']:.3f}"


def ratio(figures: Result) -> str:
    """Ratio to the reference with its interval."""
    if "ratio" not in figures:
        return "-"
    low, high = figures["ratio_90_percent"]
    return f"{figures['ratio']:.3f} ({low:.3f} to {high:.3f})"


def draw_grid(axis: Axes, cells: Sequence[Result], method: str) -> None:
    """Accepted length of one method against the target tokens in the loss, one line per kind of target."""
    grid = [cell for cell in cells if in_grid(cell)]
    losses = sorted({grid_place(cell)[1] for cell in grid})
    for targets in dict.fromkeys(cell["targets"] for cell in grid):
        lines = [cell for cell in grid if cell["targets"] == targets]
        own = [(losses.index(grid_place(cell)[1]), next(iter(cell["summary"].values()))[method]) for cell in lines]
        errors = [figures["standard_error"] for _, figures in own]
        axis.errorbar([x for x, _ in own], [figures["accepted_length"] for _, figures in own], errors, marker="o", capsize=3, label=targets)
    axis.set_xticks(range(len(losses)), ["full" if loss == float("inf") else f"{loss:g}" for loss in losses])
    axis.set(title=METHODS[method], xlabel="target tokens in the loss, k", ylabel="accepted length (± s.e. over prompts)")
    if grid:
        axis.legend(title="answers")


def draw_adapters(axis: Axes, adapters: Sequence[Result]) -> None:
    """Accepted length of the measured adapters, one group of bars per method, at the first pair of exits."""
    for place, result in enumerate(adapters):
        figures = next(iter(result["summary"].values()))
        heights = [figures[method]["accepted_length"] for method in METHODS]
        x = np.arange(len(METHODS)) + place * 0.8 / len(adapters)
        axis.bar(x, heights, 0.75 / len(adapters), yerr=[figures[method]["standard_error"] for method in METHODS], label=result["label"])
    axis.set_xticks(np.arange(len(METHODS)) + 0.2, list(METHODS.values()))
    axis.set(title="shipped adapters, other prompts", ylabel="accepted length")
    if adapters:
        axis.legend()
