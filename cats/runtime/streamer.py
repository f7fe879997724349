"""Streaming weights: one thread reads them ahead, round and round in the order of use, through a ring of memory.

The ring is a circular byte buffer that holds the *windows* of tensors (whole 4096-byte blocks, see cats/runtime/direct_file.py)
first in, first out. The reader fills it as far as there is room, past the end of a pass into the next one, so that the
flash works while the model computes. The consumer asks for one tensor at a time, in order, or keeps several until it is done
with all of them; what it holds is never overwritten. Asking out of order (an answer was abandoned, an exception unwound) drops
what was read ahead and starts there.
A file that changes on the disk is noticed when the next pass begins, or at once if it has become too short.

Threads: the reader writes into slots that are not ready yet, the consumer reads the oldest slot once it is ready; everything else
about the ring changes under one lock. Do not fork while a streamer is open: a child has no reader.
"""

import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch

from cats.checkpoint import TensorPlace
from cats.errors import CatsError
from cats.runtime.arena import PAGE_BYTES, Arena
from cats.runtime.direct_file import DirectFile, Read, requests, tensor_in_window, window, window_bytes
from cats.runtime.link import Link

POLL_SECONDS = 0.2
"""How often a wait looks whether the reader is still alive."""
COPY_SECONDS = 0.0005
"""How often it is looked whether a device has copied what it was to copy."""
JOIN_SECONDS = 5.0
"""How long closing waits for a request that the device does not answer."""
MOST_EVENTS = 100_000
MODES = ("direct", "uncached", "buffered")


@dataclass(frozen=True)
class Streamed:
    """A tensor that is read again in every pass."""

    name: str
    place: TensorPlace

    @property
    def what(self) -> str:
        """As errors name it: "layer 7, mlp.up_proj"."""
        match = re.search(r"(?:^|\.)layers\.(\d+)\.(.+?)(?:\.weight)?$", self.name)
        return f"layer {match[1]}, {match[2]}" if match else self.name


class Arrival(Protocol):
    """The use of a tensor in the ring by others: a copy under way on a device (`torch.cuda.Event`), or a product in other threads."""

    def query(self) -> bool:
        """Whether it is over."""
        ...


class Event(NamedTuple):
    """One tensor's reading, for timelines; seconds of `time.perf_counter`."""

    start: float
    end: float
    name: str
    nbytes: int


@dataclass
class Slot:
    """`length` bytes from byte `start` of the ring, for the tensor with this index in the order."""

    index: int
    start: int
    length: int
    filled: int = 0
    ready: bool = False
    dropped: bool = False
    busy: "Arrival | None" = None


