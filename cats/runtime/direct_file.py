"""Reading a file past the page cache, into memory that the caller owns.

Linux: O_DIRECT, where offset, address and length must be multiples of 4096, so a tensor is read as the *window* of whole
blocks around it. macOS: F_NOCACHE. Where a file system refuses (tmpfs does), ordinary reads whose pages are dropped from
the cache behind them. A read error, a file that ends too early and a file that changed on the disk raise a sentence that
names the file and what was being read.
"""

import errno
import fcntl
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cats.checkpoint import TensorPlace
from cats.errors import CatsError
from cats.runtime.arena import PAGE_BYTES, Arena

REQUEST_BYTES = 16 * 2**20
"""Usual request (a rest below half of it rides along with the last one); larger ones are hardly faster."""

Read = Callable[[int, list[memoryview], int], int]
"""Descriptor, buffers, offset -> bytes read; what `os.preadv` does."""


def window(offset: int, nbytes: int) -> tuple[int, int]:
    """(offset, length) of the whole blocks around `nbytes` bytes at `offset`; at least one block."""
    start = offset - offset % PAGE_BYTES
    return start, max(PAGE_BYTES, -(-(offset + nbytes - start) // PAGE_BYTES) * PAGE_BYTES)


def window_bytes(place: TensorPlace) -> int:
    """What a tensor takes in an arena: the length of its window."""
    return window(place.offset, place.nbytes)[1]


def requests(nbytes: int, largest: int) -> Iterator[tuple[int, int]]:
    """Cut `nbytes` into (start, length) pieces of `largest` bytes; a rest below half of that joins the last."""
    start = 0
    while nbytes - start > largest + largest // 2:
        yield start, largest
        start += largest
    yield start, nbytes - start


class DirectFile:
    """A file open for reading past the page cache.

    Attributes:
        mode: "direct" (O_DIRECT), "uncached" (F_NOCACHE) or "buffered" (pages dropped behind the reader).
        bytes_read: what the device was asked for.
    """

    def __init__(self, path: Path, read: Read | None = None) -> None:
        """Open the file and note its size, inode and time of change.

        Args:
            path: the file; it must stay as it is while it is open.
            read: stands in for `os.preadv` in tests.
        """
        self.path = path
        self.bytes_read = 0
        self._read = read or os.preadv
        try:
            self._descriptor, self.mode = _open_past_the_cache(path)
        except OSError as error:
            raise CatsError(f"cannot open {path} ({error.strerror}); check that it is there and readable.") from error
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._opened = os.fstat(self._descriptor)

    def read_into(self, view: memoryview, offset: int, nbytes: int, what: str = "a tensor") -> None:
        """Fill `view` with the file's bytes from `offset` on until `nbytes` are there.

        Args:
            view: whole blocks (at least `nbytes`), beginning on a page.
            offset: a multiple of 4096.
            nbytes: how many are needed; the rest of the last block comes along where the file has it.
            what: named in errors, like "layer 7, mlp.up_proj".

        Raises:
            CatsError: the device failed, or the file ended before `nbytes`.
        """
        for start, length in requests(nbytes, REQUEST_BYTES):
            end = start - (-length // PAGE_BYTES) * PAGE_BYTES
            self._fill(view[start:end], offset + start, length, what)

    def check_unchanged(self, what: str = "a tensor") -> None:
        """Raise if the path no longer leads to the file that was opened, or that file was written to since.

        Args:
            what: named in the error: what was to be read.
        """
        try:
            now = os.stat(self.path)
        except OSError as error:
            raise CatsError(
                f"{self.path} went away ({error.strerror}) while {what} was being read; put it back, then run again."
            ) from error
        if now.st_size < self._opened.st_size:
            raise CatsError(
                f"{self.path} was cut short, from {self._opened.st_size} to {now.st_size} bytes, while {what} was being read; "
                "fetch it again."
            )
        if _identity(now) != _identity(self._opened):
            raise CatsError(f"{self.path} was changed or replaced while {what} was being read; leave it alone and run again.")

    def close(self) -> None:
        """Give the descriptor back; an unreachable file does so by itself."""
        self._close()
        self._descriptor = -1

    def _fill(self, view: memoryview, offset: int, nbytes: int, what: str) -> None:
        done = 0
        while done < nbytes:
            try:
                count = self._read(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self.mode == "direct":
                    self._leave_direct()
                    continue
                raise CatsError(f"cannot read {what} from {self.path} ({error.strerror}); check the disk, then run again.") from error
            self.bytes_read += count
            if self.mode == "buffered":
                self._drop_pages(offset + done, count)
            if done + count >= nbytes:
                return
            step = count - count % PAGE_BYTES if self.mode == "direct" else count
            self.check_unchanged(what)
            if step == 0:
                raise CatsError(
                    f"{self.path} is cut short: it ends at byte {offset + done + count}, before the end of {what}; fetch it again."
                )
            done += step

    def _leave_direct(self) -> None:
        """The file system took O_DIRECT on opening but not for this read: go on through the page cache."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.mode = "buffered"

    def _drop_pages(self, offset: int, nbytes: int) -> None:
        if hasattr(os, "posix_fadvise"):
            start = offset - offset % PAGE_BYTES
            os.posix_fadvise(self._descriptor, start, offset + nbytes - start, os.POSIX_FADV_DONTNEED)


def read_tensor_into(file: DirectFile, place: TensorPlace, arena: Arena, start: int, what: str = "a tensor") -> torch.Tensor:
    """Read one tensor into `window_bytes(place)` bytes of the arena from `start` (a multiple of 4096) on; a view of it, as stored.

    Args:
        what: named in errors, like "layer 7, mlp.up_proj".
    """
    offset, length = window(place.offset, place.nbytes)
    file.read_into(arena.view[start : start + length], offset, place.offset + place.nbytes - offset, what)
    return tensor_in_window(arena, start, place)


def tensor_in_window(arena: Arena, start: int, place: TensorPlace) -> torch.Tensor:
    """The tensor whose window was read to `start`.

    A tensor may lie at any byte of its file. Where that is no multiple of its element size, its bytes are moved, once, to
    the beginning of the window: call this once per reading.
    """
    first = start + place.offset % PAGE_BYTES
    if first % place.dtype.itemsize:
        arena.move(first, start, place.nbytes)
        first = start
    return arena.tensor(first, place.dtype, place.shape)


def _open_past_the_cache(path: Path) -> tuple[int, str]:
    """A descriptor and how it reads."""
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), "direct"
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    descriptor = os.open(path, os.O_RDONLY)
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return descriptor, "uncached"
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor, "buffered"


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
