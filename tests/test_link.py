"""The throttle's schedule, by an injected clock, and which rates it accepts."""

import random
from pathlib import Path

import pytest

from cats.errors import CatsError
from cats.runtime.direct_file import REQUEST_BYTES
from cats.runtime.link import Link, check_rate, measure_read_rate


class Clock:
    """A clock that only sleeping and working move; sleeps last a little longer than asked."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self.late = 100.0, late

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.late


def link(rate: float | None, clock: Clock) -> Link:
    return Link(rate, clock, clock.sleep)


def carry(wire: Link, clock: Clock, nbytes: int, seconds: float) -> float:
    """Carry with a disk that takes `seconds`; when it was there."""

    def transfer() -> None:
        clock.now += seconds

    wire.carry(nbytes, transfer)
    return clock.now


def test_every_chunk_comes_when_it_is_due() -> None:
    clock = Clock()
    wire = link(1e9, clock)
    for count in range(1, 50):
        assert carry(wire, clock, 10**7, 0.004) == pytest.approx(100 + 0.01 * count)
    assert wire.bytes == 49 * 10**7
    assert wire.busy_seconds == pytest.approx(0.49)


def test_late_wake_ups_do_not_add_up() -> None:
    clock = Clock(late=0.002)
    wire = link(1e9, clock)
    for count in range(1, 50):
        assert carry(wire, clock, 10**7, 0.004) == pytest.approx(100 + 0.01 * count + 0.002)


def test_credit_is_one_chunk_at_most() -> None:
    """After a second in which one chunk came, the link does not make up for the whole second."""
    clock = Clock()
    wire = link(1e9, clock)
    carry(wire, clock, wire.chunk_bytes, 1.0)
    chunk = wire.chunk_bytes / 1e9
    late = clock.now
    for count in range(1, 10):
        assert carry(wire, clock, wire.chunk_bytes, 0.0) == pytest.approx(late + chunk * max(0, count - 1))


def test_no_stretch_of_time_carries_more_than_the_rate_and_one_chunk() -> None:
    draw = random.Random(0)
    clock = Clock()
    wire = link(1e9, clock)
    carried: list[tuple[float, int]] = [(clock.now, 0)]
    for _ in range(400):
        carry(wire, clock, wire.chunk_bytes, draw.choice([0.0, 0.005, 0.02, 0.1]))
        carried.append((clock.now, wire.bytes))
    for first in range(0, 400, 7):
        for last in range(first + 1, 401):
            seconds, nbytes = carried[last][0] - carried[first][0], carried[last][1] - carried[first][1]
            assert nbytes <= 1e9 * seconds + 2 * wire.chunk_bytes + 1  # one of credit, one that was under way


def test_idle_time_earns_no_credit() -> None:
    clock = Clock()
    wire = link(1e9, clock)
    carry(wire, clock, 10**7, 0.0)
    clock.now += 5
    wire.rest()
    assert carry(wire, clock, 10**7, 0.004) == pytest.approx(105.02)


def test_an_unthrottled_link_never_sleeps() -> None:
    clock = Clock()
    wire = link(None, clock)
    assert carry(wire, clock, 10**9, 0.5) == 100.5
    wire.rest()
    assert (wire.label, wire.chunk_bytes, wire.bytes, wire.busy_seconds) == ("unthrottled", REQUEST_BYTES, 10**9, 0.5)


@pytest.mark.parametrize(
    ("rate", "label", "chunk"),
    [
        (1e9, "emulated 1.00 GB/s", 9998336),
        (5e9, "emulated 5.00 GB/s", REQUEST_BYTES),
        (1e6, "emulated 1.00 MB/s", 8192),
        (1e5, "emulated 0.10 MB/s", 4096),
    ],
)
def test_slow_links_flow_in_small_pieces(rate: float, label: str, chunk: int) -> None:
    wire = Link(rate)
    assert (wire.label, wire.chunk_bytes) == (label, chunk)


@pytest.mark.parametrize("rate", [0, -1e9, float("inf"), float("nan")])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(CatsError, match="above 0"):
        Link(rate)


def test_a_rate_near_the_disks_own_is_refused() -> None:
    check_rate(None, 1e9)
    check_rate(0.8e9, 1e9)
    with pytest.raises(CatsError, match=r"cannot emulate 0\.90 GB/s: .* measured at 1\.00 GB/s.* 0\.80 GB/s or less"):
        check_rate(0.9e9, 1e9)


def test_the_disks_rate_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cats.runtime.link.MEASURED_SECONDS", 0.05)
    (tmp_path / "file").write_bytes(bytes(300_001))
    assert 1e5 < measure_read_rate(tmp_path / "file") < 1e12
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CatsError, match="is empty"):
        measure_read_rate(tmp_path / "file")
