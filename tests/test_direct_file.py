"""Where tensors lie in safetensors files, and reading them past the page cache: parity with safetensors, and every fault a sentence."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cats.checkpoint import STORED_DTYPES, locate_tensors
from cats.errors import CatsError
from cats.runtime.arena import PAGE_BYTES, Arena
from cats.runtime.direct_file import DirectFile, read_tensor_into, requests, window, window_bytes
from tests.stored_tensors import as_bytes, fail_at, random_tensor, random_tensors, read_shortly, write_header, write_tensors

MATRIX = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no direct reads."""
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


def read_everything(directory: Path, read: Callable[[int, list[memoryview], int], int] | None = None) -> dict[str, torch.Tensor]:
    """All tensors, one behind the other in one arena."""
    places = locate_tensors(directory)
    arena = Arena(sum(window_bytes(place) for place in places.values()))
    tensors, start = {}, 0
    for name, place in places.items():
        tensors[name] = read_tensor_into(DirectFile(place.path, read), place, arena, start, name)
        start += window_bytes(place)
    return tensors


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(found[name]) == as_bytes(tensor), name


@pytest.mark.parametrize("seed", range(6))
def test_read_tensors_are_those_of_safetensors(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed, 12)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        theirs = {name: file.get_tensor(name) for name in tensors}
    check_equal(read_everything(tmp_path), theirs)


@pytest.mark.parametrize("shift", range(8))
def test_tensors_at_any_byte_are_read(tmp_path: Path, shift: int) -> None:
    tensors = random_tensors(100 + shift, 8)
    write_tensors(tmp_path / "model.safetensors", tensors, shift)
    check_equal(read_everything(tmp_path), tensors)


def test_shards_are_read_each_from_its_file(tmp_path: Path) -> None:
    tensors = random_tensors(1, 6)
    shards = {name: f"model-0000{place % 2 + 1}-of-00002.safetensors" for place, name in enumerate(tensors)}
    for shard in set(shards.values()):
        write_tensors(tmp_path / shard, {name: tensor for name, tensor in tensors.items() if shards[name] == shard})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    check_equal(read_everything(tmp_path), tensors)


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize("seed", range(3))
def test_without_direct_reads_the_page_cache_serves(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed, 8)
    write_tensors(tmp_path / "model.safetensors", tensors, seed)
    assert DirectFile(tmp_path / "model.safetensors").mode == "buffered"
    check_equal(read_everything(tmp_path), tensors)
    check_equal(read_everything(tmp_path, read_shortly(seed, 1)), tensors)


def test_a_refused_direct_read_goes_through_the_page_cache(tmp_path: Path) -> None:
    tensors = random_tensors(3, 4)
    write_tensors(tmp_path / "model.safetensors", tensors)
    refused = [OSError(errno.EINVAL, os.strerror(errno.EINVAL))]
    (place,) = [place for place in locate_tensors(tmp_path).values() if place.shape == ()]

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if refused:
            raise refused.pop()
        return os.preadv(descriptor, buffers, offset)

    file = DirectFile(place.path, read)
    if file.mode != "direct":
        pytest.skip("this file system knows no direct reads")
    read_tensor_into(file, place, Arena(window_bytes(place)), 0)
    assert (file.mode, refused) == ("buffered", [])


@pytest.mark.parametrize("seed", range(3))
def test_short_reads_are_gone_on_with(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed, 8)
    write_tensors(tmp_path / "model.safetensors", tensors, seed)
    check_equal(read_everything(tmp_path, read_shortly(seed, PAGE_BYTES)), tensors)


def test_windows_and_requests_cover_what_is_asked_for() -> None:
    draw = random.Random(0)
    for _ in range(300):
        offset, nbytes = draw.randint(0, 10**6), draw.choice([0, 1, 4095, 4096, 4097, draw.randint(0, 10**6)])
        start, length = window(offset, nbytes)
        assert start % PAGE_BYTES == length % PAGE_BYTES == 0
        assert start <= offset < start + PAGE_BYTES
        assert max(PAGE_BYTES, offset + nbytes - start) <= length < offset + nbytes - start + 2 * PAGE_BYTES
        largest = PAGE_BYTES * draw.randint(1, 40)
        end = 0
        for first, piece in requests(nbytes, largest):
            assert first == end
            assert piece <= largest * 3 / 2
            assert first % PAGE_BYTES == 0
            end += piece
        assert end == nbytes


def test_every_dtype_of_torch_has_its_size() -> None:
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
    assert {name: dtype.itemsize * 8 for name, dtype in STORED_DTYPES.items() if not name.startswith("F8_")} == bits


def put(header: object, data: bytes = bytes(12)) -> Callable[[Path], None]:
    return lambda path: write_header(path, header, data)


def put_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


