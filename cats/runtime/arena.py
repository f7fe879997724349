"""Memory for weights that come from a file: one private anonymous mapping, on huge pages where the system has them.

A mapping begins on a page, as direct reads require, and huge pages make such reads up to three times as fast. Pages are
taken from the system when they are first written, so an arena costs what was put into it.
"""

import contextlib
import ctypes
import math
import mmap

import torch

PAGE_BYTES = 4096
"""Direct reads want offset, address and length in multiples of this."""


class Arena:
    """`nbytes` of memory that begins on a page; tensors in it share it and keep it alive."""

    def __init__(self, nbytes: int) -> None:
        """Reserve the address space.

        Args:
            nbytes: at least 1; rounded up to whole pages of 4096 bytes.
        """
        self.nbytes = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
        self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without huge pages: slower, not wrong
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The bytes from `start` on as a tensor, without a copy.

        Raises:
            ValueError: `start` is no multiple of the element size, or the tensor ends outside the arena.
        """
        count = math.prod(shape)
        if start % dtype.itemsize or not 0 <= start <= self.nbytes - count * dtype.itemsize:
            raise ValueError(f"no place for {list(shape)} of {dtype} at byte {start} of an arena of {self.nbytes}")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)

    def move(self, source: int, destination: int, nbytes: int) -> None:
        """Copy bytes inside the arena; the two ranges may overlap, and other threads run meanwhile."""
        if min(source, destination) < 0 or max(source, destination) + nbytes > self.nbytes:
            raise ValueError(f"bytes {source} or {destination} to {nbytes} further lie outside an arena of {self.nbytes}")
        ctypes.memmove(self._address + destination, self._address + source, nbytes)
