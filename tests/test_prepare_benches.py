"""Bringing the official question sets: counts, structure and hashes decide; a set that fails is not written."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cats.errors import CatsError
from evaluation import prepare_benches
from evaluation.prepare_benches import OFFICIAL, main
from evaluation.questions import BENCHES, read_questions

SOURCES: dict[str, dict[str, Any]] = {
    "mtbench": {"question_id": 81, "category": "writing", "turns": ["a", "b"], "reference": []},
    "alpacaeval": {"instruction": "Why?", "dataset": "koala", "output": "", "generator": ""},
    "gsm8k": {"question": "How many?", "answer": "#### 1"},
    "humaneval": {"task_id": "HumanEval/0", "entry_point": "f", "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": ""},
    "spec": {"question_id": 81, "category": "rag", "turns": ["a"], "reference": ["b"]},
}


def small_set(monkeypatch: pytest.MonkeyPatch, name: str, text: str, questions: int) -> None:
    """Pretend that the official set is this text."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setitem(OFFICIAL, name, replace(OFFICIAL[name], questions=questions, sha256=sha256))


def row(question_id: int, *turns: str) -> str:
    return json.dumps({"question_id": question_id, "category": "x", "turns": list(turns)}) + "\n"


def folder_with(tmp_path: Path, name: str, text: str) -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / f"question_{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def bring(folder: Path, to: Path, *benches: str) -> None:
    main(["--from", str(folder), "--to", str(to), "--benches", *benches])


def test_the_public_counts() -> None:
    assert {name: bench.questions for name, bench in OFFICIAL.items()} == {
        "mtbench": 80,
        "alpacaeval": 805,
        "gsm8k": 1319,
        "humaneval": 164,
        "spec": 480,
    }
    assert tuple(OFFICIAL) == BENCHES


def test_a_checked_set_is_copied_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = row(81, "a", "b") + row(82, "c", "d")
    small_set(monkeypatch, "mtbench", text, 2)
    bring(folder_with(tmp_path, "mtbench", text), tmp_path / "official", "mtbench")
    assert (tmp_path / "official" / "question_mtbench.jsonl").read_text() == text
    assert "2 questions, count, structure and sha256 checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (row(81, "a", "b"), "holds 1 questions, the official mtbench has 2"),
        (row(81, "a", "b") + row(82, "c"), "question 82 .* has 1 turns"),
        (row(81, "a", "b") + row(82, "c", "other"), "has the sha256"),
        (row(81, "a", "b") + "{", "line 2 .* is not JSON"),
    ],
)
def test_another_set_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    small_set(monkeypatch, "mtbench", row(81, "a", "b") + row(82, "c", "d"), 2)
    with pytest.raises(SystemExit) as ended:
        bring(folder_with(tmp_path, "mtbench", text), tmp_path / "official", "mtbench")
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert re.search(complaint, shown)
    assert not (tmp_path / "official").exists()


def test_a_missing_folder_or_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, named in ((tmp_path / "absent", "absent"), (tmp_path, "question_gsm8k.jsonl")):
        with pytest.raises(SystemExit) as ended:
            bring(folder, tmp_path / "official", "gsm8k")
        assert ended.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHES)
def test_rows_of_the_hub_become_questions(tmp_path: Path, name: str) -> None:
    def load_dataset(**_: Any) -> Sequence[Mapping[str, Any]]:
        return [SOURCES[name]]

    bench = replace(OFFICIAL[name], questions=1)
    text = prepare_benches.read_from_hub(name, bench, load_dataset)
    prepare_benches.write_set(name, bench, text, tmp_path)
    (question,) = read_questions(tmp_path / f"question_{name}.jsonl")
    assert question.question_id == {"mtbench": 81, "alpacaeval": 1, "gsm8k": 10000, "humaneval": 1, "spec": 81}[name]
    with pytest.raises(CatsError, match="holds 1 questions"):
        prepare_benches.write_set(name, OFFICIAL[name], text, tmp_path / "other")
    assert not (tmp_path / "other" / f"question_{name}.jsonl").exists()


def test_an_unreachable_hub_is_one_sentence() -> None:
    def load_dataset(**_: Any) -> Sequence[Mapping[str, Any]]:
        raise ConnectionError("no route\nto host")

    with pytest.raises(CatsError, match=r"cannot fetch gsm8k .* no route; check the connection"):
        prepare_benches.read_from_hub("gsm8k", OFFICIAL["gsm8k"], load_dataset)