HEADER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (put_bytes(b""), "cut short"),
    "only a length": (put_bytes((16).to_bytes(8, "little")), "cut short"),
    "an absurd length": (put_bytes((2**62).to_bytes(8, "little") + b"{}"), "header is longer than the file"),
    "no JSON": (put_bytes((4).to_bytes(8, "little") + b"{{{{"), "no JSON"),
    "no text": (put_bytes((4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc"), "no JSON"),
    "no mapping": (put([MATRIX]), "no mapping"),
    "no entry": (put({"w": 3}), "does not describe the tensor w"),
    "no offsets": (put({"w": {"dtype": "F16", "shape": [2, 3]}}), "does not describe the tensor w"),
    "three offsets": (put({"w": MATRIX | {"data_offsets": [0, 6, 12]}}), "does not describe the tensor w"),
    "offsets that are words": (put({"w": MATRIX | {"data_offsets": ["0", "12"]}}), "does not describe the tensor w"),
    "a negative offset": (put({"w": MATRIX | {"data_offsets": [-12, 0]}}), "does not describe the tensor w"),
    "a negative side": (put({"w": MATRIX | {"shape": [-2, -3]}}), "does not describe the tensor w"),
    "offsets the wrong way": (put({"w": MATRIX | {"data_offsets": [12, 0]}}), "do not fit its shape"),
    "another shape": (put({"w": MATRIX | {"shape": [2, 4]}}), r"tensor w do not fit its shape \[2, 4\]"),
    "an unknown dtype": (put({"w": MATRIX | {"dtype": "F12"}}), r"w in .* has the dtype 'F12'"),
    "a dtype that is no word": (put({"w": MATRIX | {"dtype": ["F16"]}}), "has the dtype"),
    "data cut short": (put({"w": MATRIX}, bytes(11)), "cut short, the tensor w"),
    "an overlap": (put({"w": MATRIX, "v": MATRIX | {"data_offsets": [8, 20]}}, bytes(20)), "tensors w and v overlap"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_damaged_header_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    damage, sentence = HEADER_FAULTS[fault]
    damage(tmp_path / "model.safetensors")
    with pytest.raises(CatsError, match=sentence) as caught:
        locate_tensors(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_header_of_more_than_100_mb_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little"))
        file.truncate(2 * 10**8)
    with pytest.raises(CatsError, match="more than any real one"):
        locate_tensors(tmp_path)


def test_pickles_cannot_be_streamed(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CatsError, match=r"pytorch_model\.bin are a pickle"):
        locate_tensors(tmp_path)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """A file of one matrix of 100 000 bytes, "w"."""
    write_tensors(tmp_path / "model.safetensors", {"w": random_tensor((1000, 100), torch.uint8, 0)})
    return tmp_path / "model.safetensors"


def read_one(file: DirectFile) -> torch.Tensor:
    place = locate_tensors(file.path.parent)["w"]
    return read_tensor_into(file, place, Arena(window_bytes(place)), 0, "layer 7, mlp.up_proj")


def test_a_read_error_names_file_and_layer(matrix: Path) -> None:
    with pytest.raises(CatsError, match=r"layer 7, mlp\.up_proj from .*model\.safetensors \(Input/output error\)"):
        read_one(DirectFile(matrix, fail_at(50_000)))


@pytest.mark.parametrize("left", [0, 10, 40_000, 40_960, 99_000])
def test_a_file_that_ends_too_early_is_noticed(matrix: Path, left: int) -> None:
    """Cut after the header was read: before the file is opened, and while it is open."""
    place, file = locate_tensors(matrix.parent)["w"], DirectFile(matrix)
    os.truncate(matrix, left)
    for opened in (file, DirectFile(matrix)):
        with pytest.raises(CatsError, match=r"model\.safetensors .*cut short.* layer 7, mlp\.up_proj"):
            read_tensor_into(opened, place, Arena(window_bytes(place)), 0, "layer 7, mlp.up_proj")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    stat = path.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written to": (touch, "changed or replaced"),
    "replaced": (replace, "changed or replaced"),
    "grown": (lambda path: os.truncate(path, 10**6), "changed or replaced"),
    "shortened": (lambda path: os.truncate(path, 1000), "cut short"),
    "gone": (Path.unlink, "went away"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_noticed(matrix: Path, change: str) -> None:
    file = DirectFile(matrix)
    file.check_unchanged()
    act, sentence = CHANGES[change]
    act(matrix)
    with pytest.raises(CatsError, match=sentence) as caught:
        file.check_unchanged("layer 7, mlp.up_proj")
    assert "layer 7, mlp.up_proj" in str(caught.value)
    assert str(matrix) in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match="gone"):
        DirectFile(tmp_path / "gone")


def test_a_closed_file_reads_nothing_else(matrix: Path) -> None:
    """The descriptor's number may belong to another file by then."""
    file = DirectFile(matrix)
    file.close()
    file.close()
    with pytest.raises(CatsError, match="cannot read"):
        read_one(file)


def test_tensors_keep_their_arena(matrix: Path) -> None:
    tensor = read_one(DirectFile(matrix))
    others = [Arena(window_bytes(locate_tensors(matrix.parent)["w"])) for _ in range(4)]
    for arena in others:
        arena.view[:] = bytes(arena.nbytes)
    assert as_bytes(tensor) == as_bytes(random_tensor((1000, 100), torch.uint8, 0))


def test_an_arena_gives_no_memory_but_its_own() -> None:
    arena = Arena(5000)
    assert arena.nbytes == 8192
    for start, shape in ((8190, (2,)), (-2, (1,)), (1, (4,)), (0, (4097,))):
        with pytest.raises(ValueError, match="no place"):
            arena.tensor(start, torch.float16, shape)
    for source, destination, nbytes in ((0, 8000, 193), (8000, 0, 193), (-1, 0, 1)):
        with pytest.raises(ValueError, match="lie outside"):
            arena.move(source, destination, nbytes)
