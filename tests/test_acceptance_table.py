"""The table of methods by benches: cells are kept, taken up again, filled by several commands, and merged without a model."""

import json
from pathlib import Path

import pytest

from cats.adapter import AdapterModel
from cats.datastore import Datastore
from evaluation import acceptance_table
from evaluation.record_file import read_records
from evaluation.subject import stored_bytes
from tests.datastores import store_of
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
    for summary in (cell["summary"] for cell in result["cells"]):
        assert summary["identical_to_plain"] == 2
        counts = summary["committed_and_passes"]
        assert sum(passes for _, passes in counts) == summary["steps"]
        low, high = summary["accepted_length_interval"]
        assert low <= summary["accepted_length"] == sum(tokens for tokens, _ in counts) / summary["steps"] <= high
    shown = output.with_suffix(".md").read_text()
    assert "Weights in float32, computed in float32" in shown
    assert "| method | exits | MT-bench | AlpacaEval | mean |" in shown
    lengths, costs = (part.splitlines() for part in shown.split("## What it costs"))
    assert "| plain decoding | - | 1.00 | 1.00 | 1.00 |" in lengths
    assert [row.split(" | ")[:2] for row in lengths if row.startswith("| CATS")] == [
        ["| CATS chain", "1/3"],
        ["| CATS chain, sv_passes 2", "1/3"],
    ]
    assert all(row.endswith("| 4 of 4 |") for row in costs if row.startswith(("| plain", "| CATS")))
    size = sum(stored_bytes(path) for path in (speaking.draft, speaking.shallow))
    assert [row["extra_bytes"] for row in result["rows"]] == [0, size, size]
    capsys.readouterr()
    acceptance_table.main(["--merge", "--output", str(output)])
    assert capsys.readouterr().out == shown


def test_other_exits_are_rows_of_the_same_table(tmp_path: Path, speaking: TinyModel) -> None:
    output, adapters = tmp_path / "table.json", tmp_path / "adapters"
    for exit_layer in (1, 2, 3):
        adapter = AdapterModel.from_pretrained(speaking.shallow, None)
        adapter.exit_layer = adapter.config.exit_layer = exit_layer
        adapter.save_pretrained(adapters / f"exit{exit_layer}")
    common = ["--model-path", str(speaking.base), "--adapters", str(adapters), "--device", "cpu", "--questions", "1"]
    common += ["--benches", "mtbench", "--methods", "cascade_chain", "--max-new-tokens", "4", "--output", str(output)]
    for draft, shallow in (("1", "3"), ("1", "2"), ("2", "3")):
        acceptance_table.main([*common, "--draft-layer", draft, "--shallow-layer", shallow])
    assert [row["exits"] for row in json.loads(output.read_text())["rows"]] == ["1/2", "1/3", "2/3"]


