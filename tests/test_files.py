"""Whole files or none: several writers at once, and what killed writers leave behind."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cats import files
from cats.files import write_atomically


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each is in the middle of its own half when the other begins; the file is one's or the other's, whole."""
    path, middle = tmp_path / "x.json", threading.Barrier(2, timeout=30)

    def write(letter: str) -> None:
        def halves(part: Path) -> None:
            part.write_text(letter * 1000)
            middle.wait()
            with part.open("a") as file:
                file.write(letter * 1000)
            middle.wait()

        write_atomically(path, halves)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, "ab")) == [None, None]
    assert path.read_text() in ("a" * 2000, "b" * 2000)
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_killed_writers_of_this_file_left_is_removed(tmp_path: Path) -> None:
    old, fresh, other = (tmp_path / name for name in ("x.json.0123456789ab.part", "x.json.ba9876543210.part", "y.json.0123456789ab.part"))
    for path in (old, fresh, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (time.time() - files.ABANDONED_SECONDS - 60,) * 2)
    write_atomically(tmp_path / "x.json", lambda part: part.write_text("whole"))
    assert sorted(tmp_path.iterdir()) == sorted([fresh, other, tmp_path / "x.json"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
