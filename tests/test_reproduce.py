"""`python -m evaluation.reproduce` on the small test model: what each name makes, interrupted runs, refusals; every name has a script."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cats import CatsError
from evaluation import cycles, eval, paper_tables, quantities, reproduce
from evaluation.cycles import TOLERANCE, Place, planned_bytes
from evaluation.memory_parts import measured
from evaluation.quantities import known_adapters, variant
from evaluation.record_file import read_records
from evaluation.reproduce import EXPERIMENTS, main, scaled_budgets
from evaluation.sheets import Sheet

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"
ADAPTERS = TINY / "adapters"
SMALL = ["--quick", "--model-path", str(TINY), "--adapters", str(ADAPTERS), "--questions", "1", "--max-new-tokens", "5", "--device", "cpu"]
FEW = ["--methods", "kangaroo", "cascade_chain"]


def run(output: Path, *more: str) -> Path:
    """The command, in process."""
    main([*more, *SMALL, "--output", str(output)])
    return output


def table(folder: Path, name: str, place: int = 0) -> list[dict[str, str]]:
    """The rows of a table of an experiment, by column."""
    sheet = json.loads((folder / f"{name}.json").read_text())["tables"][place]
    return [dict(zip(sheet["head"], row, strict=True)) for row in sheet["rows"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of speed, and figures 1 and 3."""
    return run(tmp_path_factory.mktemp("reproduced"), "table1", "table3", "table4", "figure1", "figure2", "figure3", *FEW)


def test_every_name_has_its_files(made: Path) -> None:
    for name in ("table1", "table3", "table4", "figure1", "figure2", "figure3"):
        about = json.loads((made / f"{name}.json").read_text())
        assert about["quick"]
        assert {"cpu", "torch", "commit", "command"} <= about["environment"].keys()
        assert about["wires"][0]["bytes_per_second"] > 0
        assert "(quick: a trial, no result)" in (made / f"{name}.md").read_text()
        assert r"\toprule" in (made / f"{name}.tex").read_text()
    assert all((made / f"figure{number}.{suffix}").stat().st_size > 5000 for number in (1, 2, 3) for suffix in ("png", "pdf"))


def test_table_1_has_ours_beside_the_papers(made: Path) -> None:
    rows = {row["method"]: row for row in table(made, "table1")}
    assert list(rows) == ["plain decoding", "Kangaroo", "CATS chain"]
    assert rows["plain decoding"]["mean"] == "1.00"
    assert rows["CATS chain"]["MT-bench"].endswith("(3.05)")
    assert rows["CATS chain"]["mean"].endswith("(3.06)")
    assert {row["same text as plain"] for row in rows.values()} == {"5 of 5"}
    speeds = {row["method"]: row for row in table(made, "table1", 1)}
    assert speeds["plain decoding"]["speed-up, this disk"] == "1.00 [1.00, 1.00]"
    assert speeds["Kangaroo"]["paper, Orin"] == "1.92"
    assert [row["paper"] for row in table(made, "table1", 4)] == ["CATS chain", "Kangaroo"]


def test_what_does_not_fit_is_a_line_of_the_table(made: Path) -> None:
    rows = table(made, "table3")
    fits = {(row["budget of weights"], row["method"].partition(",")[0]): row["accepted length"] != "does not fit" for row in rows}
    assert list(fits.values()) == [True, False, False, True, True, True, True, True, True]
    assert [row["method"] for row in rows if row["method"].startswith("CATS,")] == ["CATS, exit 2/4", "CATS, exit 2/6"]
    assert rows[-1]["paper: accepted, tokens/s"] == "3.05, 0.461"


