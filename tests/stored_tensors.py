"""Safetensors files written byte by byte, so that tensors lie where a test wants them, and reads that misbehave."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import torch

from cats.checkpoint import STORED_DTYPES

NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bytes (0 or 1 for booleans): compared as bytes, they need not be numbers."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    return torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def random_tensors(seed: int, count: int) -> dict[str, torch.Tensor]:
    """Layer matrices of random shapes, up to about 100 kB, and dtypes; an empty one and a scalar among them."""
    draw = random.Random(seed)
    shapes: list[tuple[int, ...]] = [(), (0, 3)]
    shapes += [(draw.randint(1, 200), draw.randint(1, 130)) for _ in range(count - len(shapes))]
    draw.shuffle(shapes)
    return {
        f"model.layers.{place}.mlp.up_proj.weight": random_tensor(shape, draw.choice(list(NAMES)), seed + place)
        for place, shape in enumerate(shapes)
    }


def as_bytes(tensor: torch.Tensor) -> bytes:
    """What is on the disk."""
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], shift: int = 0) -> None:
    """One after the other, as given; the data begins `shift` bytes after a multiple of 8."""
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    write_header(path, entries, b"".join(as_bytes(tensor) for tensor in tensors.values()), shift)


def write_header(path: Path, header: object, data: bytes, shift: int = 0) -> None:
    """The header as JSON, then `data`; on the disk when it returns, since direct reads do not see the page cache."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
        file.flush()
        os.fsync(file.fileno())


def read_shortly(seed: int, step: int) -> Callable[[int, list[memoryview], int], int]:
    """Reads that return a random part, a multiple of `step` bytes, of what was asked for."""
    draw = random.Random(seed)

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        most = max(1, len(buffers[0]) // step)
        return os.preadv(descriptor, [buffers[0][: draw.randint(1, most) * step]], offset)

    return read


def fail_at(offset: int, error: BaseException | None = None) -> Callable[[int, list[memoryview], int], int]:
    """Reads that raise (an input/output error unless told) where they touch byte `offset` of the file."""

    def read(descriptor: int, buffers: list[memoryview], start: int) -> int:
        if start <= offset < start + len(buffers[0]):
            raise error or OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, start)

    return read
