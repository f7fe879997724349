"""The model's projections, `y = x W^T + b`, for weights that may be half precision, streamed, in parts, or all of it.

On a CPU half-precision weights are upcast to float32 (or float64) block by block in a small work space that stays in the
processor's cache, and never as a whole: upcasting is exact, and memory holds the half-precision weight alone. What else becomes
of a weight's parts before they are numbers is its kind's matter (cats/weight.py). What is computed depends on the values and the
shapes only, not on where a weight lies: a streamed weight gives the resident weight's result, bit for bit. (Matrix kernels may
choose another order of summation for another alignment, so a weight that does not lie on a cache line is copied to the work
space as well.)
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from cats import kernels
from cats.dtypes import HALVES, is_exact

if TYPE_CHECKING:
    from cats.weight import Weight

BLOCK = 1 << 21
"""Numbers of a weight that are upcast at a time: 8 MB in float32, which stays in the last-level cache."""
CACHE_LINE = 64
HALF_UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
"""What a CPU must have for products of many rows in a half precision to be fast, as torch names it."""
OLDER_PROBES = {torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"), torch.float16: ("_is_amx_fp16_supported",)}
"""The same, of torch versions that have no list of capabilities."""
WORTH_UPCASTING = 4
"""From so many rows on, products in float32 of upcast weights are faster than half-precision ones of a CPU without units for them."""
FEW_ROWS = 12


def has_half_units(dtype: torch.dtype) -> bool:
    """Whether the CPU's own products in `dtype` are worth using for many rows; else they are made in float32, and rounded once."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(unit, False) for unit in HALF_UNITS[dtype])
    return any(hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)() for probe in OLDER_PROBES[dtype])


FAST_HALVES = frozenset(dtype for dtype in HALVES if has_half_units(dtype))
Rows = Callable[[int, int], torch.Tensor]
"""Gives rows [start, stop) of a weight as numbers."""
Opener = Callable[[], AbstractContextManager[Mapping[str, torch.Tensor]]]
"""Gives parts of a weight, by name."""


