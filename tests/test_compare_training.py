"""The training comparison on a tiny random model: cells, resuming, disjoint prompts, table and picture."""

import json
import shutil
from pathlib import Path

import pytest

from cats.errors import CatsError
from scripts import compare_training
from scripts.compare_training import Cell
from scripts.training_figures import METHODS, resampled, summary
from tests.chats import items
from tests.tiny_models import TinyModel

CELLS = ("corpus:topk=20", "greedy:topk=5,seed=1", "corpus+greedy:optimizer=muon")


def arguments(tiny: TinyModel, folder: Path, *more: str) -> list[str]:
    for name, numbers in (("corpus", range(12)), ("held_out", range(12, 36))):
        (folder / f"{name}.json").write_text(json.dumps([items(36)[number] for number in numbers]))
    fixed = ["--model-path", str(tiny.base), "--corpus", str(folder / "corpus.json"), "--held-out", str(folder / "held_out.json")]
    fixed += ["--work-dir", str(folder / "work"), "--exits", "1", "3", "--stored-exits", "1", "3", "--steps", "2", "--rows", "2"]
    sizes = {
        "prompts": 6,
        "train-on": 5,
        "prompt-tokens": 260,
        "new-tokens": 8,
        "decode-tokens": 6,
        "selection": 2,
        "test": 2,
        "validation": 3,
    }
    fixed += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return [*fixed, "--output", str(folder / "comparison.json"), *more]


def test_cells_adapters_table_and_picture(speaking: TinyModel, tmp_path: Path) -> None:
    for path in (speaking.draft, speaking.shallow):
        shutil.copytree(path, tmp_path / "adapters" / path.name)
    adapters = ["--adapters", f"before={tmp_path / 'adapters'}"]
    compare_training.main(arguments(speaking, tmp_path, "--cells", *CELLS, *adapters))
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [cell["cell"] for cell in found["cells"]] == ["corpus.topk=20", "corpus+greedy.optimizer=muon", "greedy.seed=1.topk=5"]
    for result in (*found["cells"], *found["adapters"]):
        for method in METHODS:
            assert 1 <= result["summary"]["exits 1, 3"][method]["accepted_length"] <= 8
        assert result["accepted"]["exits 1, 3"]["same_text"] == 2
        assert set(result["validation"]) == {"corpus", "greedy"}
    assert [cell["training"]["run"]["topk"] for cell in found["cells"]] == [20, 20, 5]
    assert all(len(cell["training"]["loss"]) == 2 for cell in found["cells"])
    assert str(tmp_path) not in json.dumps([cell["training"] for cell in found["cells"]])
    text = (tmp_path / "comparison.md").read_text()
    assert "| greedy.seed=1.topk=5 | 1, 3 |" in text
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    data = tmp_path / "work" / "data"
    selection, test = ({item["id"] for item in json.loads((data / f"{part}.json").read_text())} for part in ("selection", "test"))
    assert len(selection) == len(test) == 2
    assert not selection & test


def test_finished_work_is_kept_and_the_rest_is_made(speaking: TinyModel, tmp_path: Path) -> None:
    argv = arguments(speaking, tmp_path, "--cells", *CELLS[:2])
    compare_training.main(argv)
    cells = sorted((tmp_path / "work" / "cells").glob("*.json"))
    stamps = [path.stat().st_mtime_ns for path in cells]
    weights = (tmp_path / "work" / "trained" / "greedy.seed=1.topk=5" / "exit1" / "model.safetensors").read_bytes()
    cells[1].unlink()
    compare_training.main(argv)
    assert cells[0].stat().st_mtime_ns == stamps[0]
    assert cells[1].stat().st_mtime_ns > stamps[1]
    assert (tmp_path / "work" / "trained" / "greedy.seed=1.topk=5" / "exit1" / "model.safetensors").read_bytes() == weights


def test_other_data_in_the_same_folder_is_refused(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = arguments(speaking, tmp_path, "--cells", CELLS[0])
    compare_training.main(argv)
    with pytest.raises(SystemExit) as caught:
        compare_training.main([*argv, "--prompts", "5"])
    assert caught.value.code == 2
    assert "was begun with prompts 6, now it is 5; use the same flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"), [(["--steps", "3"], "steps 2, now it is 3"), (["--decode-tokens", "7"], "decode_tokens 6, now it is 7")]
)
def test_results_under_other_settings_are_never_mixed(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], said: str
) -> None:
    argv = arguments(speaking, tmp_path, "--cells", CELLS[0])
    compare_training.main(argv)
    for flags in (change, [*change, "--merge"]):
        with pytest.raises(SystemExit) as caught:
            compare_training.main([*argv, *flags])
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


def test_a_cell_is_a_kind_of_answer_and_settings() -> None:
    cell = Cell.parse("greedy:topk=0,init_adapter=a/x+a/y")
    assert cell.flags({"topk": 20, "rows": 2}) == ["--topk", "0", "--rows", "2", "--init-adapter", "a/x", "a/y"]
    assert cell.name == "greedy.init-adapter=x+y.topk=0"
    for text, complaint in (("nothing:topk=5", "unknown targets"), ("corpus:topk", "without a value")):
        with pytest.raises(CatsError, match=complaint):
            Cell.parse(text)


def test_ratios_pair_the_prompts() -> None:
    reference = {"tokens": [40, 80, 20], "passes": [20, 20, 10], "accepted_length": 2.8}
    doubled = {"tokens": [80, 160, 40], "passes": [20, 20, 10], "accepted_length": 5.6}
    assert (resampled(doubled) / resampled(reference)).tolist() == pytest.approx([2.0] * 2000)
    results = [{"accepted": {"exits 2, 6": dict.fromkeys(METHODS, counts)}} for counts in (doubled, reference)]
    made = summary(*results)
    assert made["exits 2, 6"]["kangaroo"]["ratio_90_percent"] == pytest.approx([2.0, 2.0])
