"""Accepted lengths that others have published, as a Markdown table: `python -m evaluation.published`.

The figures and where each stands lie in published.json beside this file; the table in docs/baselines.md is this command's output.
"""

import json
import sys
from pathlib import Path
from typing import Any

from evaluation.acceptance_report import TITLES
from evaluation.questions import BENCHES

PUBLISHED = Path(__file__).with_name("published.json")


def published_table(found: dict[str, Any]) -> str:
    """One row per method and source, best first within a source; then where the figures stand."""
    lines = [["source", "method", *(TITLES[bench] for bench in BENCHES), "mean"]]
    for source, about in found["sources"].items():
        rows = [row for row in found["rows"] if row["source"] == source]
        for row in sorted(rows, key=lambda row: -row["accepted_length"]["spec"]):
            lengths = [row["accepted_length"].get(bench) for bench in BENCHES] + [row.get("mean")]
            lines.append([about["name"], row["method"], *("-" if length is None else f"{length:.2f}" for length in lengths)])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    places = "; ".join(f"{about['name']}: {about['where']}" for about in found["sources"].values())
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body]) + f"\n\n{places}.\n"


if __name__ == "__main__":
    sys.stdout.write(published_table(json.loads(PUBLISHED.read_text(encoding="utf-8"))))
