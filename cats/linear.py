"""The base model's projections, `y = x W^T + b`, for weights that may be half precision, streamed, or both.

On a CPU half-precision weights become float32 (or float64) block by block in a small work space that stays in the
processor's cache, and never as a whole: the widening is exact, and memory holds the half-precision weight alone. What is
computed depends on the values and the shapes only, not on where a weight lies: a streamed weight gives the resident
weight's result, bit for bit. (Matrix kernels may choose another order of summation for another alignment, so a weight
that does not lie on a cache line is copied to the work space as well.)
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional

BLOCK = 1 << 21
"""Numbers of a weight that are widened at a time: 8 MB in float32, which stays in the last-level cache."""
CACHE_LINE = 64
Fetch = Callable[[], AbstractContextManager[torch.Tensor]]


class WorkSpace:
    """Where blocks of weights are widened; one for a model, used by one thread."""

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._numbers.nbytes

    def widened(self, block_RK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`block_RK` in `dtype` on a cache line; valid until the next call."""
        if self._numbers.dtype != dtype or self._numbers.numel() < block_RK.numel():
            self._numbers = torch.empty(block_RK.numel(), dtype=dtype)
        place = self._numbers[: block_RK.numel()].view(block_RK.shape)
        place.copy_(block_RK)
        return place


class Linear(nn.Module):
    """A projection with the parameter names of `nn.Linear`.

    Attributes:
        weight: [R, K]; on the meta device where `fetch` brings it.
        bias: [R] or None.
        fetch: opens a context with the weight, for as long as one product takes; None where the weight is resident.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, work: WorkSpace):
        super().__init__()
        self.weight, self.bias, self.work = weight, bias, work
        self.fetch: Fetch | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., K] -> [.., R], in the dtype of `x`."""
        if self.fetch is None:
            return project(x, self.weight, self.bias, self.work)
        with self.fetch() as weight:
            return project(x, weight, self.bias, self.work)


def project(x: torch.Tensor, weight_RK: torch.Tensor, bias: torch.Tensor | None, work: WorkSpace) -> torch.Tensor:
    """`x W^T + b` in the dtype of `x`; see the module."""
    wide = x.dtype in (torch.float32, torch.float64)
    if weight_RK.device.type != "cpu" or not wide or (x.requires_grad and torch.is_grad_enabled()):
        return functional.linear(x, weight_RK.to(x.dtype), bias)
    if weight_RK.numel() <= BLOCK:
        return functional.linear(x, ready(weight_RK, x.dtype, work), bias)
    x_TK = x.reshape(-1, x.shape[-1])
    out_RT = x.new_empty(len(weight_RK), len(x_TK))
    rows = BLOCK // weight_RK.shape[1]
    for start in range(0, len(weight_RK), rows):
        # with few rows in x, W x^T is up to three times as fast as x W^T
        torch.mm(ready(weight_RK[start : start + rows], x.dtype, work), x_TK.t(), out=out_RT[start : start + rows])
    out_TR = out_RT.t().contiguous()
    return (out_TR if bias is None else out_TR + bias).view(*x.shape[:-1], len(weight_RK))


def ready(block_RK: torch.Tensor, dtype: torch.dtype, work: WorkSpace) -> torch.Tensor:
    """The block itself where it can be multiplied as it lies, else a copy in the work space."""
    fits = block_RK.dtype == dtype and block_RK.data_ptr() % CACHE_LINE == 0
    return block_RK if fits else work.widened(block_RK, dtype)


def replace_projections(module: nn.Module, work: WorkSpace) -> None:
    """Put a `Linear` with the same parameters in the place of every `nn.Linear` inside `module`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Linear(child.weight, child.bias, work))
