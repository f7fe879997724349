"""Two words for the numbers of a model: what its weights are *held* in, and what is *computed* in.

One rule for every place that a weight can be in (resident, under a memory plan, streamed) and for base and adapters alike:
a value is rounded to the held dtype, where the stored one has others, and is then upcast to the compute dtype, which holds every
value of the held one. So a checkpoint gives the same logits wherever its weights lie, a mixed checkpoint too.
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


def held_dtype(asked: str, config: Any, stored: Mapping[str, Stored]) -> torch.dtype:
    """The dtype that weights are held in.

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


def compute_dtype(asked: str, held: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of arithmetic, states and caches.

    Args:
        asked: a name, or "auto": on a CPU float32 (float64 where that is held), elsewhere the held dtype.

    Raises:
        CatsError: it would round the values that are held.
    """
    if asked == "auto":
        return torch.float32 if device.type == "cpu" and is_exact(held, torch.float32) else held
    chosen = parse_dtype(asked)
    if not is_exact(held, chosen):
        short = str(held).removeprefix("torch.")
        raise CatsError(f"the compute dtype {asked} would round weights held in {short}; hold them in {asked} too, or compute in {short}.")
    return chosen


def is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is one of `target`."""
    if source == target:
        return True
    if not (source.is_floating_point and target.is_floating_point):
        return False
    narrow, wide = torch.finfo(source), torch.finfo(target)
    return wide.eps <= narrow.eps and wide.max >= narrow.max and wide.tiny * wide.eps <= narrow.tiny * narrow.eps


def narrowest(stored: torch.dtype, held: torch.dtype) -> torch.dtype:
    """Of the two, the one that takes less memory and still gives the held values: the stored one where upcasting it is exact."""
    return stored if is_exact(stored, held) else held


def rounded(weight: torch.Tensor, held: torch.dtype | None) -> torch.Tensor:
    """`weight` itself where `held` (None: any dtype) holds all its values, else a rounded copy."""
    return weight if held is None or is_exact(weight.dtype, held) else weight.to(held)