def test_sampled_answers_are_the_same_by_every_method_and_never_meet_greedy_ones(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table.json"
    fill(speaking, output, "--benches", "mtbench", "--temperature", "0.7", "--seed", "3")
    cells = json.loads(output.read_text())["cells"]
    assert [(cell["settings"]["temperature"], cell["settings"]["seed"]) for cell in cells] == [(0.7, 3)] * 3
    assert [cell["summary"]["identical_to_plain"] for cell in cells] == [2, 2, 2]
    shown = output.with_suffix(".md").read_text()
    assert shown.splitlines()[0].endswith(", temperature 0.7, seed 3")
    assert "Sampled at temperature 0.7, seed 3" in shown
    assert "Greedy" not in shown
    sampled = read_records(tmp_path / "table.cells" / "mtbench.autoregressive.jsonl")
    fill(speaking, tmp_path / "other.json", "--benches", "mtbench", "--temperature", "0.7", "--seed", "4")
    other = read_records(tmp_path / "other.cells" / "mtbench.autoregressive.jsonl")
    assert [record["choices"][0]["ids"] for record in sampled] != [record["choices"][0]["ids"] for record in other]
    capsys.readouterr()
    for flags, said in (
        (["mtbench"], "temperature 0.7, now it is None"),
        (["alpacaeval"], "the cell of autoregressive on alpacaeval does not fit in"),
        (["mtbench", "--seed", "3"], "--seed does nothing for greedy answers"),
    ):
        with pytest.raises(SystemExit) as ended:
            fill(speaking, output, "--benches", *flags)
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_what_is_resident_beside_the_base_is_said(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    output, store = tmp_path / "table.json", store_of(speaking_vocabulary(speaking))
    fill(speaking, output, "--benches", "mtbench", "--methods", "autoregressive", "cascade_chain", f"rest:datastore={store}")
    rows = json.loads(output.read_text())["rows"]
    assert [row["title"] for row in rows] == ["plain decoding", "CATS chain", f"REST, datastore {store.name}"]
    adapters = sum(stored_bytes(path) for path in (speaking.draft, speaking.shallow))
    assert [row["extra_bytes"] for row in rows] == [0, adapters, Datastore.open(store).nbytes]
    capsys.readouterr()


def speaking_vocabulary(speaking: TinyModel) -> int:
    return int(json.loads((speaking.base / "config.json").read_text())["vocab_size"])


def test_every_layer_pass_counts_with_the_bytes_of_the_form_that_ran(tmp_path: Path, speaking: TinyModel) -> None:
    output = tmp_path / "table.json"
    common = ["--model-path", str(speaking.base), "--device", "cpu", "--dtype", "float32", "--questions", "1", "--max-new-tokens", "8"]
    methods = ["--methods", "autoregressive", "nested:steps=3", "--benches", "mtbench"]
    budget = ["--coarse", "int8", "--no-pinning"]
    acceptance_table.main([*common, *methods, *budget, "--output", str(output)])
    cells = {cell["settings"]["label"]: cell for cell in json.loads(output.read_text())["cells"]}
    plain, nested = cells["autoregressive"], cells["nested:steps=3"]
    exact, coarse = (nested["shape"][name] for name in ("bytes_per_layer", "bytes_per_coarse_layer"))
    layers = nested["shape"]["layers"]
    assert plain["summary"]["layer_bytes_per_token"] == layers * exact
    assert exact / 4 < coarse < exact / 2
    assert nested["extra_resident_bytes"]["copy"] == pytest.approx(layers * coarse, rel=0.1)
    assert nested["summary"]["layer_passes_per_token_formula"] is None
    answers = read_records(tmp_path / "table.cells" / "mtbench.nested+steps=3.jsonl")
    turns = [turn for record in answers for turn in record["choices"][0]["steps"]]
    passes, coarse_passes = (sum(sum(turn[name]) for turn in turns) for name in ("layer_passes", "coarse_layer_passes"))
    assert passes - coarse_passes == layers * nested["summary"]["steps"]
    committed = sum(sum(turn["committed"]) for turn in turns)
    read = ((passes - coarse_passes) * exact + coarse_passes * coarse) / committed
    assert nested["summary"]["layer_bytes_per_token"] == pytest.approx(read)


def test_an_incomplete_cell_stays_out_until_it_is_filled(tmp_path: Path, speaking: TinyModel) -> None:
    output = tmp_path / "table.json"
    fill(speaking, output, "--benches", "mtbench")
    cell = tmp_path / "table.cells" / "mtbench.cascade_chain.1-3.jsonl"
    whole = read_records(cell)
    cell.write_bytes(cell.read_bytes()[:-50])
    acceptance_table.main(["--merge", "--output", str(output)])
    assert len(json.loads(output.read_text())["cells"]) == 2
    fill(speaking, output, "--benches", "mtbench")
    assert len(json.loads(output.read_text())["cells"]) == 3
    assert read_records(cell)[0] == whole[0]


def test_what_is_missing_is_said(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "table.json"
    refused = (
        (["--merge"], "holds no complete cell"),
        (["--merge", "--methods", "kangaroo"], "--merge only reads the cells"),
        (["--model-path", str(speaking.base)], "needs the draft adapter; give --draft-adapter-path, or --adapters"),
    )
    for flags, complaint in refused:
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
