"""Writing files so that a reader, a run that resumes, or a second writer never sees half of one."""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ABANDONED_SECONDS = 24 * 3600
"""A half written file that nobody has written to for so long was left by a run that was killed."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a sibling path of its own, flush it to the disk, then rename it to `path`; on failure the sibling is removed.

    Of several writers at once, the last to finish wins. Siblings (`<name>.<unique>.part`) that killed runs left behind are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove the siblings of `path` that writers left behind."""
    for entry in os.scandir(path.parent):
        if entry.name.startswith(f"{path.name}.") and entry.name.endswith(".part"):
            part = Path(entry.path)
            try:
                abandoned = time.time() - part.stat().st_mtime > ABANDONED_SECONDS
            except FileNotFoundError:  # its writer has just finished
                continue
            if abandoned:
                part.unlink(missing_ok=True)
