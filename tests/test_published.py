"""Published figures: each has a source, docs/baselines.md holds exactly these, and the paper's bytes are its formula's."""

import pytest

from evaluation.published import PUBLISHED, layer_units, paper_rows, published, published_table, recomputed_gb
from evaluation.questions import BENCHES

FOUND = published()
LAYER_GB = FOUND["sources"]["cats"]["layer_gb"]
BYTES = {row["method"]: row for row in FOUND["bytes_per_token"]["rows"]}


def test_every_figure_has_a_source_and_is_an_accepted_length() -> None:
    assert {row["source"] for row in FOUND["rows"]} == FOUND["sources"].keys()
    assert all(about["name"] and about["where"] for about in FOUND["sources"].values())
    for row in FOUND["rows"]:
        assert set(row["accepted_length"]) <= set(BENCHES)
        assert all(1 < length < 10 for length in row["accepted_length"].values())
        for name, mean in (("accepted_length", "mean"), ("speed_up", "mean_speed_up")):
            if mean in row:
                assert row[mean] == pytest.approx(sum(row[name].values()) / len(BENCHES), abs=0.012 if name == "speed_up" else 0.003)


def test_tables_1_and_2_are_whole() -> None:
    models = {row["model"] for row in FOUND["rows"] if row["source"] == "cats"}
    counts = {(model, how): len(paper_rows(FOUND, model, how)) for model in models for how in ("greedy", "relaxed")}
    assert counts.pop(("vicuna-7b", "greedy")) == 8
    assert counts.pop(("vicuna-7b", "relaxed")) == 7
    assert len(counts) == 6
    assert set(counts.values()) == {6}


def test_the_table_of_the_docs_is_made_of_them() -> None:
    text = (PUBLISHED.parents[1] / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert published_table(FOUND) in text


@pytest.mark.parametrize("row", FOUND["drafting_steps"]["rows"], ids=lambda row: f"{row['method']}, {row['steps']}")
def test_table_5_is_the_formula(row: dict[str, float]) -> None:
    assert recomputed_gb(row, LAYER_GB) == pytest.approx(row["gb_per_token"], abs=0.0002)
    assert layer_units(row, LAYER_GB) == pytest.approx(round(layer_units(row, LAYER_GB)), abs=0.003)


@pytest.mark.parametrize("method", ["Baseline", "CATS, d=3, s=15"])
def test_table_4_is_the_formula_to_the_printed_digit(method: str) -> None:
    assert round(recomputed_gb(BYTES[method], LAYER_GB), 2) == BYTES[method]["gb_per_token"]


@pytest.mark.parametrize(("method", "printed", "whole"), [("Kangaroo, d=4", 51.6, 52), ("Kangaroo, d=10", 81.7, 82)])
def test_two_rows_of_table_4_are_no_whole_number_of_layers(method: str, printed: float, whole: int) -> None:
    row = BYTES[method]
    assert round(layer_units(row, LAYER_GB), 1) == printed
    assert recomputed_gb(row, LAYER_GB) * row["accepted_length"] / LAYER_GB == pytest.approx(whole)