class Ring:
    """First-in-first-out places in a circular buffer of `nbytes`; arithmetic only, the caller locks."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.slots: deque[Slot] = deque()

    def reserve(self, index: int, length: int) -> Slot | None:
        """Room for `length` bytes behind the newest slot (from the beginning, where the end is too near); None if there is none."""
        start = self._room(length)
        if start is None:
            return None
        slot = Slot(index, start, length)
        self.slots.append(slot)
        return slot

    def can_take(self, lengths: Iterable[int]) -> bool:
        """Whether so many slots more would find room, one after the other, with nothing released."""
        trial = Ring(self.nbytes)
        trial.slots.extend(self.slots)
        return all(trial.reserve(0, length) is not None for length in lengths)

    def close_gap(self) -> tuple[int, int, int]:
        """Make what is free one stretch, by moving the slots up to the wrap to where the others leave off; what is to be moved:
        (source, destination, bytes)."""
        slots = list(self.slots)
        wrap = next((place for place in range(1, len(slots)) if slots[place].start < slots[place - 1].start), len(slots))
        source = slots[0].start
        nbytes = slots[wrap - 1].start + slots[wrap - 1].length - source
        destination = 0 if wrap == len(slots) else self.nbytes - nbytes
        for slot in slots[:wrap]:
            slot.start += destination - source
        return source, destination, nbytes

    def _room(self, length: int) -> int | None:
        if not self.slots:
            return 0 if length <= self.nbytes else None
        front, newest = self.slots[0].start, self.slots[-1]
        back = newest.start + newest.length
        if newest.start < front:  # wrapped around: free is what lies between the newest and the oldest
            return back if length <= front - back else None
        if length <= self.nbytes - back:
            return back
        return 0 if length <= front else None


def smallest_ring(order: Sequence[Streamed]) -> int:
    """Bytes of the smallest ring that can stream `order`: the largest window."""
    return max(window_bytes(streamed.place) for streamed in order)


def ring_for(order: Sequence[Streamed], buffers: int) -> int:
    """Bytes of a ring of `buffers` times the largest window."""
    return buffers * smallest_ring(order)


class Streamer:
    """The consumer's side.

    Attributes:
        bytes_taken: windows of the tensors that were handed out.
        wait_seconds: spent waiting for tensors to arrive.
        waits: begin and end of each of these waits, in seconds of `time.perf_counter`, while `record` is set.
        record: whether readings are kept in `events`, and waits (the last 100 000 of each); off unless set.
    """

    def __init__(self, order: Sequence[Streamed], ring_bytes: int, link: Link, read: Read | None = None) -> None:
        """Open the files and reserve the ring; the first tensor asked for starts the reader.

        Args:
            order: what one pass reads, in the order of use; names must differ.
            ring_bytes: at least `smallest_ring(order)`.
            link: counts and throttles; one link per streamer.
            read: stands in for `os.preadv` in tests.

        Raises:
            CatsError: a file cannot be opened, or the ring is too small.
        """
        self.order = tuple(order)
        self._indices = {streamed.name: index for index, streamed in enumerate(self.order)}
        if not self.order or len(self._indices) < len(self.order):
            raise ValueError("a streamer needs at least one tensor, and every name once")
        largest = max(self.order, key=lambda streamed: window_bytes(streamed.place))
        if ring_bytes < window_bytes(largest.place):
            raise CatsError(
                f"a ring of {ring_bytes} bytes cannot hold {largest.what}; give it at least {window_bytes(largest.place)} bytes."
            )
        self._reader = _Reader(self.order, ring_bytes, link, read)
        self._close = weakref.finalize(self, self._reader.close)
        self.ring_bytes = ring_bytes
        self.link = link
        self.bytes_taken = 0
        self.wait_seconds = 0.0
        self.waits: deque[tuple[float, float]] = deque(maxlen=MOST_EVENTS)
        self._in_use: list[Slot] = []
        self._kept: dict[str, torch.Tensor] | None = None

    @property
    def bytes_read(self) -> int:
        """What the device was asked for so far, what was read ahead included."""
        return sum(file.bytes_read for file in self._reader.files.values())

    @property
    def arena(self) -> Arena:
        """The memory of the ring."""
        return self._reader.arena

    @property
    def bytes_discarded(self) -> int:
        """What was read ahead and dropped by restarts."""
        return self._reader.bytes_discarded

    @property
    def mode(self) -> str:
        """How the files are read: "direct", "uncached" or "buffered" (see `DirectFile`); the lesser one if they differ."""
        return max((file.mode for file in self._reader.files.values()), key=MODES.index)

    @property
    def events(self) -> Sequence[Event]:
        """The readings since `record` was set, oldest first."""
        return tuple(self._reader.events)

    @property
    def record(self) -> bool:
        return self._reader.record

    @record.setter
    def record(self, value: bool) -> None:
        self._reader.record = value

    @contextmanager
    def tensor(self, name: str) -> Iterator[torch.Tensor]:
        """Wait for a tensor; the view of it in the ring is valid inside the `with` block, one block at a time.

        Inside a `keeping` block it stays until that ends, and may be asked for again.

        Raises:
            CatsError: it cannot be read, a file changed, the reader ended or the streamer was closed; so does every later call.
            KeyError: no such name.
        """
        if self._kept is not None:
            if name not in self._kept:
                self._kept[name] = self._take(name)
            yield self._kept[name]
            return
        if self._in_use:
            raise RuntimeError(f"{self.order[self._in_use[0].index].name} is still in use; leave its `with` block first")
        try:
            yield self._take(name)
        finally:
            self._release()

    @contextmanager
    def keeping(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the block these tensors, which follow on one another in the order, stay in the ring from when they are first asked for.

        The ring must hold all of them; those that are not asked for are as good as any other tensor.
        """
        if self._in_use or self._kept is not None:
            raise RuntimeError("tensors are still in use; leave their `with` block first")
        self._kept = {}
        try:
            self._reader.make_room([self._indices[name] for name in names])
            yield
        finally:
            self._kept = None
            self._release()

    @property
    def keeps(self) -> bool:
        """Whether a `keeping` block is open."""
        return self._kept is not None

    def busy_until(self, used: Arrival) -> None:
        """Keep the places of the tensors in hand until their use is over (a device has copied them), also when their block has ended; of
        those that wait for a use already, that of the last one."""
        for place, slot in enumerate(self._in_use, start=1):
            if slot.busy is None or place == len(self._in_use):
                slot.busy = used

    def _take(self, name: str) -> torch.Tensor:
        """Wait for a tensor, behind those in use."""
        index = self._indices[name]
        if index == 0:
            self._reader.check_files()
        begin = time.perf_counter()
        try:
            slot = self._reader.await_slot(index, len(self._in_use))
            self._in_use.append(slot)
        finally:
            end = time.perf_counter()
            self.wait_seconds += end - begin
            if self.record:
                self.waits.append((begin, end))
        self.bytes_taken += slot.length
        return tensor_in_window(self._reader.arena, slot.start, self.order[index].place)

    def _release(self) -> None:
        for slot in self._in_use:
            self._reader.release(slot)
        self._in_use = []

    def close(self) -> None:
        """End the reader and close the files; a wait in another thread ends with an error. An unreachable streamer closes itself."""
        self._close()


