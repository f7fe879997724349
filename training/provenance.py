"""What a folder of results was made from: a JSON beside the results that a second run must agree with."""

import json
from pathlib import Path
from typing import Any

from cats.cli.progress import heartbeat
from cats.errors import CatsError
from cats.files import write_atomically
from cats.records import check_agreement, sha256


def read_json(path: Path, written_by: str) -> dict[str, Any]:
    """The JSON object in `path`; a missing or damaged one raises `CatsError` that says which program writes it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}, which {written_by} writes: {error}") from error
    if not isinstance(content, dict):
        raise CatsError(f"{path} holds no JSON object; {written_by} writes it, run that again.")
    return content


def hash_of_data(path: str | Path) -> str:
    """Hex digest of a file that may be large; an unreadable one raises `CatsError`."""
    with heartbeat("hash the data"):
        return sha256(path)


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write JSON atomically; without `indent` on one line."""
    write_atomically(path, lambda part: part.write_text(json.dumps(content, indent=indent) + "\n"))


def agree(path: Path, description: dict[str, Any], write: bool) -> None:
    """Write `description` to `path`, or check that what is there says the same; a difference raises `CatsError`.

    Args:
        write: whether this process writes a missing file (one of several does).
    """
    if path.exists():
        stored = read_json(path, "the run that made this folder")
        check_agreement(path.parent, stored, description, "use the same flags or another folder.")
    elif write:
        write_json(path, description)
