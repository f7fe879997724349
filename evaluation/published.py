"""What others have published: accepted lengths as a Markdown table (`python -m evaluation.published`), and the tables of the CATS paper.

The figures and where each stands lie in published.json beside this file; the table in docs/baselines.md is this command's output.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.acceptance_report import TITLES
from evaluation.metrics import ModelShape, paper_bytes_per_token
from evaluation.questions import BENCHES

PUBLISHED = Path(__file__).with_name("published.json")
LAYERS = 32
"""Of Vicuna-7B."""


def published() -> dict[str, Any]:
    """The whole file."""
    content: dict[str, Any] = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return content


def paper_rows(content: Mapping[str, Any], model: str, decoding: str) -> list[dict[str, Any]]:
    """The CATS paper's rows of its tables 1 and 2 on a model; `decoding` is "greedy" or "relaxed"."""
    return [row for row in content["rows"] if (row.get("model"), row.get("decoding")) == (model, decoding)]


def layer_units(row: Mapping[str, Any], layer_gb: float) -> float:
    """How many layers the printed bytes of a row of the paper's tables 4 and 5 are, by its own accepted length."""
    return float(row["gb_per_token"]) * float(row["accepted_length"]) / layer_gb


def recomputed_gb(row: Mapping[str, Any], layer_gb: float) -> float:
    """Bytes a token of such a row, in GB, by the paper's formula for the depth and the drafting passes that the row fits best."""
    shape = ModelShape(LAYERS, row["draft_exit"], row["draft_passes"], round(layer_gb * 1e9))
    return (paper_bytes_per_token(shape, row["accepted_length"]) or 0.0) / 1e9


def published_table(content: Mapping[str, Any]) -> str:
    """One row per method and source, best first within a source; then where the figures stand. Of CATS, the greedy rows of table 1."""
    lines = [["source", "method", *(TITLES[bench] for bench in BENCHES), "mean"]]
    for source, about in content["sources"].items():
        own = [row for row in content["rows"] if row["source"] == source]
        rows = paper_rows(content, "vicuna-7b", "greedy") if source == "cats" else own
        for row in sorted(rows, key=lambda row: -row["accepted_length"]["spec"]):
            lengths = [row["accepted_length"].get(bench) for bench in BENCHES] + [row.get("mean")]
            lines.append([about["name"], row["method"], *("-" if length is None else f"{length:.2f}" for length in lengths)])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    places = "; ".join(f"{about['name']}: {about['where']}" for about in content["sources"].values())
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body]) + f"\n\n{places}.\n"


if __name__ == "__main__":
    sys.stdout.write(published_table(published()))