def test_bytes_are_counted_beside_the_formulas(made: Path) -> None:
    rows = {(row["method"], row["pinned"]): row for row in table(made, "table4")}
    assert set(rows) == {
        (name, pinned) for name in ("Baseline", "Kangaroo, exit 2", "Kangaroo, exit 4", "CATS, exit 2/4") for pinned in ("yes", "no")
    }
    plain = {pinned: float(rows["Baseline", pinned]["streamed/token"].removesuffix(" MB")) for pinned in ("yes", "no")}
    assert plain["yes"] < 0.6 * plain["no"]
    assert plain["no"] == pytest.approx(float(rows["Baseline", "no"]["by the paper's formula"].removesuffix(" MB")), rel=0.05)
    printed = {row["method"]: row["layers that the printed bytes are"] for row in table(made, "table4", 1)}
    assert printed["Kangaroo, d=4"] == "51.6, no whole number"
    assert printed["Kangaroo, d=10"] == "81.7, no whole number"
    assert printed["CATS, d=3, s=15"] == "44.0"


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked, work = [], eval.ask

    def dying(contender: Any, *rest: Any) -> Any:
        asked.append(contender.model_id)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return work(contender, *rest)

    monkeypatch.setattr(eval, "ask", dying)
    with pytest.raises(SystemExit):
        run(tmp_path, "figure1", "--turns", "2", "--threads", "1", *FEW)
    run(tmp_path, "figure1", "--turns", "2", "--threads", "1", *FEW)
    assert len(asked) == 3 * 2 + 1
    run(tmp_path, "figure1", "--turns", "2", "--threads", "1", *FEW)
    assert len(asked) == 3 * 2 + 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "figure1", "--turns", "2", "--threads", "2", *FEW)
    assert ended.value.code == 2
    assert "was begun with threads 1, now it is 2" in capsys.readouterr().err


def test_bytes_that_disagree_end_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cycles, "planned_bytes", lambda source, nodes: (1 + 1.5 * TOLERANCE) * planned_bytes(source, nodes))
    with pytest.raises(SystemExit):
        run(tmp_path, "figure1", *FEW)
    assert "streamed" in capsys.readouterr().err
    assert not (tmp_path / "figure1.json").exists()


def test_memory_and_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantities, "in_child", measured)
    run(tmp_path, "memory", "--budgets", "3MB", "7MB", "--contexts", "48")
    records = {(record["method"], record["budget"]): record for record in read_records(tmp_path / "memory.records.jsonl")}
    assert "refused" in records.pop(("cascade_tree", 3_000_000))
    for (method, budget), record in records.items():
        weights = {name: record["formula_parts"].get(name) for name in ("lm_head", "ring", "adapters")}
        assert weights == {name: record["ledger_parts"].get(name) for name in weights}
        assert sum(record["ledger_parts"].values()) == record["ledger"]
        assert (record["tree"] > 0) == (method == "cascade_tree")
        assert (record["streamed"] > 0) == (budget is not None)
    rows = table(tmp_path, "memory", 6)
    assert [row["weights"] for row in rows] == ["in memory", "in memory", "7 MB, this disk", "7 MB, this disk"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("memory.png", "memory.pdf", "memory_context.png", "memory_context.pdf"))


def test_steps_ablations_and_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("cascade_chain", "cascade_tree:verifier=none")
    for module, name, value in (
        *((module, "TREE_VARIANTS", few) for module in (reproduce, paper_tables)),
        *((paper_tables, "DRAFTING_STEPS", (5, 7)), (reproduce, "CONTRASTED", few[:1])),
    ):
        monkeypatch.setattr(module, name, value)
    run(tmp_path, "table5", "ablations", "figure5")
    rows = table(tmp_path, "table5")
    assert len(rows) == 12
    assert all(abs(float(row["difference"])) <= 0.0002 for row in rows)
    assert [row["steps"] for row in rows if row["accepted length"] != "-"] == ["5"] * 3 + ["7"] * 3
    assert "CATS tree, 40 nodes, verifier none" in {row["method"] for row in table(tmp_path, "ablations")}
    assert {row["exits"] for row in table(tmp_path, "ablations")} == {"2/4", "2/6", "2/8"}
    places = {row["place"].partition(", ")[2] for row in table(tmp_path, "ablations", 1)}
    assert places == {"this disk", "this disk, ring of 1", "this disk, not pinned"}
    assert (tmp_path / "figure5.png").stat().st_size > 5000


