"""What work was begun with, hashes of files among it, and whether a second run agrees."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cats.errors import CatsError


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes; an unreadable file raises `CatsError`."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CatsError(f"cannot read {path}: {error.strerror}; give the path of an existing file.") from error


def check_agreement(what: object, before: Mapping[str, Any], now: Mapping[str, Any], advice: str) -> None:
    """Raise `CatsError` where settings differ, by name and values; what JSON holds alike (tuples and lists) does not differ.

    Args:
        what: begun with the settings `before`.
        advice: what to do about it, the end of the sentence.
    """
    then, today = _flat(dict(before)), _flat(json.loads(json.dumps(now)))
    changed = [name for name in {**then, **today} if then.get(name) != today.get(name)]
    if changed:
        name, *others = changed
        more = f" ({', '.join(others)} differ too)" if others else ""
        raise CatsError(f"{what} was begun with {name} {then.get(name)!r}, now it is {today.get(name)!r}{more}; {advice}")


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        name: value for key, inner in settings.items() for name, value in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }
