"""Small ShareGPT files for the training tests."""

import json
from pathlib import Path
from typing import Any

WORDS = ["the", "sum", "of", "two", "and", "three", "is", "five", "because", "counting", "on", "from", "two", "gives", "four", "then"]


def items(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two exchanges, each different."""
    made = []
    for number in range(count):
        words = WORDS[number % 7 :] + WORDS[: number % 7]
        turns = [f"Question {number}: {' '.join(words[:4])}?", " ".join(words[4 : 6 + number % 5])]
        if number % 3 == 0:
            turns += ["And then?", " ".join(words[:3])]
        entries = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        made.append({"id": f"c{number}", "conversations": entries})
    return made


def write(path: Path, count: int) -> Path:
    """A ShareGPT file of so many conversations."""
    path.write_text(json.dumps(items(count)))
    return path
