"""The cells of an acceptance table as rows and as Markdown. Reads answer files and settings; knows no model.

A cell is one method with its adapters on one bench. A row is one method with its adapters: the accepted length by bench with the
interval in which it lies, then what the method costs, as means over benches.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats import CatsError
from cats.methods import PRESETS
from cats.records import check_agreement
from evaluation.metrics import (
    ModelShape,
    committed_and_passes,
    identical_answers,
    mean,
    ratio_interval,
    summarise,
)
from evaluation.presets import title_of
from evaluation.questions import BENCHES
from evaluation.record_file import Record, read_records

PLAIN = "autoregressive"
TITLES = {"mtbench": "MT-bench", "alpacaeval": "AlpacaEval", "gsm8k": "GSM8K", "humaneval": "HumanEval", "spec": "Spec-Bench"}
SHARED = ("model", "dtype", "compute_dtype", "device", "template", "max_new_tokens", "temperature", "seed", "memory")
"""Settings that all cells of a table have in common."""
MEANS = (
    "repeated_4gram_share",
    "layer_passes_per_token",
    "layer_passes_per_token_formula",
    "layer_bytes_per_token",
    "tokens_per_second",
)
CellKey = tuple[str, str, str]
"""Bench, label and exits."""


def exits_of(settings: dict[str, Any]) -> str:
    """The exits of a cell's adapters, like "3/15"; empty where it has none."""
    adapters = settings["adapters"]
    return "/".join(str(adapters[role]["exit_layer"]) for role in ("draft", "shallow") if role in adapters)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Every complete cell of a folder: its settings, environment and summary; identical_to_plain where plain decoding was a method."""
    complete: dict[CellKey, tuple[dict[str, Any], list[Record]]] = {}
    for path in sorted(folder.glob("*.settings.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        settings = about["settings"]
        records = read_records(path.with_name(path.name.removesuffix(".settings.json") + ".jsonl"))
        if {record["question_id"] for record in records} == set(settings["question_ids"]):
            complete[settings["bench"], settings["label"], exits_of(settings)] = (about, records)
    cells = []
    for (bench, _, _), (about, records) in sorted(complete.items(), key=lambda item: cell_order(item[0])):
        summary = summarise(records, ModelShape(**about["shape"]))
        del summary["committed_per_step"]
        summary["committed_and_passes"] = committed_and_passes(records)
        summary["accepted_length_interval"] = ratio_interval([summary["committed_and_passes"]])
        if (bench, PLAIN, "") in complete:
            summary["identical_to_plain"] = identical_answers(records, complete[bench, PLAIN, ""][1])
        cells.append({**about, "summary": summary})
    return cells


def cell_order(key: CellKey) -> tuple[int, int, str, list[int]]:
    """Benches and methods in their usual order, then exits by depth."""
    bench, label, exits = key
    depths = [int(exit_layer) for exit_layer in exits.split("/") if exit_layer]
    return BENCHES.index(bench), list(PRESETS).index(label.partition(":")[0]), label, depths


def check_alike(cells: Sequence[dict[str, Any]], folder: Path) -> None:
    """Raise `CatsError` where cells that would stand in one table were answered by other weights, or under other options."""
    shared: dict[str, Any] = {}
    for cell in cells:
        settings = cell["settings"]
        own = {name: settings.get(name) for name in SHARED} | {f"questions of {settings['bench']}": settings["question_ids"]}
        own |= {f"{role} adapter of exit {adapter['exit_layer']}": adapter for role, adapter in settings["adapters"].items()}
        known = {name: shared.setdefault(name, value) for name, value in own.items()}
        place = f"the cell of {settings['label']} on {settings['bench']}"
        advice = f"{place} does not fit in; remove it from {folder} or choose another --output."
        check_agreement("the table", known, own, advice)


def rows_of(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method and exits, in the order of the cells."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        grouped.setdefault((cell["settings"]["label"], exits_of(cell["settings"])), []).append(cell)
    order = sorted(grouped, key=lambda key: cell_order((BENCHES[0], *key)))
    return [row_of(label, exits, grouped[label, exits]) for label, exits in order]


def row_of(label: str, exits: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method over the benches that it has a cell of; intervals are of 90 %, by bootstrap over questions."""
    summaries = {cell["settings"]["bench"]: cell["summary"] for cell in cells}
    known = [summary for summary in summaries.values() if "identical_to_plain" in summary]
    return {
        "method": label,
        "title": title_of(label),
        "exits": exits,
        "accepted_length": {bench: summary["accepted_length"] for bench, summary in summaries.items()},
        "accepted_length_interval": {bench: summary["accepted_length_interval"] for bench, summary in summaries.items()},
        "mean": _mean_of([summary["accepted_length"] for summary in summaries.values()]),
        "mean_interval": ratio_interval([summary["committed_and_passes"] for summary in summaries.values()]),
        **{name: _mean_of([summary[name] for summary in summaries.values()]) for name in MEANS},
        "extra_bytes": extra_bytes(cells[0]),
        "identical_to_plain": sum(summary["identical_to_plain"] for summary in known) if known else None,
        "compared_to_plain": sum(summary["questions"] for summary in known),
    }


