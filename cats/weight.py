"""What a projection multiplies by: the kinds of weight, one class each. A kind says in which parts a matrix is stored, which of
them a precision needs, and how they give numbers; where the parts are is the store's matter (cats/runtime/store.py).

How to add a kind: docs/weights.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from cats.config import require
from cats.dtypes import is_exact, narrowest, rounded
from cats.errors import CatsError
from cats.linear import WorkSpace, product
from cats.nested import format
from cats.planning.plan import COARSE_PRECISION, EXACT_PRECISION

Parts = Mapping[str, torch.Tensor]
"""Tensors by the name of the part, those that the pass's precision needs."""


class Coded(NamedTuple):
    """A matrix of eight-bit codes [R, K].

    Attributes:
        codes: uint8 of cats/nested/format.py, or int8.
        layout, exceptions, low: of the former; no low bits: the codes alone.
        scales: [R], of the latter.
    """

    codes: torch.Tensor
    layout: format.Layout | None = None
    exceptions: torch.Tensor | None = None
    low: torch.Tensor | None = None
    scales: torch.Tensor | None = None


class Weight(ABC):
    """A kind of weight in one model.

    Attributes:
        parts: what a matrix is stored as, in the order in which a pass takes it: name -> the precisions that need it.
        made: parts that no file holds: `make` makes them of the part "exact" when the model is loaded. Name -> dtype.
        stands_for: part -> precisions that it serves too where it is resident, in the place of parts that serve no other.
        always: parts so small that they are resident under every plan.
        unused: ends of names of tensors that mean nothing.
        decodes: whether compiled products take codes with their low bits, which they decode in a work space.
        dtype: that values are rounded to (the weight dtype of cats/dtypes.py).
        sparing: whether residents stay as they are stored where that takes less memory.
    """

    parts: ClassVar[Mapping[str, frozenset[str]]]
    made: ClassVar[Mapping[str, torch.dtype]] = {}
    stands_for: ClassVar[Mapping[str, frozenset[str]]] = {}
    always: ClassVar[frozenset[str]] = frozenset()
    unused: ClassVar[tuple[str, ...]] = ()
    decodes: ClassVar[bool] = False

    def __init__(self, dtype: torch.dtype, sparing: bool, settings: Mapping[str, Any] | None = None):
        """Raises `CatsError` for settings (config.json's `quantization_config`) that the kind does not know."""
        self.dtype, self.sparing = dtype, sparing

    @property
    def scratch_bytes(self) -> int:
        """What `rows` takes for each weight of a matrix beside the parts, at most; plain weights that are rounded are counted elsewhere."""
        return 0

    def stored_as(self, part: str, matrix: str) -> str:
        """The tensor's name on disk."""
        return f"{matrix}.weight.{part}"

    def shape(self, part: str, shape: torch.Size, stored: tuple[int, ...]) -> torch.Size:
        """Of a part of a matrix of this shape [R, K]; `stored` is the one on disk, for parts whose size follows from the numbers."""
        return shape

    def check(  # noqa: B027 - nothing can be wrong with most
        self, part: str, tensor: torch.Tensor, shape: torch.Size, name: str
    ) -> None:
        """Raise `CatsError` where a part of a matrix of this shape [R, K], which was read as the tensor `name`, cannot be one."""

    def make(self, exact_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts that are `made`, of a matrix as it was published."""
        return {}

    def resting(self, part: str, stored: torch.dtype) -> torch.dtype:
        """The dtype in which a part that is stored so is resident."""
        return stored

    @abstractmethod
    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the matrix as numbers, in any float dtype that holds them."""

    def coded(self, parts: Parts) -> "Coded | None":
        """The parts as compiled products take them without making numbers of them first (cats/kernels); None where they do not."""
        return None

    def product(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, work: WorkSpace) -> torch.Tensor:
        """`x W^T + b` [.., R] in the dtype of `x`; a kind with a product of its own replaces it."""
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
        return narrowest(stored, self.dtype) if self.sparing else self.dtype

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """See `Weight`."""
        return rounded(parts["exact"][start:stop], self.dtype)


class Int8Copy(Plain):
    """A matrix as it was published, and a copy of eight bits with one scale a row, which drafts; made when the model is loaded."""

    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "exact": frozenset({EXACT_PRECISION}),
        "codes": frozenset({COARSE_PRECISION}),
        "scales": frozenset({COARSE_PRECISION}),
    }
    made: ClassVar[Mapping[str, torch.dtype]] = {"codes": torch.int8, "scales": torch.float32}
    stands_for: ClassVar[Mapping[str, frozenset[str]]] = {"exact": frozenset({COARSE_PRECISION})}

    def stored_as(self, part: str, matrix: str) -> str:
        """See `Weight`."""
        return super().stored_as(part, matrix) if part == "exact" else f"{matrix}.weight.{part}"

    def shape(self, part: str, shape: torch.Size, stored: tuple[int, ...]) -> torch.Size:
        """See `Weight`."""
        return shape[:1] if part == "scales" else shape

    def resting(self, part: str, stored: torch.dtype) -> torch.dtype:
        """See `Weight`."""
        return super().resting(part, stored) if part == "exact" else stored

    @property
    def scratch_bytes(self) -> int:
        """See `Weight`: the copy as float32."""
        return torch.float32.itemsize

    def make(self, exact_RK: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes int8 [R, K] and scales float32 [R]: the largest number of a row has the code 127, or -127."""
        codes = torch.empty(exact_RK.shape, dtype=torch.int8)
        scales = torch.empty(len(exact_RK))
        for start, stop in format.row_blocks(0, *exact_RK.shape):
            numbers = exact_RK[start:stop].float()
            largest = numbers.abs().amax(1)
            scales[start:stop] = torch.where(largest > 0, largest / 127, 1.0)
            codes[start:stop] = (numbers / scales[start:stop, None]).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """See `Weight`."""
        if "exact" in parts:
            return super().rows(parts, start, stop)
        return parts["codes"][start:stop] * parts["scales"][start:stop, None]

    def coded(self, parts: Parts) -> "Coded | None":
        """See `Weight`."""
        return None if "exact" in parts else Coded(parts["codes"], scales=parts["scales"])


class Nested(Weight):
    """A half-precision matrix as codes of eight bits, the bits that they lack, and a short list of exceptions (cats/nested/format.py)."""

    name: ClassVar[str] = "cats_nested"
    version: ClassVar[int] = 1
    parts: ClassVar[Mapping[str, frozenset[str]]] = {
        "exceptions": frozenset({EXACT_PRECISION, COARSE_PRECISION}),
        "codes": frozenset({EXACT_PRECISION, COARSE_PRECISION}),
        "residual": frozenset({EXACT_PRECISION}),
    }
    always: ClassVar[frozenset[str]] = frozenset({"exceptions"})
    unused: ClassVar[tuple[str, ...]] = (".filler",)
    decodes: ClassVar[bool] = True

    def __init__(self, dtype: torch.dtype, sparing: bool, settings: Mapping[str, Any] | None = None):
        super().__init__(dtype, sparing)
        given = settings or {}
        require(
            given.get("version") == self.version and given.get("dtype") in format.LAYOUTS,
            f"these nested weights are of version {given.get('version')} and dtype {given.get('dtype')}; this program knows version "
            f"{self.version} of {' and '.join(format.LAYOUTS)}. Convert the checkpoint again.",
        )
        self.layout = format.LAYOUTS[given["dtype"]]

    @property
    def scratch_bytes(self) -> int:
        """See `Weight`: the matrix as it was, and rounded where it is."""
        dtype = self.layout.dtype
        return dtype.itemsize + (0 if is_exact(dtype, self.dtype) else self.dtype.itemsize)

    @classmethod
    def settings(cls, dtype: str) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint whose matrices are of this dtype."""
        return {"quant_method": cls.name, "version": cls.version, "dtype": dtype}

    def shape(self, part: str, shape: torch.Size, stored: tuple[int, ...]) -> torch.Size:
        """See `Weight`."""
        if part == "residual":
            return torch.Size([shape[0], self.layout.row_bytes(shape[1])])
        return shape if part == "codes" else torch.Size(stored[:1])

    def check(self, part: str, tensor: torch.Tensor, shape: torch.Size, name: str) -> None:
        """See `Weight`."""
        expected = torch.int32 if part == "exceptions" else torch.uint8
        require(tensor.dtype == expected, f"{name} is stored as {tensor.dtype}, not as {expected}; the file is damaged, convert it again.")
        if part == "exceptions":
            format.check_exceptions(tensor, tuple(shape), name)

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """See `Weight`; in the dtype of the matrix as it was."""
        codes, listed = parts["codes"], parts["exceptions"]
        if "residual" in parts:
            return rounded(format.decode(codes, parts["residual"], listed, self.layout, start, stop), self.dtype)
        return rounded(format.decode_coarse(codes, listed, self.layout, start, stop), self.dtype)

    def coded(self, parts: Parts) -> "Coded | None":
        """See `Weight`; what would be rounded, and low bits of seven, are made numbers."""
        low = parts.get("residual")
        if not is_exact(self.layout.dtype, self.dtype) or (low is not None and self.layout.low_bits != format.NIBBLE):
            return None
        return Coded(parts["codes"], self.layout, parts["exceptions"], low)

    def product(self, x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, work: WorkSpace) -> torch.Tensor:
        """See `Weight`."""
        return product(x, lambda start, stop: self.rows(parts, start, stop), parts["codes"].shape, bias, work)


KINDS: dict[str, type[Weight]] = {Nested.name: Nested}
"""Kinds other than plain, by the `quant_method` of config.json's `quantization_config`."""
COPIES: dict[str, type[Weight]] = {"int8": Int8Copy}
"""Kinds that add a coarse copy to plain weights, by the name under which it is asked for (`MemoryOptions.coarse`)."""


def has_coarse(config: object, coarse: str | None = None) -> bool:
    """Whether a checkpoint of this configuration has a coarse form to draft with, or is given one by the copy `coarse`."""
    settings = getattr(config, "quantization_config", None) or {}
    given = settings if isinstance(settings, dict) else settings.to_dict()
    kind = KINDS.get(str(given.get("quant_method"))) if given else COPIES.get(coarse or "")
    return kind is not None and any(COARSE_PRECISION in needing for needing in kind.parts.values())


def weight_of(config: object, directory: object, dtype: torch.dtype, sparing: bool, coarse: str | None = None) -> Weight:
    """The kind of a checkpoint's weights, for one model; raises `CatsError` for one that is not known.

    Args:
        dtype, sparing: see `Weight`.
        coarse: the copy that is asked for.
    """
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return Plain(dtype, sparing) if coarse is None else COPIES[coarse](dtype, sparing)
    given = settings if isinstance(settings, dict) else settings.to_dict()
    name = given.get("quant_method")
    if name not in KINDS:
        known = "".join(f", {kind}" for kind in KINDS)
        raise CatsError(f"the weights in {directory} are quantised by {str(name)!r}; supported are plain ones{known}.")
    require(coarse is None, f"a coarse copy is made of plain weights, and those in {directory} are {name}; leave --coarse out.")
    return KINDS[name](dtype, sparing, given)
