"""Two dtypes of a model: the *weight dtype*, that of its weights in memory, and the *compute dtype*, that of its arithmetic.

One rule for every place that a weight can be in (resident, under a memory plan, streamed) and for base and adapters alike:
a value is rounded to the weight dtype, where the stored one has others, and is then upcast to the compute dtype, which holds every
value of the weight dtype. So a checkpoint gives the same logits wherever its weights lie, a mixed checkpoint too.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from cats.checkpoint import parse_dtype
from cats.errors import CatsError

HALVES = (torch.float16, torch.bfloat16)
NEAR_TIES = "computed in half precision: the number of rows in a pass changes the last bits of logits, so near ties may fall otherwise"
"""What a result of half-precision arithmetic says of itself."""


class Stored(Protocol):
    """A tensor, or a description of one."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


def weight_dtype(asked: str, config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype of weights in memory.

    Args:
        asked: a name, or "auto": what the configuration names, or else what most numbers of the layers are stored in.
        config: of the model or adapter.
        stored: tensors by name.
    """
    if asked != "auto":
        return parse_dtype(asked)
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    numbers: dict[torch.dtype, int] = {}
    for name, tensor in stored.items():
        if "layers." in name and tensor.dtype.is_floating_point:
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(numbers, key=lambda dtype: (numbers[dtype], dtype.itemsize), default=torch.float32)


def compute_dtype(asked: str, weights: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of arithmetic, states and caches.

    Args:
        asked: a name, or "auto": on a CPU float32 (float64 where weights are that), elsewhere the weight dtype.
        weights: the weight dtype.

    Raises:
        CatsError: it would round values of the weights.
    """
    if asked == "auto":
        return torch.float32 if device.type == "cpu" and is_exact(weights, torch.float32) else weights
    chosen = parse_dtype(asked)
    if not is_exact(weights, chosen):
        short = str(weights).removeprefix("torch.")
        raise CatsError(f"the compute dtype {asked} would round weights of {short}; load them in {asked} too, or compute in {short}.")
    return chosen


def is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is one of `target`."""
    if source == target:
        return True
    if not (source.is_floating_point and target.is_floating_point):
        return False
    narrow, wide = torch.finfo(source), torch.finfo(target)
    return wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny * wide.eps <= narrow.tiny * narrow.eps


def narrowest(stored: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """Of the two, the one that takes less memory and has the values of the weight dtype: the stored one where upcasting it is exact."""
    return stored if is_exact(stored, weights) else weights


def rounded(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`weight` itself where `dtype` (None: any) holds all its values, else a rounded copy."""
    return weight if dtype is None or is_exact(weight.dtype, dtype) else weight.to(dtype)
