"""Safetensors files that are written tensor by tensor, in memory that does not depend on their size, by work that a kill may interrupt.

The header has its room kept at the beginning and is written last. A journal says what is complete; whoever goes on cuts off what is not.
The directory has its name when everything is in it, and not before.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from cats.checkpoint import STORED_DTYPES
from cats.errors import CatsError
from cats.runtime.arena import PAGE_BYTES

JOURNAL = "progress.jsonl"
FILLER = ".filler"
"""End of the names of tensors that only fill pages up: safetensors files have no gaps."""
ENTRY_BYTES = 256
"""Of a header's entry for a tensor, its name left out, at most."""
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def part_directory(target: Path) -> Path:
    """Where a directory is while it is being made."""
    return target.with_name(f"{target.name}.part")


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class GrowingFile:
    """One file.

    Args:
        header_bytes: kept for the header, its length included.
        pages: whether every tensor begins on a page.
    """

    def __init__(self, path: Path, header_bytes: int, pages: bool):
        self.header_bytes, self.pages = -(-header_bytes // PAGE_BYTES) * PAGE_BYTES, pages
        self.entries: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")

    @property
    def end(self) -> int:
        """Bytes of tensors so far."""
        return max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)

    def rewind(self) -> None:
        """Cut off what is behind the complete tensors."""
        self._file.truncate(self.header_bytes + self.end)
        self._file.seek(self.header_bytes + self.end)

    def add(self, name: str, dtype: str, shape: Iterable[int], blocks: Iterable[torch.Tensor]) -> None:
        """Append a tensor, which comes in blocks."""
        self.begin(name, dtype, shape)
        for block in blocks:
            self.write(block)
        self.complete()

    def begin(self, name: str, dtype: str, shape: Iterable[int]) -> None:
        """The next bytes are those of this tensor."""
        start = self.end
        self.entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start]}

    def write(self, block: torch.Tensor) -> None:
        """Bytes of the tensor that was begun last."""
        self._file.write(raw(block))
        next(reversed(self.entries.values()))["data_offsets"][1] += block.nbytes

    def complete(self) -> None:
        """All bytes of the tensor are there."""
        gap = -self.end % PAGE_BYTES
        if self.pages and gap:
            name = next(reversed(self.entries))
            self.begin(f"{name}{FILLER}", "U8", [gap])
            self.write(torch.zeros(gap, dtype=torch.uint8))

    def flush(self) -> None:
        """Have it on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header, where metadata are given, and close the file."""
        if metadata is not None:
            header = json.dumps({"__metadata__": dict(metadata), **self.entries}, separators=(",", ":")).encode()
            room = self.header_bytes - 8
            if len(header) > room:
                raise RuntimeError(f"a header of {len(header)} bytes was given {room}")
            self._file.seek(0)
            self._file.write(room.to_bytes(8, "little") + header.ljust(room))
            self.flush()
        self._file.close()


class Making:
    """A directory that is being made, perhaps by several runs one after the other.

    Attributes:
        directory: where it is meanwhile.
        files: by name.
        notes: of each complete piece of work, by its name.
    """

    def __init__(self, target: Path, begun_with: Mapping[str, Any], files: Mapping[str, int], pages: bool):
        """Begin, or go on where a run that was begun with the same settings left off; with others, begin again.

        Args:
            begun_with: JSON.
            files: name -> bytes of its header, at most.

        Raises:
            CatsError: the directory exists already, or another run is at it.
        """
        check_free(target)
        self.target, self.directory = target, part_directory(target)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CatsError(f"another run is writing {self.directory}; wait for it.") from error
        lines = self._journal_lines()
        if not lines or lines[0] != json.loads(json.dumps(begun_with)):
            lines = [dict(begun_with)]
            for path in self.directory.iterdir():
                if path.name != "lock":
                    path.unlink()
        self.files = {name: GrowingFile(self.directory / name, header, pages) for name, header in files.items()}
        self.notes: dict[str, str] = {}
        for line in lines[1:]:
            self.notes[line["name"]] = line["note"]
            for name, entries in line["entries"].items():
                self.files[name].entries |= entries
        for file in self.files.values():
            file.rewind()
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (self.directory / JOURNAL).write_text(text, encoding="utf-8")
        self._written = {name: len(file.entries) for name, file in self.files.items()}

    def _journal_lines(self) -> list[dict[str, Any]]:
        """What earlier runs have noted, up to a line that was cut short."""
        path = self.directory / JOURNAL
        lines: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def note(self, name: str, note: str) -> None:
        """A piece of work is complete: it will not be done again."""
        entries = {}
        for path, file in self.files.items():
            fresh = dict(list(file.entries.items())[self._written[path] :])
            if fresh:
                file.flush()
                entries[path] = fresh
                self._written[path] = len(file.entries)
        self.notes[name] = note
        with (self.directory / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{json.dumps({'name': name, 'note': note, 'entries': entries})}\n")
            journal.flush()
            os.fsync(journal.fileno())

    def finish(self, metadata: Mapping[str, str], texts: Mapping[str, str], copied: Iterable[Path]) -> None:
        """Write headers, small files and copies of others, and give the directory its name."""
        for file in self.files.values():
            file.close(metadata)
        for path in copied:
            shutil.copyfile(path, self.directory / path.name)
        for name, text in texts.items():
            (self.directory / name).write_text(text, encoding="utf-8")
        for name in (JOURNAL, "lock"):
            (self.directory / name).unlink()
        self._lock.close()
        if self.target.exists():
            self.target.rmdir()  # it is empty, as was checked
        self.directory.rename(self.target)

    def close(self) -> None:
        """Stop here; another run may go on."""
        for file in self.files.values():
            file.close()
        self._lock.close()


def check_free(target: Path) -> None:
    """Raise `CatsError` where something is at a place already."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CatsError(f"{target} is there already; remove it, or give another place.")


def written_bytes(target: Path) -> int:
    """Bytes that interrupted runs have left for a directory."""
    part = part_directory(target)
    return sum(path.stat().st_size for path in part.iterdir()) if part.is_dir() else 0


def index_of(files: Mapping[str, GrowingFile]) -> str:
    """An index in the layout of the hub: which file holds which tensor."""
    entries = [(name, path, entry) for path, file in files.items() for name, entry in file.entries.items() if not name.endswith(FILLER)]
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, _, entry in entries)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": {name: path for name, path, _ in entries}}, indent=1) + "\n"
