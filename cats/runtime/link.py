"""The wire between flash and memory: how many bytes went over it, and, where a slower flash is imitated, when.

An emulated rate is kept on an absolute schedule: bytes that came early are held back until they are due, so that late
wake-ups do not add up. Every figure taken behind a throttled link carries its `label`.
"""

import time
from collections.abc import Callable
from pathlib import Path

from cats.errors import CatsError
from cats.runtime.arena import PAGE_BYTES, Arena
from cats.runtime.direct_file import REQUEST_BYTES, DirectFile

CHUNK_SECONDS = 0.01
"""A throttled link asks for this much at a time, where that is less than a full request, so that slow links flow smoothly."""
FAITHFUL_SHARE = 0.8
"""Largest share of the disk's own rate that can be emulated: above it the disk's own unevenness shows through."""
MEASURED_BYTES = 2**30
MEASURED_SECONDS = 1.0


class Link:
    """Counts what is carried, and holds it back to a given rate.

    Attributes:
        bytes: carried so far.
        busy_seconds: spent carrying, held back or not.
        chunk_bytes: how much should be carried at a time, a multiple of 4096.
        label: "unthrottled" or "emulated 1.00 GB/s"; goes with every figure.
    """

    def __init__(
        self,
        bytes_per_second: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Set up the link.

        Args:
            bytes_per_second: the rate to imitate; None leaves the disk as it is.
            clock: seconds.
            sleep: waits for so many seconds.
        """
        if bytes_per_second is not None and not 0 < bytes_per_second < float("inf"):
            raise CatsError(f"a link cannot carry {bytes_per_second:g} bytes per second; give a rate above 0.")
        self.bytes_per_second = bytes_per_second
        self.bytes = 0
        self.busy_seconds = 0.0
        self.chunk_bytes = REQUEST_BYTES
        self.label = "unthrottled"
        if bytes_per_second is not None:
            blocks = int(bytes_per_second * CHUNK_SECONDS) // PAGE_BYTES
            self.chunk_bytes = min(REQUEST_BYTES, max(1, blocks) * PAGE_BYTES)
            self.label = f"emulated {rate_text(bytes_per_second)}"
        self._clock, self._sleep = clock, sleep
        self._due: float | None = None

    def carry(self, nbytes: int, transfer: Callable[[], object]) -> None:
        """Call `transfer`, which moves `nbytes` bytes, and return no sooner than the rate allows.

        A transfer that comes late may catch up with the schedule by at most one chunk.
        """
        begin = self._clock()
        transfer()
        if self.bytes_per_second is not None:
            due = begin if self._due is None else max(self._due, begin - self.chunk_bytes / self.bytes_per_second)
            self._due = due + nbytes / self.bytes_per_second
            ahead = self._due - self._clock()
            if ahead > 0:
                self._sleep(ahead)
        self.bytes += nbytes
        self.busy_seconds += self._clock() - begin

    def rest(self) -> None:
        """Nothing was to be carried up to now: time in which the link lay idle earns no credit."""
        if self._due is not None:
            self._due = max(self._due, self._clock())


def rate_text(bytes_per_second: float) -> str:
    """Like "1.00 GB/s"; MB/s below 100 MB/s."""
    if bytes_per_second < 1e8:
        return f"{bytes_per_second / 1e6:.2f} MB/s"
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def measure_read_rate(path: Path) -> float:
    """Bytes per second of a direct sequential read of the file at `path`: up to 1 GiB or 1 s of it, small files again and again."""
    arena = Arena(REQUEST_BYTES + PAGE_BYTES)
    file = DirectFile(path)
    size = path.stat().st_size
    if size == 0:
        raise CatsError(f"{path} is empty, so no read rate can be measured; fetch it again.")
    file.read_into(arena.view, 0, min(size, REQUEST_BYTES))
    done, offset, begin = 0, 0, time.perf_counter()
    while done < MEASURED_BYTES and (done == 0 or time.perf_counter() - begin < MEASURED_SECONDS):
        length = min(REQUEST_BYTES, size - offset)
        file.read_into(arena.view, offset, length)
        done += length
        offset = offset + length if offset + length < size else 0
    seconds = time.perf_counter() - begin
    file.close()
    return done / seconds


def check_rate(bytes_per_second: float | None, measured: float) -> None:
    """Refuse to imitate a flash that this disk cannot stand in for.

    Args:
        bytes_per_second: the rate asked for; None asks for nothing.
        measured: bytes per second of this disk, from `measure_read_rate`.
    """
    if bytes_per_second is not None and bytes_per_second > FAITHFUL_SHARE * measured:
        raise CatsError(
            f"cannot emulate {rate_text(bytes_per_second)}: this disk was measured at {rate_text(measured)}, and only "
            f"{FAITHFUL_SHARE:g} of that can be emulated faithfully; ask for {rate_text(FAITHFUL_SHARE * measured)} or less."
        )
