"""Answer files beside the questions that they answer. Reads what evaluation/CATS_dynamic.py wrote; knows no model.

Which questions were asked is said by the settings beside the answers (`<run>.settings.json`), by file name and hash.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.errors import CatsError
from cats.records import sha256
from evaluation.metrics import answered
from evaluation.questions import ALIASES, BENCH_FOLDER, BENCHES, Question, QuestionId, read_questions, resolve_bench
from evaluation.record_file import read_records


@dataclass(frozen=True)
class Answers:
    """The answers of one file.

    Attributes:
        path: of the file.
        turns: the texts of every answered question, by id.
        cut: ids of those whose last text ended at its length.
        failed: questions that were recorded as failed.
        model_id: of the configuration that answered.
    """

    path: Path
    turns: Mapping[QuestionId, tuple[str, ...]]
    cut: frozenset[QuestionId]
    failed: int
    model_id: str


def read_answers(path: Path) -> Answers:
    """A whole answer file; one that is not there, holds none, or has another form raises `CatsError`."""
    if not path.is_file():
        raise CatsError(f"there is no answer file {path}; name one that evaluation/CATS_dynamic.py wrote, like data/gsm8k/ID/0.jsonl.")
    records = read_records(path)
    turns: dict[QuestionId, tuple[str, ...]] = {}
    finish: dict[QuestionId, str] = {}
    for record in answered(records):
        question_id, turns_of = record.get("question_id"), texts_of(record)
        if not isinstance(question_id, int | str) or turns_of is None:
            raise CatsError(f"{path} holds a record without 'question_id' and 'choices' with 'turns' of text; it is no answer file.")
        turns[question_id] = turns_of
        finish[question_id] = (record["choices"][0].get("finish") or [""])[-1]
    if not turns:
        raise CatsError(f"{path} holds no answer; let evaluation/CATS_dynamic.py answer the questions first.")
    cut = frozenset(question_id for question_id, why in finish.items() if why in ("length", "context"))
    failed = {record.get("question_id") for record in records if "failed" in record} - turns.keys()
    return Answers(path, turns, cut, len(failed), str(records[0].get("model_id", "")))


def texts_of(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The texts of an answer record; None where it has another form."""
    choices = record.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return None
    turns = choices[0].get("turns")
    return tuple(turns) if isinstance(turns, list) and turns and all(isinstance(text, str) for text in turns) else None


def find_questions(answers: Answers, given: str | None) -> tuple[Path, dict[QuestionId, Question]]:
    """The questions that were answered, by id, and their file.

    Args:
        given: a bench name or a question file; None finds the file that the settings beside the answers name.

    Raises:
        CatsError: it cannot be found, is another file than the settings name, or lacks a question that was answered.
    """
    asked = asked_file(answers.path)
    if given is not None:
        path = resolve_bench(given).path if given in BENCHES or given in ALIASES else Path(given)
        if asked is not None and sha256(path) != asked[1]:
            raise CatsError(f"{path} is not what {answers.path} was made from ({asked[0]}, sha256 {asked[1][:12]}...); give that file.")
    elif asked is None:
        raise CatsError(f"{answers.path} has no settings beside it that name its questions; give a bench name or a file by --questions.")
    else:
        places = [folder / asked[0] for folder in (BENCH_FOLDER / "official", BENCH_FOLDER)]
        files = [place for place in places if place.is_file() and sha256(place) == asked[1]]
        if not files:
            said = f"{asked[0]} (sha256 {asked[1][:12]}...)"
            raise CatsError(f"the questions of {answers.path}, {said}, are not here; give them by --questions.")
        path = files[0]
    questions = {question.question_id: question for question in read_questions(path)}
    unknown = [question_id for question_id in answers.turns if question_id not in questions]
    if unknown:
        raise CatsError(f"{path} has no question {unknown[0]!r}, which {answers.path} answers; give its questions by --questions.")
    return path, questions


def asked_file(answers: Path) -> tuple[str, str] | None:
    """Name and hash of the question file that the settings beside an answer file name; None where there are no settings."""
    run = answers.name.removesuffix(".jsonl").removesuffix(".baseline")
    path = answers.with_name(f"{run}.settings.json")
    if not path.is_file():
        return None
    try:
        questions = json.loads(path.read_text(encoding="utf-8"))["settings"]["questions"]
        return str(questions["file"]), str(questions["sha256"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CatsError(f"cannot read the questions' name in {path}: {error}; mend it, or move it away and give --questions.") from error
