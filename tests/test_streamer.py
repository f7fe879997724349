"""Streaming through the ring: the bytes are the file's whatever its size, and every fault ends in a sentence, never in a hang."""

import errno
import gc
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cats.checkpoint import locate_tensors
from cats.errors import CatsError
from cats.runtime.arena import PAGE_BYTES
from cats.runtime.direct_file import DirectFile, Read, window_bytes
from cats.runtime.link import Link
from cats.runtime.streamer import Ring, Slot, Streamed, Streamer, ring_for, smallest_ring
from tests.stored_tensors import as_bytes, fail_at, random_tensor, random_tensors, read_shortly, write_tensors

LAYERS = 8
PROMPT = 3.0
"""Seconds within which a wait must end; generous, since a hang is what is looked for."""


def order_of(directory: Path) -> list[Streamed]:
    """All tensors in the file's order."""
    places = locate_tensors(directory)
    return [Streamed(name, places[name]) for name in sorted(places, key=lambda name: (places[name].offset, places[name].nbytes))]


def everything(order: list[Streamed]) -> int:
    return sum(window_bytes(streamed.place) for streamed in order)


RINGS: dict[str, Callable[[list[Streamed]], int]] = {
    "smallest": smallest_ring,
    "two": lambda order: ring_for(order, 2),
    "three": lambda order: ring_for(order, 3),
    "odd": lambda order: smallest_ring(order) * 3 // 2 + 1,
    "everything": everything,
    "everything twice": lambda order: 2 * everything(order) + PAGE_BYTES,
}