class WorkSpace:
    """Where blocks of weights are upcast; one for a model, used by one step at a time (cats/turns.py).

    Args:
        charge: told of the bytes by which it is about to grow.
    """

    def __init__(self, charge: Callable[[int], object] = int) -> None:
        self._charge, self._numbers = charge, torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._numbers.nbytes

    def upcast(self, block_RK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`block_RK` in `dtype` on a cache line; valid until the next call."""
        if self._numbers.dtype != dtype or self._numbers.numel() < block_RK.numel():
            self._charge(block_RK.numel() * dtype.itemsize - self._numbers.nbytes)
            self._numbers = torch.empty(0)
            self._numbers = torch.empty(block_RK.numel(), dtype=dtype)
        place = self._numbers[: block_RK.numel()].view(block_RK.shape)
        place.copy_(block_RK)
        return place


class Linear(nn.Module):
    """A projection with the parameter names of `nn.Linear`.

    Attributes:
        weight: [R, K]; on the meta device where `open` brings parts of it.
        bias: [R] or None.
        kind: how parts give a product (cats/weight.py); None where `weight` is all there is to multiply by.
        open: gives the parts that the running view needs, for as long as one product takes.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, work: WorkSpace):
        super().__init__()
        self.weight, self.bias, self.work = weight, bias, work
        self.kind: Weight | None = None
        self.open: Opener | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] -> [.., R], in the dtype of `x`."""
        if self.kind is None or self.open is None:
            return project(x, self.weight, self.bias, self.work)
        with self.open() as parts:
            return self.kind.product(x, parts, self.bias, self.work)


def project(x: torch.Tensor, weight_RK: torch.Tensor, bias: torch.Tensor | None, work: WorkSpace) -> torch.Tensor:
    """`x W^T + b` with a weight that lies in memory as a whole."""
    height = weight_RK.shape[0]
    return product(x, lambda start, stop: weight_RK if stop - start == height else weight_RK[start:stop], weight_RK.shape, bias, work)


def product(x: torch.Tensor, rows: Rows, shape: torch.Size, bias: torch.Tensor | None, work: WorkSpace) -> torch.Tensor:
    """`x W^T + b` in the dtype of `x`; see the module.

    Args:
        rows: gives rows of W as numbers.
        shape: [R, K] of W.
    """
    if not x.is_cpu or x.requires_grad:
        return functional.linear(x, rows(0, shape[0]).to(x.dtype), bias)
    if kernels.multiply(x.dtype):
        return kernels.product(x, rows(0, shape[0]), bias)
    if x.dtype in HALVES:
        weight_RK = rows(0, shape[0]).to(x.dtype)  # rounded before it is upcast, as a resident weight is when it is loaded
        if x.dtype in FAST_HALVES or x.numel() < WORTH_UPCASTING * x.shape[-1]:
            return functional.linear(x, weight_RK, bias)
        wide = project(x.float(), weight_RK, None, work).to(x.dtype)
        return wide if bias is None else wide + bias
    if shape.numel() <= BLOCK:
        return functional.linear(x, ready(rows(0, shape[0]), x.dtype, work), bias)
    out = in_blocks(x, rows, shape, work)
    return out if bias is None else out + bias


def in_blocks(x: torch.Tensor, rows: Rows, shape: torch.Size, work: WorkSpace) -> torch.Tensor:
    """`x W^T` with a weight that is made numbers block by block."""
    x_TK, threads = x.reshape(-1, x.shape[-1]), torch.get_num_threads()
    height = max(BLOCK // shape[1] // threads, 1) * threads
    blocks = (rows(start, min(start + height, shape[0])) for start in range(0, shape[0], height))
    out_TR = torch.cat([times_block(x_TK, ready(block, x.dtype, work)) for block in blocks], dim=1)
    return out_TR.view(*x.shape[:-1], shape[0])


def times_block(x_TK: torch.Tensor, block_RK: torch.Tensor) -> torch.Tensor:
    """`x W^T` [T, R], the block cut into one piece per thread.

    Matrix libraries share a product with few rows badly among threads; a batch of products they share well. On the CPU measured, two
    threads took half the time so. With few rows in x, `x W^T` is the faster order, with many `W x^T`.
    """
    pieces = torch.get_num_threads() if len(block_RK) % torch.get_num_threads() == 0 else 1
    pieces_PRK = block_RK.view(pieces, -1, block_RK.shape[1])
    if len(x_TK) <= FEW_ROWS:
        return torch.bmm(x_TK.expand(pieces, *x_TK.shape), pieces_PRK.transpose(1, 2)).transpose(0, 1).reshape(len(x_TK), -1)
    return torch.bmm(pieces_PRK, x_TK.t().expand(pieces, *x_TK.t().shape)).view(len(block_RK), -1).t()


def ready(block_RK: torch.Tensor, dtype: torch.dtype, work: WorkSpace) -> torch.Tensor:
    """The block itself where it can be multiplied as it lies, else a copy in the work space."""
    fits = block_RK.dtype == dtype and block_RK.data_ptr() % CACHE_LINE == 0
    return block_RK if fits else work.upcast(block_RK, dtype)


def work_bytes(numbers: int, stored: Iterable[torch.dtype], weights: torch.dtype, compute: torch.dtype) -> int:
    """Bytes that products take on a CPU beside weights of up to `numbers`: upcast blocks; a whole copy where weights are rounded first."""
    blocks = min(BLOCK, numbers) * max(compute.itemsize, torch.float32.itemsize)
    if compute in HALVES:
        return blocks + (numbers * compute.itemsize if set(stored) - {compute} else 0)
    rounds = any(not is_exact(dtype, weights) for dtype in stored)
    return blocks + (numbers * weights.itemsize if rounds else 0)


def replace_projections(module: nn.Module, work: WorkSpace) -> None:
    """Put a `Linear` with the same parameters in the place of every `nn.Linear` inside `module`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Linear(child.weight, child.bias, work))
