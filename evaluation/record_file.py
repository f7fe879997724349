"""Append-only files of JSON records that survive a kill, and the settings file that says what their records were made with.

Knows nothing of what a record holds beyond the key it is found by. A record is one line; each append is flushed to the
disk before it returns, so a kill loses at most the record that was being made. Several processes may append to one file.
An `OSError` of a write names the file.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cats.errors import CatsError
from cats.files import write_atomically
from cats.records import check_agreement

Record = dict[str, Any]
CHUNK = 65536


def read_records(path: Path) -> list[Record]:
    """Whole records in file order, none where there is no file; a torn last line is left out, any other fault raises `CatsError`."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read the records in {path}: {error}; mend or remove the file.") from error
    return [_parse(line, number, path) for number, line in enumerate(lines, start=1)]


def _parse(line: str, number: int, path: Path) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CatsError(f"line {number} of {path} is not a JSON record; remove the line, and the run will make it again.") from error
    if not isinstance(record, dict):
        raise CatsError(f"line {number} of {path} is a JSON {type(record).__name__}, not a record; remove the line.")
    return record


def append_record(path: Path, record: Mapping[str, Any], durable: bool = True) -> None:
    """Write one record behind the last whole one and, if `durable`, flush it to the disk; a torn line of an earlier kill is cut off first.

    Nothing half written stays when the disk is full: the file is cut back to its whole records.
    """
    data = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    with _naming(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _append(descriptor, data, durable)
        finally:
            os.close(descriptor)


def _append(descriptor: int, data: bytes, durable: bool) -> None:
    end = _end_of_whole_lines(descriptor)
    os.ftruncate(descriptor, end)
    try:
        _write_all(descriptor, data, end)
        if durable:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an `OSError` of the block name the file, which calls on descriptors do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def _end_of_whole_lines(descriptor: int) -> int:
    """Offset just behind the last newline."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - CHUNK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def rewrite_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by these records, atomically."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with _naming(path):
        write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, indented, with lists of plain numbers on one line."""
    text = json.dumps(content, ensure_ascii=False, indent=2)
    text = re.sub(r"\[\n\s+(-?[\d.eE+-]+(?:,\n\s+-?[\d.eE+-]+)*)\n\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    with _naming(path):
        write_atomically(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))


def check_settings(path: Path, settings: Mapping[str, Any], records: Path) -> None:
    """Refuse, by `CatsError`, to go on with records that were made with other settings than these, or with unknown ones."""
    if not records.exists():
        return
    if not path.exists():
        raise CatsError(f"{records} has no {path.name} beside it that says its settings; move it away or choose another place.")
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CatsError(f"cannot read the settings in {path}: {error}; move it and its records away.") from error
    check_agreement(records, known, settings, "choose another place for the new answers, or remove the old ones.")
