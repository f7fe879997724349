"""What a projection multiplies by: the kinds of weight, one class each. A kind says in which parts a matrix is stored, which of
them a precision needs, and how they give numbers; where the parts are is the store's matter (cats/runtime/store.py).

How to add a kind: docs/weights.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from cats.dtypes import narrowest, rounded
from cats.errors import CatsError
from cats.linear import WorkSpace, product
from cats.planning.plan import EXACT_PRECISION

Parts = Mapping[str, torch.Tensor]
"""Tensors by the name of the part, those that the pass's precision needs."""


class Weight(ABC):
    """A kind of weight in one model.

    Attributes:
        parts: what a matrix is stored as, in the order in which a pass takes it: name -> the precisions that need it.
        held: the dtype that values are rounded to.
        sparing: whether residents stay as they are stored where that takes less memory.
    """

    parts: ClassVar[Mapping[str, frozenset[str]]]

    def __init__(self, held: torch.dtype, sparing: bool):
        self.held, self.sparing = held, sparing

    def stored_as(self, part: str, matrix: str) -> str:
        """The tensor's name on disk."""
        return f"{matrix}.weight.{part}"

    def shape(self, part: str, shape: torch.Size) -> torch.Size:
        """Of a part of a matrix of this shape [R, K]."""
        return shape

    def resting(self, part: str, stored: torch.dtype) -> torch.dtype:
        """The dtype in which a part that is stored so is resident."""
        return stored

    @abstractmethod
    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the matrix as numbers, in any float dtype that holds them."""

    def product(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, work: WorkSpace) -> torch.Tensor:
        """`x W^T + b` [.., R] in the dtype of `x`; a kind with a kernel of its own replaces it."""
        first = next(iter(parts.values()))
        return product(x, lambda start, stop: self.rows(parts, start, stop), first.shape, bias, work)


class Plain(Weight):
    """A matrix as it was published, whole."""

    parts: ClassVar[Mapping[str, frozenset[str]]] = {"exact": frozenset({EXACT_PRECISION})}

    def stored_as(self, part: str, matrix: str) -> str:
        """See `Weight`."""
        return f"{matrix}.weight"

    def resting(self, part: str, stored: torch.dtype) -> torch.dtype:
        """See `Weight`."""
        return narrowest(stored, self.held) if self.sparing else self.held

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """See `Weight`."""
        return rounded(parts["exact"][start:stop], self.held)


KINDS: dict[str, type[Weight]] = {}
"""Kinds other than plain, by the `quant_method` of config.json's `quantization_config`."""


def kind_of(config: object, directory: object) -> type[Weight]:
    """The kind of a checkpoint's weights; raises `CatsError` for one that is not known."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return Plain
    name = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    if name not in KINDS:
        known = "".join(f", {kind}" for kind in KINDS)
        raise CatsError(f"the weights in {directory} are quantised by {str(name)!r}; supported are plain ones{known}.")
    return KINDS[name]