@pytest.fixture
def matrices(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of eight layers with one matrix of 40 000 bytes each."""
    tensors = {
        f"model.layers.{layer}.mlp.up_proj.weight": random_tensor((100, 100), torch.float32, layer) for layer in range(LAYERS)
    }
    write_tensors(tmp_path / "model.safetensors", tensors)
    return tensors


def readers() -> set[threading.Thread]:
    """The streamers' threads that run in this process, those of other tests' models among them."""
    return {thread for thread in threading.enumerate() if thread.name == "weights-reader"}


@pytest.fixture
def open_streamer(tmp_path: Path) -> Iterator[Callable[..., Streamer]]:
    """Open a streamer on the checkpoint in the test's directory; closed when the test is over."""
    opened, before = [], readers()

    def build(ring: str = "two", read: Read | None = None, link: Link | None = None) -> Streamer:
        order = order_of(tmp_path)
        opened.append(Streamer(order, RINGS[ring](order), link or Link(), read))
        return opened[-1]

    yield build
    for streamer in opened:
        streamer.close()
    assert readers() <= before


def take(streamer: Streamer, name: str) -> bytes:
    with streamer.tensor(name) as weight:
        return as_bytes(weight)


def run_pass(streamer: Streamer, tensors: dict[str, torch.Tensor]) -> None:
    """One pass in order, every byte compared."""
    for streamed in streamer.order:
        with streamer.tensor(streamed.name) as weight:
            assert (weight.dtype, weight.shape) == (tensors[streamed.name].dtype, tensors[streamed.name].shape)
            assert as_bytes(weight) == as_bytes(tensors[streamed.name])


def wait_until_quiet(streamer: Streamer) -> None:
    """Until the ring is full."""
    before = -1
    while before != streamer.bytes_read:
        before = streamer.bytes_read
        time.sleep(0.03)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("seed", range(3))
def test_streamed_tensors_are_those_of_safetensors(tmp_path: Path, open_streamer: Callable[..., Streamer], ring: str, seed: int) -> None:
    tensors = random_tensors(seed, 12)
    save_file(tensors, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        theirs = {name: file.get_tensor(name) for name in tensors}
    streamer = open_streamer(ring)
    for _ in range(4):
        run_pass(streamer, theirs)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_parity_at_any_byte_with_short_reads_and_a_throttle(
    tmp_path: Path, open_streamer: Callable[..., Streamer], ring: str, shift: int
) -> None:
    tensors = random_tensors(50 + shift, 10)
    write_tensors(tmp_path / "model.safetensors", tensors, shift)
    streamer = open_streamer(ring, read_shortly(shift, PAGE_BYTES), Link(4e6, sleep=lambda seconds: None))
    for _ in range(3):
        run_pass(streamer, tensors)


@pytest.mark.parametrize("ring", RINGS)
def test_any_order_of_questions_gives_the_right_bytes(tmp_path: Path, open_streamer: Callable[..., Streamer], ring: str) -> None:
    """Answers abandoned at any place, tensors asked for again, passes begun anew."""
    tensors = random_tensors(7, 10)
    write_tensors(tmp_path / "model.safetensors", tensors, 1)
    streamer = open_streamer(ring)
    names = [streamed.name for streamed in streamer.order]
    draw, place = random.Random(ring), 0
    for _ in range(300):
        if draw.random() < 0.2:
            place = draw.randrange(len(names))
        assert take(streamer, names[place]) == as_bytes(tensors[names[place]])
        place = (place + 1) % len(names)
    assert 0 < streamer.bytes_discarded < streamer.bytes_read


def test_several_files_are_read_in_turn(tmp_path: Path) -> None:
    tensors = random_tensors(1, 9)
    order, names = [], list(tensors)
    for part in range(3):
        (tmp_path / str(part)).mkdir()
        write_tensors(tmp_path / str(part) / "model.safetensors", {name: tensors[name] for name in names[part::3]})
        order += order_of(tmp_path / str(part))
    order.sort(key=lambda streamed: names.index(streamed.name))
    streamer = Streamer(order, ring_for(order, 2), Link())
    for _ in range(3):
        run_pass(streamer, tensors)
    streamer.close()


def test_places_in_a_ring_never_overlap() -> None:
    draw = random.Random(0)
    for _ in range(200):
        ring, in_use = Ring(draw.randint(1, 30)), deque[Slot]()
        for index in range(100):
            length = draw.randint(1, ring.nbytes)
            if in_use and draw.random() < 0.5:
                assert ring.slots.popleft() is in_use.popleft()
            slot = ring.reserve(index, length)
            assert slot is not None or in_use
            if slot is not None:
                assert 0 <= slot.start <= slot.start + length <= ring.nbytes
                assert all(slot.start >= other.start + other.length or other.start >= slot.start + length for other in in_use)
                in_use.append(slot)


def test_closing_the_gap_makes_room_for_whatever_fits() -> None:
    """Bytes move with their slots, overlap nothing, and what is free is one stretch."""
    draw, gaps = random.Random(1), 0
    for _ in range(300):
        ring, content = Ring(draw.randint(4, 40)), bytearray(40)
        for index in range(draw.randint(1, 60)):
            slot = ring.reserve(index, draw.randint(1, ring.nbytes))
            if slot is not None:
                content[slot.start : slot.start + slot.length] = bytes([index]) * slot.length
            elif draw.random() < 0.7:
                ring.slots.popleft()
        if not ring.slots:
            continue
        room = ring.nbytes - sum(slot.length for slot in ring.slots)
        gaps += room > 0 and not ring.can_take([room])
        source, destination, nbytes = ring.close_gap()
        content[destination : destination + nbytes] = content[source : source + nbytes]
        assert all(content[slot.start : slot.start + slot.length] == bytes([slot.index]) * slot.length for slot in ring.slots)
        assert room == 0 or ring.can_take([room])
        assert not ring.can_take([room + 1])
    assert gaps > 20


@pytest.mark.parametrize("seed", range(4))
def test_tensors_that_are_kept_stay_until_all_are_done_with(tmp_path: Path, seed: int) -> None:
    """In a ring that holds the largest group exactly, wherever the last one left off; groups and single ones in turns."""
    draw, tensors = random.Random(seed), random_tensors(seed, 13)
    save_file(tensors, tmp_path / "model.safetensors")
    order = order_of(tmp_path)
    groups = [order[start : start + 3] for start in range(0, len(order), 3)]
    streamer = Streamer(order, max(everything(group) for group in groups), Link())
    for _ in range(6):
        for group in groups:
            names = [streamed.name for streamed in group]
            if draw.random() < 0.3:
                assert [take(streamer, name) for name in names] == [as_bytes(tensors[name]) for name in names]
                continue
            asked = names[: draw.randint(0, len(names))]
            with streamer.keeping(names):
                assert [take(streamer, name) for name in asked * 2] == [as_bytes(tensors[name]) for name in asked * 2]
                with pytest.raises(RuntimeError, match="still in use"), streamer.keeping(names):
                    pass
    streamer.close()


def test_more_than_the_ring_holds_cannot_be_kept(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    streamer, names = open_streamer("two"), list(matrices)
    with pytest.raises(RuntimeError, match="cannot hold"), streamer.keeping(names[:3]):
        pass
    with streamer.keeping(names[:2]):
        take(streamer, names[0])
        with pytest.raises(RuntimeError, match="does not follow"):
            take(streamer, names[2])
    run_pass(streamer, matrices)


def test_the_reader_runs_ahead_into_the_next_pass(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    """What a pass reads is the pass, no more: after each, the ring holds the beginning of the next."""
    streamer = open_streamer("three")
    run_pass(streamer, matrices)
    wait_until_quiet(streamer)
    before = streamer.bytes_read
    assert before >= 40_000 * (LAYERS + 2)
    for _ in range(3):
        run_pass(streamer, matrices)
    wait_until_quiet(streamer)
    per_pass = sum(window_bytes(streamed.place) for streamed in streamer.order)
    assert streamer.bytes_read - before <= 3 * per_pass
    assert streamer.bytes_read - before >= 3 * (per_pass - PAGE_BYTES)  # the file ends inside a block
    assert streamer.bytes_discarded == 0
    assert streamer.wait_seconds > 0


def test_what_is_in_use_is_not_overwritten(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    for ring in ("smallest", "two", "everything"):
        streamer = open_streamer(ring)
        for streamed in streamer.order * 2:
            with streamer.tensor(streamed.name) as weight:
                wait_until_quiet(streamer)
                assert as_bytes(weight) == as_bytes(matrices[streamed.name])
        streamer.close()


def test_one_tensor_at_a_time(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    streamer = open_streamer("smallest")
    first, second = list(matrices)[:2]
    with streamer.tensor(first) as weight:
        with pytest.raises(RuntimeError, match="still in use"):
            take(streamer, second)
        assert as_bytes(weight) == as_bytes(matrices[first])
    with pytest.raises(KeyError):
        take(streamer, "lm_head.weight")
    assert take(streamer, second) == as_bytes(matrices[second])


def test_an_exception_inside_a_block_does_no_harm(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    streamer = open_streamer("smallest")
    for name in list(matrices)[:3]:
        with pytest.raises(ZeroDivisionError), streamer.tensor(name):
            raise ZeroDivisionError
    run_pass(streamer, matrices)


def test_a_ring_one_byte_too_small_is_refused(tmp_path: Path, matrices: dict[str, torch.Tensor]) -> None:
    order = order_of(tmp_path)
    assert smallest_ring(order) % PAGE_BYTES == 0
    assert ring_for(order, 3) == 3 * smallest_ring(order)
    with pytest.raises(CatsError, match=rf"ring of \d+ bytes cannot hold layer \d, mlp\.up_proj; give it at least {smallest_ring(order)}"):
        Streamer(order, smallest_ring(order) - 1, Link())
    for wrong in ([], order[:1] * 2):
        with pytest.raises(ValueError, match="every name once"):
            Streamer(wrong, 10**6, Link())


def test_readings_are_recorded_when_asked_for(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    streamer = open_streamer("smallest")
    run_pass(streamer, matrices)
    wait_until_quiet(streamer)
    assert len(streamer.events) == 0
    streamer.record = True
    run_pass(streamer, matrices)
    wait_until_quiet(streamer)
    assert [event.name for event in streamer.events] == [*list(matrices)[1:], next(iter(matrices))]
    moments = [moment for event in streamer.events for moment in (event.start, event.end)]
    assert moments == sorted(moments)
    assert streamer.link.bytes >= streamer.bytes_read > 0
    assert streamer.link.busy_seconds > 0


def expect_error(streamer: Streamer, sentence: str, name: str) -> str:
    """The error comes promptly, again on every later call, and whatever is asked for."""
    begin = time.perf_counter()
    others = [streamed.name for streamed in streamer.order]
    for asked in (name, name, others[0], others[-1]):
        with pytest.raises(CatsError, match=sentence) as caught:
            take(streamer, asked)
    assert time.perf_counter() - begin < PROMPT
    return str(caught.value)


@pytest.mark.parametrize("ring", RINGS)
def test_a_read_error_comes_when_its_tensor_is_due(
    matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer], ring: str
) -> None:
    """What was read before it is handed out as ever."""
    places = {streamed.name: streamed.place for streamed in open_streamer().order}
    names = list(matrices)
    bad = places[names[4]].offset + 20_000
    streamer = open_streamer(ring, fail_at(bad))
    for name in names[:4]:
        assert take(streamer, name) == as_bytes(matrices[name])
    said = expect_error(streamer, r"cannot read layer 4, mlp\.up_proj from .*model\.safetensors \(Input/output error\)", names[4])
    assert said.count(".") - said.count("model.safetensors") - said.count("mlp.up_proj") == 1


def changed_after(reads: int, change: Callable[[], object]) -> Read:
    """Reads that, once, after so many of them, do something to the file."""
    left = [reads]

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        left[0] -= 1
        if left[0] == 0:
            change()
        return os.preadv(descriptor, buffers, offset)

    return read


@pytest.mark.parametrize("ring", RINGS)
def test_a_file_cut_short_while_it_is_streamed(
    tmp_path: Path, matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer], ring: str
) -> None:
    path = tmp_path / "model.safetensors"
    streamer = open_streamer(ring, changed_after(3, lambda: os.truncate(path, 150_000)))
    with pytest.raises(CatsError, match=r"model\.safetensors was cut short, .* layer 3, mlp\.up_proj"):
        run_pass(streamer, matrices)
    expect_error(streamer, "cut short", list(matrices)[3])


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (replace, "changed or replaced"),
    "written to": (lambda path: os.utime(path, ns=(0, 0)), "changed or replaced"),
    "cut short": (lambda path: os.truncate(path, 150_000), "cut short"),
    "gone": (Path.unlink, "went away"),
}


@pytest.mark.parametrize("ring", ["smallest", "everything twice"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_noticed_when_a_pass_begins(
    tmp_path: Path, matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer], ring: str, change: str
) -> None:
    """Whatever was read ahead before the change."""
    streamer = open_streamer(ring)
    run_pass(streamer, matrices)
    wait_until_quiet(streamer)
    act, sentence = CHANGES[change]
    act(tmp_path / "model.safetensors")
    said = expect_error(streamer, sentence, next(iter(matrices)))
    assert "layer 0, mlp.up_proj" in said


@pytest.mark.parametrize("killer", [SystemExit(), MemoryError()])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_reader_is_noticed(
    matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer], killer: BaseException
) -> None:
    streamer = open_streamer("two", fail_at(100_000, killer))
    with pytest.raises(CatsError, match=r"thread that reads .*model\.safetensors ended before layer 2, mlp\.up_proj"):
        run_pass(streamer, matrices)
    expect_error(streamer, "thread that reads", list(matrices)[2])


class Gate:
    """Reads that stop until they are let through."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.reached.set()
        assert self.open.wait(60)
        return os.preadv(descriptor, buffers, offset)


def test_closing_ends_a_wait(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    gate = Gate()
    streamer = open_streamer("two", gate)
    said = []

    def consume() -> None:
        try:
            take(streamer, next(iter(matrices)))
        except CatsError as error:
            said.append(str(error))
            gate.open.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert gate.reached.wait(PROMPT)
    begin = time.perf_counter()
    streamer.close()
    consumer.join(PROMPT)
    assert time.perf_counter() - begin < PROMPT
    assert len(said) == 1
    assert "closed before layer 0, mlp.up_proj was read" in said[0]
    expect_error(streamer, "was closed", list(matrices)[1])


def test_closing_is_quick_behind_a_slow_link(tmp_path: Path, open_streamer: Callable[..., Streamer]) -> None:
    """A request under way is finished, the rest of its tensor is not."""
    write_tensors(tmp_path / "model.safetensors", {"w": random_tensor((2000, 1000), torch.uint8, 0)})
    streamer = open_streamer("two", None, Link(200_000))
    interrupt_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        take(streamer, "w")
    begin = time.perf_counter()
    streamer.close()
    streamer.close()
    assert time.perf_counter() - begin < 1
    assert 0 < streamer.bytes_read < 10**6


def interrupt_after(seconds: float) -> None:
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT)).start()


def test_an_interrupt_ends_a_wait_and_the_streamer_goes_on(
    matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]
) -> None:
    gate = Gate()
    streamer = open_streamer("two", gate)
    interrupt_after(0.1)
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        take(streamer, next(iter(matrices)))
    assert time.perf_counter() - begin < PROMPT
    gate.open.set()
    run_pass(streamer, matrices)
    assert streamer.bytes_discarded == 0


def test_a_forgotten_streamer_ends_its_reader(tmp_path: Path, matrices: dict[str, torch.Tensor]) -> None:
    order, before = order_of(tmp_path), readers()
    streamer = Streamer(order, smallest_ring(order), Link())
    run_pass(streamer, matrices)
    (reader,) = readers() - before
    del streamer
    gc.collect()
    reader.join(PROMPT)
    assert not reader.is_alive()


def test_a_slow_link_sets_the_pace(matrices: dict[str, torch.Tensor], open_streamer: Callable[..., Streamer]) -> None:
    """Behind 1 MB/s, 320 000 bytes take 0.32 s, in small pieces; never less."""
    streamer = open_streamer("two", None, Link(1e6))
    begin = time.perf_counter()
    run_pass(streamer, matrices)
    assert time.perf_counter() - begin >= 0.31
    assert streamer.wait_seconds >= 0.25
    assert streamer.link.label == "emulated 1.00 MB/s"


def read_from_the_device() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_the_system_counts_the_same_bytes(
    tmp_path: Path, open_streamer: Callable[..., Streamer], monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """64 MiB, three passes: every byte comes from the device, none from the page cache; there, the system reads a little further ahead."""
    if not os.access("/proc/self/io", os.R_OK):
        pytest.skip("this system does not count what a process reads")
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    write_tensors_of_64_mib(tmp_path / "model.safetensors")
    if DirectFile(tmp_path / "model.safetensors").mode != ("direct" if direct else "buffered"):
        pytest.skip("this file system knows no direct reads")
    streamer = open_streamer("two")
    before = read_from_the_device()
    for _ in range(3):
        for streamed in streamer.order:
            with streamer.tensor(streamed.name):
                pass
    wait_until_quiet(streamer)
    counted = read_from_the_device() - before
    if counted == 0:
        pytest.skip("this file system lies on no device")
    assert streamer.bytes_read >= 3 * 2**26
    assert 0.99 <= counted / streamer.bytes_read <= (1.01 if direct else 1.2)


def write_tensors_of_64_mib(path: Path) -> None:
    tensors = {f"model.layers.{layer}.w.weight": torch.full((2**11, 2**10), layer, dtype=torch.float32) for layer in range(8)}
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_input_output_errors_are_what_the_fault_injection_raises() -> None:
    with pytest.raises(OSError, match="Input/output") as caught:
        fail_at(5)(0, [memoryview(bytearray(10))], 0)
    assert caught.value.errno == errno.EIO