def extra_bytes(cell: dict[str, Any]) -> int:
    """Resident bytes of the method beside the base."""
    return sum(cell["extra_resident_bytes"].values())


def how_chosen(settings: dict[str, Any]) -> str:
    """How tokens were chosen, in words."""
    if not settings.get("temperature"):
        return "Greedy"
    return f"Sampled at temperature {settings['temperature']:g}, seed {settings['seed']} (a question has one seed for all methods)"


def _mean_of(values: Sequence[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def markdown(cells: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> str:
    """The whole file."""
    settings, about = cells[0]["settings"], cells[0]["environment"]
    counts = sorted({len(cell["settings"]["question_ids"]) for cell in cells})
    sets = sorted({cell["settings"]["source"].strip("()").partition(";")[0] for cell in cells})
    arithmetic = cells[0]["arithmetic"]
    heading = f", temperature {settings['temperature']:g}, seed {settings['seed']}" if settings.get("temperature") else ""
    return (
        f"# Accepted length of {settings['model']['name']}{heading}\n\n"
        "Tokens per pass of the whole model, its own next token included and the prompt's pass left out, so plain decoding has exactly 1. "
        f"{how_chosen(settings)}, at most {settings['max_new_tokens']} tokens an answer; "
        f"{' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))} "
        f"questions of each bench, evenly spread over it ({', '.join(sets)}). Weights in {arithmetic['weights']}, computed in "
        f"{arithmetic['computed']}. ± is half of the 90 % interval by bootstrap over questions; its bounds stand in the JSON file.\n\n"
        f"{lengths_table(rows)}\n"
        "## What it costs\n\n"
        "Means over the benches. Layer passes: executions of a decoder layer per committed token, counted, and by the formula "
        "n*d + (L - d) a cycle, which leaves corrections out. Layer bytes: weights of decoder layers read per committed token, every "
        "layer pass counted with the bytes of the form that it ran, streamed or not; head and adapters are left out, as in the paper's "
        "bytes per token. Extra bytes: all that the method keeps resident beside the base: adapters and heads as stored, a datastore, "
        "a copy of the layers that was made for it. Repeated 4-grams: the share of the text's that occurred before in the same answer; "
        "loops make drafting easy.\n\n"
        f"{costs_table(rows)}\n"
        f"Made on {about['cpu']}, {about['threads']} thread(s), one cell after the other, so their seconds are no comparison of methods: "
        "speed is accepted length over the time of a cycle, which is measured apart, methods in turns.\n"
    )


def lengths_table(rows: Sequence[dict[str, Any]]) -> str:
    """Accepted length by bench, and its mean over them."""
    benches = [bench for bench in BENCHES if any(bench in row["accepted_length"] for row in rows)]
    lines = [["method", "exits", *(TITLES[bench] for bench in benches), "mean"]]
    for row in rows:
        lengths = [with_interval(row["accepted_length"].get(bench), row["accepted_length_interval"].get(bench)) for bench in benches]
        lines.append([row["title"], row["exits"] or "-", *lengths, with_interval(row["mean"], row["mean_interval"])])
    return _table(lines)


def costs_table(rows: Sequence[dict[str, Any]]) -> str:
    """What stands beside the accepted length."""
    figures = ["layer passes/token", "by the formula", "layer bytes/token", "extra bytes", "repeated 4-grams", "identical to plain"]
    lines = [["method", "exits", *figures]]
    for row in rows:
        passes = [_figure(row[name], "{:.2f}") for name in ("layer_passes_per_token", "layer_passes_per_token_formula")]
        read, extra = (_megabytes(row[name]) for name in ("layer_bytes_per_token", "extra_bytes"))
        identical = "-" if row["identical_to_plain"] is None else f"{row['identical_to_plain']} of {row['compared_to_plain']}"
        lines.append([row["title"], row["exits"] or "-", *passes, read, extra, _figure(row["repeated_4gram_share"], "{:.1%}"), identical])
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---|" + "---|" * (len(lines[0]) - 1), *rows]) + "\n"


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """A figure and half of its interval."""
    if value is None or interval is None:
        return _figure(value, "{:.2f}")
    half = (interval[1] - interval[0]) / 2
    return f"{value:.2f} ± {half:.2f}" if half else f"{value:.2f}"


def _megabytes(nbytes: float | None) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes else "-"


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def built(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """The complete cells of a folder, their rows, and the Markdown; no complete cell, or cells that do not fit together: `CatsError`."""
    cells = read_cells(folder)
    if not cells:
        raise CatsError(f"{folder} holds no complete cell; run the command without --merge first.")
    check_alike(cells, folder)
    rows = rows_of(cells)
    return cells, rows, markdown(cells, rows)
