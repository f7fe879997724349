"""Tables 3 and 4: budgets scaled as the paper's, rows in the paper's order, and bytes that are checked against the plan."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cats import AutoregressiveConfig, CatsError
from evaluation import tables
from evaluation.chosen_model import exit_of
from evaluation.tables import TOLERANCE, Row, main, planned_bytes, rendered, scaled_budgets
from scripts.make_synthetic_checkpoint import base_config, make_checkpoint
from tests.test_synthetic_checkpoint import CONFIG

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"
DRAFT, SHALLOWS = TINY / "adapters" / "draft_exit2", [TINY / "adapters" / "shallow_exit6", TINY / "adapters" / "shallow_exit8"]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose matrices are large enough for pages around them not to matter."""
    folder = tmp_path_factory.mktemp("tables")
    sizes = CONFIG | {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(sizes))
    make_checkpoint(base_config(folder / "config.json", None), torch.float32, [1, 3], folder / "model")
    return folder / "model"


def run(table: str, model: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """The rows of a small table."""
    adapters = f"--draft-adapter-path {model}/adapters/exit1 --shallow-adapter-paths {model}/adapters/exit3"
    flags = f"{table} --model-path {model} {adapters} --questions 1 --max-new-tokens 10 --output {output} --template tokenizer"
    main([*flags.split(), *more])
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return rows


def test_budgets_of_the_papers_model_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"lm_head.weight": SimpleNamespace(nbytes=262_144_000)}
    places |= {f"model.layers.{layer}.mlp": SimpleNamespace(nbytes=404_766_720) for layer in range(32)}
    monkeypatch.setattr(tables, "locate_tensors", lambda _: places)
    budgets = scaled_budgets(Path("vicuna"), 134_234_112)
    assert [(round(nbytes / 1e9, 3), paper) for nbytes, paper in budgets] == [(2.0, 2), (6.0, 6), (8.0, 8)]


def test_rows_follow_the_paper() -> None:
    rows = list(tables.rows_of_memory_budget([(1, 2), (2, 6), (3, 8), (4, 0)], DRAFT, SHALLOWS))
    assert [(row.budget_bytes, row.name, row.pinning) for row in rows[:6]] == [
        (1, name, pinning) for pinning in (True, False) for name in ("Baseline", "Kangaroo", "CATS")
    ]
    assert [exit_of(adapters["shallow"][0]) for _, adapters in rows[2].choices] == [8, 6]
    assert rows[14].paper == "3.05, 0.461"
    assert rows[-1].paper == "-"
    rows = list(tables.rows_of_bytes_per_token([(1, 2), (3, 8)], DRAFT, SHALLOWS))
    assert [(row.name, row.paper) for row in rows[:5]] == [
        ("Baseline", "12.95"),
        ("Kangaroo", "8.37 (d=3)"),
        ("Kangaroo", "8.67 (d=4)"),
        ("Kangaroo", "11.1 (d=10)"),
        ("CATS", "5.84 (d=3, s=15)"),
    ]
    assert {row.budget_bytes for row in rows} == {3}


def test_counted_bytes_are_those_of_the_plan(synthetic: Path, tmp_path: Path) -> None:
    rows = run("bytes-per-token", synthetic, tmp_path / "table4.json", "--ring-buffers", "1")
    assert {row["method"] for row in rows} == {"Baseline", "Kangaroo", "CATS"}
    measured = [row for row in rows if "refused" not in row]
    assert len(measured) >= 6
    for row in measured:
        assert row["bytes_per_token"] == pytest.approx(row["planned_bytes_per_token"], rel=TOLERANCE)
    plain = {row["pinning"]: row for row in measured if row["method"] == "Baseline"}
    assert plain[True]["bytes_per_token"] < plain[False]["bytes_per_token"]
    assert plain[False]["bytes_per_token"] == pytest.approx(plain[False]["paper_bytes_per_token"], rel=0.05)
    text = (tmp_path / "table4.md").read_text()
    assert "12.95" in text
    assert "weights only" in text


def test_what_does_not_fit_is_a_line_of_the_table(synthetic: Path, tmp_path: Path) -> None:
    rows = run("memory-budget", synthetic, tmp_path / "table3.json", "--budgets", "3.5MB", "--ring-buffers", "1")
    refused = {row["method"] for row in rows if "refused" in row}
    assert refused == {"CATS"}
    assert "does not fit" in (tmp_path / "table3.md").read_text()


def test_bytes_that_disagree_end_the_command(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "planned_bytes", lambda source, nodes: 1.03 * planned_bytes(source, nodes))
    with pytest.raises(SystemExit):
        run("bytes-per-token", synthetic, tmp_path / "table4.json")
    assert not (tmp_path / "table4.json").exists()


def test_a_row_that_was_refused_keeps_its_columns() -> None:
    row = Row(10, "CATS", True, ((AutoregressiveConfig(), {}),), "5.84")
    lines = rendered([(row, {"refused": "it needs 20 bytes (all of them); raise it.", "exits": {"draft": 2}})], "paper").splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_a_shallow_exit_that_is_not_behind_the_drafts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"bytes-per-token --model-path {TINY} --draft-adapter-path {SHALLOWS[0]} --shallow-adapter-paths {SHALLOWS[1]} {DRAFT}"
    with pytest.raises(SystemExit) as stopped:
        main([*flags.split(), "--output", str(tmp_path / "table4.json")])
    assert stopped.value.code == 2
    assert "the exit 2 of" in capsys.readouterr().err


def test_of_a_folder_of_adapters_the_first_exit_drafts() -> None:
    args = tables.parse(f"bytes-per-token --model-path {TINY} --adapters {TINY / 'adapters'} --output x.json".split())
    _, directory, draft, shallows = tables.chosen_places(args)
    assert directory == TINY
    assert exit_of(draft) == 2
    assert [exit_of(shallow) for shallow in shallows] == [4, 6, 8]


def test_an_adapter_that_does_not_say_its_exit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CatsError, match="does not say the exit"):
        exit_of(tmp_path)
