"""Question files of the benchmarks: which file a bench name means, reading it with checks, and its turns as prompts of token ids.

Knows FastChat's question format and conversation templates and a tokenizer; knows no model and no answers. The format is
one JSON object per line with `question_id`, `category` and `turns` (a list of user messages).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cats.errors import CatsError

BENCH_FOLDER = Path(__file__).resolve().parents[1] / "data" / "test_benches"
BENCHES = ("mtbench", "alpacaeval", "gsm8k", "humaneval", "spec")
ALIASES = {"mt_bench": "mtbench"}

QuestionId = int | str


@dataclass(frozen=True)
class Question:
    """One question; every turn but the first follows on the answers to the ones before it.

    Attributes:
        reference: right answers, by turn, where the file has any; an empty one is none.
        task_id: by which a set of tests knows it; empty where it has none.
    """

    question_id: QuestionId
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    task_id: str = ""


@dataclass(frozen=True)
class QuestionFile:
    """Where questions come from, and what to say of it."""

    path: Path
    note: str = ""

    @property
    def description(self) -> str:
        """For the user."""
        return f"{self.path}{self.note}"


def question_file_name(bench: str) -> str:
    """File name of a bench's questions, in the official folder and in the sample folder alike."""
    return f"question_{bench}.jsonl"


def resolve_bench(name: str, folder: Path = BENCH_FOLDER) -> QuestionFile:
    """The official question file of a bench where it was prepared, else the sample; an unknown name raises `CatsError`."""
    bench = ALIASES.get(name, name)
    if bench not in BENCHES:
        known = ", ".join((*ALIASES, *BENCHES))
        raise CatsError(f"unknown bench {name!r}; known are {known}, or give any file by --question-file.")
    official = folder / "official" / question_file_name(bench)
    if official.is_file():
        return QuestionFile(official, " (the official set)")
    return QuestionFile(folder / question_file_name(bench), " (a sample; `python -m evaluation.prepare_benches` brings the official set)")


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a file, in its order; an unreadable file, a malformed line or a repeated id raises `CatsError` naming the line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read the question file {path}: {error}; expected one JSON object per line.") from error
    questions: dict[QuestionId, Question] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        question = _parse_question(line, f"line {number} of {path}")
        if question.question_id in questions:
            raise CatsError(
                f"line {number} of {path} repeats the question_id {question.question_id!r}; every question needs an id of its own."
            )
        questions[question.question_id] = question
    if not questions:
        raise CatsError(f"the question file {path} holds no question; expected one JSON object per line.")
    return list(questions.values())


def _parse_question(line: str, where: str) -> Question:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise CatsError(f"{where} is not JSON ({error.msg} at column {error.colno}); mend or remove the line.") from error
    if not isinstance(item, dict):
        raise CatsError(f"{where} is a JSON {type(item).__name__}, not an object with 'question_id' and 'turns'.")
    question_id, turns = item.get("question_id"), item.get("turns")
    if not isinstance(question_id, int | str) or isinstance(question_id, bool):
        raise CatsError(f"{where} has no 'question_id' that is a number or a string.")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise CatsError(f"{where} (question {question_id}) has no 'turns' that is a non-empty list of non-empty strings.")
    given = item.get("reference") or []
    reference = tuple(str(text or "") for text in given) if isinstance(given, list) else (str(given),)
    return Question(question_id, str(item.get("category", "")), tuple(turns), reference, str(item.get("task_id", "")))


def spread_questions(questions: Sequence[Question], count: int | None) -> list[Question]:
    """`count` questions (None: all) evenly spread over `questions`, the first among them; always the same ones."""
    if count is None or count >= len(questions):
        return list(questions)
    if count < 1:
        raise CatsError(f"--questions is {count}; it must be at least 1.")
    return [questions[place * len(questions) // count] for place in range(count)]


def select_questions(questions: Sequence[Question], begin: int | None, end: int | None) -> list[Question]:
    """Questions at positions `begin` (default 0) up to, not including, `end` (default all); an empty range raises `CatsError`."""
    first, last = begin or 0, len(questions) if end is None else end
    if first >= len(questions):
        raise CatsError(f"--question-begin {first} is past the end; the question file holds {len(questions)} questions.")
    if first < 0 or last <= first:
        raise CatsError(f"questions {first} to {last} are none; positions count from 0, and the end is not included.")
    return list(questions[first:last])
