"""What a folder of results was made from: hashes of files, and a JSON beside the results that a second run must agree with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cats.errors import CatsError
from cats.files import write_atomically


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes; an unreadable file raises `CatsError`."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CatsError(f"cannot read {path}: {error.strerror}; give the path of an existing file.") from error


def read_json(path: Path, written_by: str) -> dict[str, Any]:
    """The JSON object in `path`; a missing or damaged one raises `CatsError` that says which program writes it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}, which {written_by} writes: {error}") from error
    if not isinstance(content, dict):
        raise CatsError(f"{path} holds no JSON object; {written_by} writes it, run that again.")
    return content


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write JSON atomically; without `indent` on one line."""
    write_atomically(path, lambda part: part.write_text(json.dumps(content, indent=indent) + "\n"))


def agree(path: Path, description: dict[str, Any], write: bool) -> None:
    """Write `description` to `path`, or check that what is there says the same, naming every difference.

    Args:
        write: whether this process writes a missing file (one of several does).
    """
    if path.exists():
        stored = read_json(path, "the run that made this folder")
        plain = json.loads(json.dumps(description))
        different = [name for name in plain if stored.get(name) != plain[name]]
        if different:
            raise CatsError(f"{path.parent} was made with another {', '.join(different)}; use the same flags or another folder.")
    elif write:
        write_json(path, description)