@pytest.mark.slow
def test_the_script_makes_everything_of_the_test_model(tmp_path: Path) -> None:
    """What `--quick` is for: the whole of it, every method, one command."""
    command = [sys.executable, "-m", "evaluation.reproduce", "all", "--quick"]
    given = ["--model-path", str(TINY), "--adapters", str(ADAPTERS), "--output", str(tmp_path)]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all((tmp_path / f"{name}.{suffix}").stat().st_size > 0 for name in EXPERIMENTS for suffix in ("md", "tex", "json"))
    assert len([row for row in table(tmp_path, "table1") if row["same text as plain"] == "5 of 5"]) == 8


def test_the_table_of_larger_models_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --model-path it is the default model, which is the test model where nothing can be fetched."""
    monkeypatch.chdir(ROOT)
    main(["table2", "--output", str(tmp_path)])
    assert "give --model-path with" in capsys.readouterr().err
    sheets = json.loads((tmp_path / "table2.json").read_text())["tables"]
    assert [len(sheet["rows"]) for sheet in sheets] == [6] * 6


@pytest.mark.parametrize("name", [*EXPERIMENTS, "all"])
def test_every_table_and_figure_has_a_script_of_three_lines(name: str) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.sh")}
    found = [text for text in texts.values() if re.search(rf"^python -m evaluation\.reproduce {name} \"\$@\"$", text, re.MULTILINE)]
    if name in ("memory", "ablations"):
        assert not found
        return
    (text,) = found
    assert len([line for line in text.splitlines() if not line.startswith("#")]) == 3


def test_budgets_of_the_papers_model_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"lm_head.weight": SimpleNamespace(nbytes=262_144_000)}
    places |= {f"model.layers.{layer}.mlp": SimpleNamespace(nbytes=404_766_720) for layer in range(32)}
    monkeypatch.setattr(reproduce, "locate_tensors", lambda _: places)
    assert [round(nbytes / 1e9, 3) for nbytes in scaled_budgets(Path("vicuna"), 134_234_112)] == [2.0, 6.0, 8.0]


def flags(**given: Any) -> SimpleNamespace:
    """The flags of places that were given."""
    names = ("adapters", "draft_adapter_path", "draft_layer", "shallow_adapter_path", "shallow_layer")
    return SimpleNamespace(**dict.fromkeys(names) | given)


def test_which_adapters_are_meant() -> None:
    lookup: Callable[..., Any] = known_adapters
    found, exits = lookup(flags(adapters=ADAPTERS), {})
    assert list(found) == [2, 4, 6, 8]
    assert exits == (2, 4)
    assert lookup(flags(adapters=ADAPTERS, shallow_layer=8), {})[1] == (2, 8)
    paths = {"draft_adapter_path": str(ADAPTERS / "draft_exit2"), "shallow_adapter_path": str(ADAPTERS / "shallow_exit6")}
    assert lookup(flags(**paths), {})[1] == (2, 6)
    assert lookup(flags(), {}) == ({}, None)
    for given, said in (
        ({"draft_adapter_path": paths["draft_adapter_path"]}, "give both"),
        ({"draft_adapter_path": paths["shallow_adapter_path"], "shallow_adapter_path": paths["draft_adapter_path"]}, "6 is not before"),
        ({"adapters": ADAPTERS, "shallow_layer": 5}, "no shallow adapter of exit 5"),
    ):
        with pytest.raises(CatsError, match=said):
            lookup(flags(**given), {})


def test_labels_and_sheets() -> None:
    assert variant("cascade_chain", steps=5) == "cascade_chain"
    assert variant("cascade_chain", steps=7) == "cascade_chain:steps=7"
    sheet = Sheet("A & B", ["method", "share"], [["x_y", "5 %"]], "± 1")
    assert "| x_y | 5 % |" in sheet.markdown()
    assert r"x\_y & 5 \% \\" in sheet.latex()
    assert r"\caption{A \& B. $\pm$ 1}" in sheet.latex()
    assert Place(10**6, 5e6, False, 1).label == "1 MB, emulated 5.00 MB/s, ring of 1, not pinned"
