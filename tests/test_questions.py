"""Question files: which file a name means, what a malformed one is told."""

import json
from pathlib import Path

import pytest

from cats.errors import CatsError
from evaluation.questions import BENCH_FOLDER, BENCHES, question_file_name, read_questions, resolve_bench, select_questions


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def line(question_id: object, *turns: object) -> str:
    return json.dumps({"question_id": question_id, "category": "x", "turns": list(turns)})


@pytest.mark.parametrize("bench", BENCHES)
def test_samples_are_ten_marked_questions_in_the_format(bench: str) -> None:
    path = BENCH_FOLDER / question_file_name(bench)
    questions = read_questions(path)
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert len(questions) == 10
    assert all(row["sample"] is True for row in rows)
    assert all(len(question.turns) == 2 for question in questions) == (bench == "mtbench")
    if bench == "humaneval":
        assert all({"task_id", "entry_point", "reference"} <= row.keys() for row in rows)


def test_bench_name_means_the_official_set_where_there_is_one(tmp_path: Path) -> None:
    sample = resolve_bench("mt_bench", tmp_path)
    assert sample.path == tmp_path / "question_mtbench.jsonl"
    assert "sample" in sample.description
    (tmp_path / "official").mkdir()
    official = write(tmp_path / "official" / "question_mtbench.jsonl", line(81, "a", "b"))
    assert resolve_bench("mtbench", tmp_path).path == official
    assert "official" in resolve_bench("mtbench", tmp_path).description
    with pytest.raises(CatsError, match="unknown bench 'mmlu'"):
        resolve_bench("mmlu", tmp_path)


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* is a JSON list"),
        (line(None, "x"), "line 2 of .* no 'question_id'"),
        (line(True, "x"), "line 2 of .* no 'question_id'"),
        (line(2), "line 2 of .* no 'turns'"),
        (line(2, " "), "line 2 of .* no 'turns'"),
        (line(2, 5), "line 2 of .* no 'turns'"),
        (line(1, "again"), "line 2 of .* repeats the question_id 1"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, second: str, complaint: str) -> None:
    with pytest.raises(CatsError, match=complaint):
        read_questions(write(tmp_path / "q.jsonl", line(1, "fine"), second))


def test_missing_empty_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match="cannot read the question file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(CatsError, match="holds no question"):
        read_questions(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatsError, match="cannot read the question file"):
        read_questions(tmp_path / "binary.jsonl")


def test_a_slice_counts_from_zero_and_may_reach_past_the_end(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "q.jsonl", *(line(place, "x") for place in range(5))))
    assert [question.question_id for question in select_questions(questions, 1, 3)] == [1, 2]
    assert len(select_questions(questions, None, None)) == 5
    assert len(select_questions(questions, 0, 80)) == 5
    for begin, end in ((3, 3), (4, 2), (-1, 2), (5, 9)):
        with pytest.raises(CatsError):
            select_questions(questions, begin, end)


def test_references_and_task_ids_are_read_in_every_form_that_sets_use(tmp_path: Path) -> None:
    forms = [("[]", ()), ('["a", ""]', ("a", "")), ('"42"', ("42",)), ("null", ()), ("[null, 3]", ("", "3"))]
    path = tmp_path / "questions.jsonl"
    lines = [
        f'{{"question_id": {place}, "turns": ["x"], "reference": {form}, "task_id": "T/{place}"}}' for place, (form, _) in enumerate(forms)
    ]
    path.write_text("\n".join([*lines, '{"question_id": 9, "turns": ["x"]}']), encoding="utf-8")
    questions = read_questions(path)
    assert [question.reference for question in questions] == [*(expected for _, expected in forms), ()]
    assert [question.task_id for question in questions] == [*(f"T/{place}" for place in range(len(forms))), ""]