class _Reader:
    """The thread and what it shares with the consumer; knows no `Streamer`, so that a forgotten one can be collected."""

    def __init__(self, order: Sequence[Streamed], ring_bytes: int, link: Link, read: Read | None) -> None:
        self.order, self.link = order, link
        self.files = {path: DirectFile(path, read) for path in dict.fromkeys(streamed.place.path for streamed in order)}
        self.arena = Arena(ring_bytes)
        self.bytes_discarded = 0
        self.record = False
        self.events: deque[Event] = deque(maxlen=MOST_EVENTS)
        self._ring = Ring(ring_bytes)
        self._changed = threading.Condition()
        self._next = 0
        self._leaving = 0
        self._paused = False
        self._error: str | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def await_slot(self, index: int, in_use: int) -> Slot:
        """The oldest slot behind `in_use` others, once it is ready; it holds tensor `index`. Wakes up for signals, errors, closing and a
        dead thread."""
        with self._changed:
            self.go_to(index, in_use)
            while (slot := self._slot(in_use)) is None or not slot.ready or self._closed:
                if self._closed:
                    raise CatsError(f"the weights' reader was closed before {self.order[index].what} was read; load the model again.")
                if self._error is not None:
                    raise CatsError(self._error)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="weights-reader", daemon=True)
                    self._thread.start()
                elif not self._thread.is_alive():
                    raise self._death(index)
                self._changed.wait(POLL_SECONDS)
            return slot

    def _slot(self, in_use: int) -> Slot | None:
        """The oldest slot behind those that are leaving and `in_use` others."""
        place = self._leaving + in_use
        return self._ring.slots[place] if len(self._ring.slots) > place else None

    def make_room(self, indices: Sequence[int]) -> None:
        """Let the ring hold all of these tensors at once, the first of which is to be taken next. What was read of them may be moved."""
        lengths = [window_bytes(self.order[index].place) for index in indices]
        if sum(lengths) > self.arena.nbytes:
            raise RuntimeError(f"a ring of {self.arena.nbytes} bytes cannot hold {sum(lengths)} at once")
        with self._changed:
            self.go_to(indices[0], 0)
            if self._ring.can_take(lengths[len(self._ring.slots) - self._leaving :]):
                return
            self._paused = True
            try:
                while not (self._reclaimed() and all(slot.ready for slot in self._ring.slots)) and not self._over:
                    self._changed.wait(COPY_SECONDS if self._leaving else POLL_SECONDS)
                if not self._over and self._ring.slots:
                    self.arena.move(*self._ring.close_gap())
            finally:
                self._paused = False
                self._changed.notify_all()

    @property
    def _over(self) -> bool:
        """Whether nothing more will be read; taking a tensor then says why."""
        return self._closed or self._error is not None or self._thread is None or not self._thread.is_alive()

    def release(self, slot: Slot) -> None:
        """The consumer is done with the oldest slot, a device perhaps not yet."""
        with self._changed:
            if self._slot(0) is slot:
                self._leaving += 1
                self._reclaimed()
            self._changed.notify_all()

    def _reclaimed(self) -> bool:
        """Forget the slots that are done with; whether there is none left that a device still copies."""
        while self._leaving and ((busy := self._ring.slots[0].busy) is None or busy.query()):
            self._ring.slots.popleft()
            self._leaving -= 1
        return self._leaving == 0

    def go_to(self, index: int, in_use: int) -> None:
        """Make tensor `index` the next one to be taken behind `in_use` others; if it is not already, what was read ahead is dropped."""
        with self._changed:
            slot = self._slot(in_use)
            if index != (self._next if slot is None else slot.index):
                if in_use:
                    raise RuntimeError(f"{self.order[index].name} does not follow on what is in use")
                self._drop_all()
                self._next = index
                self._changed.notify_all()

    def _drop_all(self) -> None:
        """A request under way is let finish, and counted as dropped when it has."""
        while len(self._ring.slots) > self._leaving:
            slot = self._ring.slots.pop()
            slot.dropped = True
            self.bytes_discarded += slot.filled

    def check_files(self) -> None:
        """Notice files that were changed, replaced or cut short since they were opened: nothing read from them is of use then."""
        for path, file in self.files.items():
            first = next(streamed for streamed in self.order if streamed.place.path == path)
            try:
                file.check_unchanged(first.what)
            except CatsError as error:
                with self._changed:
                    self._drop_all()
                    self._fail(error)
                raise

    def close(self) -> None:
        """End the thread after the request under way, then close the files."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
            if self._thread.is_alive():
                return  # the device does not answer: the files stay open under the request
        for file in self.files.values():
            file.close()

    def _run(self) -> None:
        try:
            while (slot := self._reserve()) is not None:
                self._fill(slot)
        except CatsError as error:
            self._fail(error)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _reserve(self) -> Slot | None:
        """The next slot to fill, once there is room; None when closed or failed."""
        with self._changed:
            while not self._closed and self._error is None:
                length = window_bytes(self.order[self._next].place)
                self._reclaimed()
                slot = None if self._paused else self._ring.reserve(self._next, length)
                if slot is not None:
                    self._next = (self._next + 1) % len(self.order)
                    return slot
                self._changed.wait(COPY_SECONDS if self._leaving else None)
                self.link.rest()
        return None

    def _fill(self, slot: Slot) -> None:
        """Read a tensor's window piece by piece; give up between two pieces if nobody wants it any more."""
        streamed = self.order[slot.index]
        file, place = self.files[streamed.place.path], streamed.place
        offset, _ = window(place.offset, place.nbytes)
        begin = time.perf_counter()
        for start, nbytes in requests(place.offset + place.nbytes - offset, self.link.chunk_bytes):
            length = -(-nbytes // PAGE_BYTES) * PAGE_BYTES
            view = self.arena.view[slot.start + start : slot.start + start + length]
            self.link.carry(length, partial(file.read_into, view, offset + start, nbytes, streamed.what))
            if not self._arrived(slot, length):
                return
        if self.record:
            self.events.append(Event(begin, time.perf_counter(), streamed.name, slot.length))

    def _arrived(self, slot: Slot, length: int) -> bool:
        """Note a piece; the last one makes the slot ready. False if the rest is not wanted."""
        with self._changed:
            if slot.dropped:
                self.bytes_discarded += length
            slot.filled += length
            if slot.filled == slot.length:
                slot.ready = True
                self._changed.notify_all()
            return not (slot.dropped or self._closed)

    def _fail(self, error: CatsError) -> None:
        with self._changed:
            self._error = self._error or str(error)
            self._changed.notify_all()

    def _death(self, index: int) -> CatsError:
        streamed = self.order[index]
        return CatsError(f"the thread that reads {streamed.place.path} ended before {streamed.what} was read; load the model again.")
