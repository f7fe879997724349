"""The table of methods by benches: cells are kept, taken up again, filled by several commands, and merged without a model."""

import json
from pathlib import Path

import pytest

from evaluation import acceptance_table
from evaluation.record_file import read_records
from tests.tiny_models import TinyModel


def fill(tiny: TinyModel, output: Path, *more: str) -> None:
    adapters = ["--draft-adapter-path", str(tiny.draft), "--shallow-adapter-path", str(tiny.shallow)]
    common = ["--model-path", str(tiny.base), *adapters, "--device", "cpu", "--dtype", "float32", "--questions", "2"]
    methods = ["--methods", "autoregressive", "cascade_chain", "cascade_chain:sv_passes=2"]
    acceptance_table.main([*common, "--max-new-tokens", "8", *methods, "--output", str(output), *more])


def test_two_commands_fill_one_table(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "table.json"
    fill(speaking, output, "--benches", "mt_bench")
    cells = {path: path.read_bytes() for path in (tmp_path / "table.cells").iterdir()}
    fill(speaking, output, "--benches", "alpacaeval", "mtbench")
    assert all(path.read_bytes() == content for path, content in cells.items())
    result = json.loads(output.read_text())
    assert len(result["cells"]) == 6
    assert all(cell["summary"]["identical_to_plain"] == 2 for cell in result["cells"])
    assert all(sum(cell["summary"]["committed_counts"].values()) == cell["summary"]["steps"] for cell in result["cells"])
    shown = output.with_suffix(".md").read_text()
    assert "| method | mtbench | alpacaeval | mean |" in shown
    rows = [row for row in shown.splitlines() if row.startswith(("| autoregressive ", "| cascade_chain"))]
    assert rows[0].startswith("| autoregressive | 1.000 | 1.000 | 1.000 |")
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| cascade_chain", "| cascade_chain:sv_passes=2"]
    assert all(row.endswith("| 4 of 4 |") for row in rows)
    capsys.readouterr()
    acceptance_table.main(["--merge", "--output", str(output)])
    assert capsys.readouterr().out.splitlines()[2:] == rows


def test_an_incomplete_cell_stays_out_until_it_is_filled(tmp_path: Path, speaking: TinyModel) -> None:
    output = tmp_path / "table.json"
    fill(speaking, output, "--benches", "mtbench")
    cell = tmp_path / "table.cells" / "mtbench.cascade_chain.jsonl"
    whole = read_records(cell)
    cell.write_bytes(cell.read_bytes()[:-50])
    acceptance_table.main(["--merge", "--output", str(output)])
    assert len(json.loads(output.read_text())["cells"]) == 2
    fill(speaking, output, "--benches", "mtbench")
    assert len(json.loads(output.read_text())["cells"]) == 3
    assert read_records(cell)[0] == whole[0]


def test_what_is_missing_is_said(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "table.json"
    for flags, complaint in ((["--merge"], "holds no complete cell"), ([], "give --model-path and --methods")):
        with pytest.raises(SystemExit) as ended:
            acceptance_table.main([*flags, "--output", str(output)])
        assert ended.value.code == 2
        assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--memory-budget", "1GB"], "memory.budget_bytes None, now it is 1000000000"),
        (["--no-pinning"], "memory.pinning"),
        (["--dtype", "float64"], "dtype 'float32', now it is 'float64'"),
    ],
)
def test_a_cell_is_not_gone_on_with_under_other_options(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    output = tmp_path / "table.json"
    fill(speaking, output, "--benches", "mtbench")
    with pytest.raises(SystemExit) as ended:
        fill(speaking, output, "--benches", "mtbench", *change)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_cells_of_other_options_do_not_meet_in_one_table(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "table.json"
    fill(speaking, output, "--benches", "mtbench")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        fill(speaking, output, "--benches", "alpacaeval", "--no-pinning")
    assert ended.value.code == 2
    assert "the cell of autoregressive on alpacaeval does not fit in" in capsys.readouterr().err
