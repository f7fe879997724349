"""Answer files as evaluation/CATS_dynamic.py writes them, made by hand."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.record_file import rewrite_records, write_json


def answer_record(question_id: int, turns: Sequence[str], finish: str = "eos") -> dict[str, Any]:
    choice = {"index": 0, "turns": list(turns), "ids": [[1]] * len(turns), "new_tokens": [1] * len(turns), "finish": [finish] * len(turns)}
    return {"question_id": question_id, "answer_id": "x", "model_id": "tried", "tstamp": 1.0, "choices": [choice]}


def write_answers(folder: Path, answers: Mapping[int, Sequence[str]], questions: Path | None = None) -> Path:
    """`0.jsonl` with one answer a question, and the settings beside it that name the questions."""
    path = folder / "0.jsonl"
    rewrite_records(path, [answer_record(question_id, turns) for question_id, turns in answers.items()])
    if questions is not None:
        named = {"file": questions.name, "sha256": hashlib.sha256(questions.read_bytes()).hexdigest()}
        write_json(folder / "0.settings.json", {"settings": {"questions": named}})
    return path


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
