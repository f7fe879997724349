"""Published figures: each has a named source, and the table of docs/baselines.md holds exactly these."""

import json

from evaluation.published import PUBLISHED, published_table
from evaluation.questions import BENCHES

FOUND = json.loads(PUBLISHED.read_text(encoding="utf-8"))


def test_every_figure_has_a_source_and_is_an_accepted_length() -> None:
    assert {row["source"] for row in FOUND["rows"]} == FOUND["sources"].keys()
    assert all(about["name"] and about["where"] for about in FOUND["sources"].values())
    for row in FOUND["rows"]:
        assert set(row["accepted_length"]) <= set(BENCHES)
        assert all(1 < length < 10 for length in row["accepted_length"].values())
        if "mean" in row:
            assert abs(row["mean"] - sum(row["accepted_length"].values()) / len(BENCHES)) < 0.001


def test_the_table_of_the_docs_is_made_of_them() -> None:
    text = (PUBLISHED.parents[1] / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert published_table(FOUND) in text
