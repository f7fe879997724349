"""A half-precision matrix as codes of eight bits and the bits that they leave out: integer arithmetic, and nothing else.

The magnitude `u` of a number, its bits without the sign, orders as the numbers do. `u + 2^(t-1)`, t being the mantissa bits beyond three,
is cut in two: its upper bits are `u` rounded to three mantissa bits, its lower t bits say what the rounding did. A code is the sign (bit
7) and those upper bits less 8 * `base`, one number for each matrix, so that the largest one fits (bits 0 to 6); 0 stands for upper bits of
zero, whatever the base. So with a code c, its low bits n and v = c & 127:

    u = ((v + 8 * base if v else 0) << t | n) - 2^(t-1)

Numbers whose upper bits do not fit (the small ones of a matrix with a wide range, infinities, NaN, the largest finite numbers, which would
round to infinity) are exceptions: their code is 0, their low bits are those of zero, and their own 16 bits are in a list.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cats.errors import CatsError

KEPT_BITS, NIBBLE = 3, 4
LARGEST_CODE = 127
EXPONENTS = 16
"""Of a code, so that it has four bits for them."""
BLOCK = 64
"""Weights whose low bits are packed together; a row's are whole blocks."""
MOST_EXCEPTIONS = 0.01
AT_ONCE = 1 << 18
"""Weights that are decoded at a time, so that what lies between two steps stays in the processor's cache."""
HEADER = 1
"""Numbers before `starts` in a matrix' exceptions: the base."""


@dataclass(frozen=True)
class Layout:
    """How the numbers of a dtype are cut.

    Attributes:
        low_bits: t.
        infinity: its magnitude.
    """

    dtype: torch.dtype
    low_bits: int
    infinity: int

    @property
    def half(self) -> int:
        """What is added before the cut; also the low bits of a zero."""
        return 1 << (self.low_bits - 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of the low bits of a block."""
        return BLOCK * self.low_bits // 8

    def row_bytes(self, columns: int) -> int:
        """Bytes of the low bits of a row of so many weights."""
        return -(-columns // BLOCK) * self.block_bytes


LAYOUTS = {
    "bfloat16": Layout(torch.bfloat16, 4, 0x7F80),
    "float16": Layout(torch.float16, 7, 0x7C00),
}
"""By the name of the dtype, as configurations write it."""


class Pieces(NamedTuple):
    """A matrix [R, K], or rows of it, cut up.

    Attributes:
        codes_RK: uint8.
        low_RB: uint8, packed.
        misfits_RK: truth values: which numbers are exceptions.
    """

    codes_RK: torch.Tensor
    low_RB: torch.Tensor
    misfits_RK: torch.Tensor


class Exceptions(NamedTuple):
    """The list of a matrix [R, K], views of one int32 tensor: what `listed` wrote.

    Attributes:
        base: of the codes, [1].
        starts: [R + 1]; row r has the entries from `starts[r]` up to `starts[r + 1]`.
        columns, bits: of each entry, rows first; the bits of the number are the lower 16.
    """

    base: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    bits: torch.Tensor


def bits_of(numbers: torch.Tensor) -> torch.Tensor:
    """Half-precision numbers as int16, the sign first."""
    return numbers.view(torch.int16)


def upper(numbers: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Magnitudes rounded to three mantissa bits, as int32."""
    return ((bits_of(numbers) & 0x7FFF).int() + layout.half) >> layout.low_bits


def top_of(numbers: torch.Tensor, layout: Layout) -> int:
    """The largest rounded magnitude of numbers whose rounding is finite; 0 where there are none."""
    rounded = upper(numbers, layout)
    return int((rounded * (rounded < layout.infinity >> layout.low_bits)).max()) if rounded.numel() else 0


def base_for(top: int) -> int:
    """The base of a matrix whose largest rounded magnitude is `top`: the exponent of code 8 less one."""
    return max(0, (top >> KEPT_BITS) - (EXPONENTS - 1))


def split(numbers_RK: torch.Tensor, base: int, layout: Layout) -> Pieces:
    """Cut rows of a matrix up."""
    bits = bits_of(numbers_RK)
    lifted = (bits & 0x7FFF).int() + layout.half
    rounded = lifted >> layout.low_bits
    values = rounded - (base << KEPT_BITS)
    fits = (values >= 1) & (values <= LARGEST_CODE) & (rounded < layout.infinity >> layout.low_bits)
    tiny = rounded == 0
    codes = ((values & LARGEST_CODE) * fits) | (((bits < 0) & (fits | tiny)).int() << 7)
    low = torch.where(fits | tiny, lifted & ((1 << layout.low_bits) - 1), layout.half)
    return Pieces(codes.to(torch.uint8), packed(low.to(torch.uint8), layout), ~(fits | tiny))


def packed(low_RK: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Low bits, uint8, packed in blocks of 64 columns; the last one is filled up with zeros' low bits.

    4 bits: byte j of 32 holds column j (lower half) and column j + 32 (upper half). 7 bits: byte j of 56 holds column j (lower seven bits);
    column 56 + i has its bit b in the top bit of byte 8 b + i.
    """
    rows, columns = low_RK.shape
    blocks = -(-columns // BLOCK)
    whole = low_RK.new_full((rows, blocks * BLOCK), layout.half)
    whole[:, :columns] = low_RK
    block = whole.view(rows, blocks, BLOCK)
    if layout.low_bits == 4:
        return (block[..., :32] | (block[..., 32:] << 4)).view(rows, -1)
    shifts = torch.arange(7, dtype=torch.uint8, device=low_RK.device)[:, None]
    tops = (block[..., None, 56:] >> shifts) & 1
    return (block[..., :56] | (tops.flatten(-2) << 7)).view(rows, -1)


def unpacked(low_RB: torch.Tensor, columns: int, layout: Layout) -> torch.Tensor:
    """What `packed` packed, uint8 [R, columns]."""
    rows = len(low_RB)
    block = low_RB.view(rows, -1, layout.block_bytes)
    whole = low_RB.new_empty(rows, block.shape[1], BLOCK)
    if layout.low_bits == 4:
        whole[..., :32], whole[..., 32:] = block & 15, block >> 4
    else:
        whole[..., :56] = block & 127
        tops = (block >> 7).unflatten(-1, (7, 8))
        whole[..., 56:] = tops[..., 0, :]
        for bit in range(1, 7):
            whole[..., 56:] |= tops[..., bit, :] << bit
    return whole.view(rows, -1)[:, :columns]


def listed(base: int, counts_R: torch.Tensor, columns: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The exceptions of a matrix as one int32 tensor [1 + R + 1 + 2 n]: base, where each row's begin, their columns, their bits.

    Args:
        counts_R: how many each row has.
        columns, bits: of each, rows first.
    """
    starts = torch.cat([counts_R.new_zeros(1), counts_R.cumsum(0)])
    return torch.cat([part.to(torch.int32).flatten() for part in (torch.tensor([base]), starts, columns, bits.int() & 0xFFFF)])


def exceptions_of(listed_E: torch.Tensor, rows: int) -> Exceptions:
    """Views of what `listed` made, for a matrix of so many rows."""
    entries = (len(listed_E) - HEADER - rows - 1) // 2
    return Exceptions(*listed_E.split([HEADER, rows + 1, entries, entries]))


def exceptions_between(listed_E: torch.Tensor, rows: int, start: int, stop: int) -> torch.Tensor:
    """The list of rows [start, stop) alone, of that of a matrix of so many rows."""
    exceptions = exceptions_of(listed_E, rows)
    first, last = exceptions.starts[[start, stop]].tolist()
    counts_R = exceptions.starts[start : stop + 1].diff()
    return listed(int(exceptions.base), counts_R, exceptions.columns[first:last], exceptions.bits[first:last])


def check_exceptions(listed_E: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raise `CatsError` unless the tensor `name` can be the list of a matrix of this shape; decoding relies on it."""
    rows, columns = shape
    entries = len(listed_E) - HEADER - rows - 1
    if entries >= 0 and entries % 2 == 0:
        exceptions = exceptions_of(listed_E, rows)
        starts = exceptions.starts
        ordered = bool((starts.diff() >= 0).all()) and int(starts[0]) == 0 and int(starts[-1]) == entries // 2
        inside = bool(((exceptions.columns >= 0) & (exceptions.columns < columns)).all())
        if ordered and inside and 0 <= int(exceptions.base) < 256:
            return
    where = f"a matrix of {rows} rows and {columns} columns"
    raise CatsError(f"{name} is no list of exceptions of {where}; the file is damaged, convert the checkpoint again.")


def check_share(exceptions: int, weights: int, name: str) -> None:
    """Raise `CatsError` where too many numbers of a matrix are exceptions."""
    if exceptions > MOST_EXCEPTIONS * weights:
        raise CatsError(
            f"{name} has {exceptions} of {weights} numbers that codes of eight bits cannot stand for, more than "
            f"{MOST_EXCEPTIONS:.0%}: its range is too wide for nested weights; leave the checkpoint as it is."
        )


def encode(matrix_RK: torch.Tensor, name: str = "the matrix") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [R, K], packed low bits and exceptions of a bfloat16 or float16 matrix; raises `CatsError` where it does not suit."""
    layout = layout_of(matrix_RK.dtype)
    base = base_for(top_of(matrix_RK, layout))
    pieces = split(matrix_RK, base, layout)
    places = pieces.misfits_RK.nonzero()
    check_share(len(places), matrix_RK.numel(), name)
    bits = bits_of(matrix_RK)[places[:, 0], places[:, 1]]
    return pieces.codes_RK, pieces.low_RB, listed(base, pieces.misfits_RK.sum(1), places[:, 1], bits)


def layout_of(dtype: torch.dtype) -> Layout:
    """The layout of a dtype; `KeyError` for one that is no half precision."""
    return LAYOUTS[str(dtype).removeprefix("torch.")]


def magnitudes(codes_RK: torch.Tensor, base: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Upper bits of codes in their place, int16: the rounded magnitudes."""
    values = codes_RK.to(torch.int16) & LARGEST_CODE
    if base.is_cuda:  # asking for its value would make the host wait
        return torch.where(values > 0, values + (base << KEPT_BITS).to(torch.int16), values) << layout.low_bits
    offset = int(base) << KEPT_BITS
    return (values if offset == 0 else torch.where(values > 0, values + offset, values)) << layout.low_bits


def signs(codes_RK: torch.Tensor) -> torch.Tensor:
    """Sign bits of codes in their place, int16."""
    return codes_RK.view(torch.int8).to(torch.int16) & -0x8000


def row_blocks(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) in blocks of about AT_ONCE weights."""
    height = max(1, AT_ONCE // max(1, columns))
    return ((first, min(first + height, stop)) for first in range(start, stop, height))


def decode(
    codes_RK: torch.Tensor, low_RB: torch.Tensor, listed_E: torch.Tensor, layout: Layout, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Rows [start, stop) of the matrix as it was, bit for bit."""
    rows, columns = codes_RK.shape
    stop, exceptions = rows if stop is None else stop, exceptions_of(listed_E, rows)
    out = torch.empty(stop - start, columns, dtype=torch.int16, device=codes_RK.device)
    for first, last in row_blocks(start, stop, columns):
        codes, low = codes_RK[first:last], unpacked(low_RB[first:last], columns, layout)
        into = out[first - start : last - start]
        torch.bitwise_or((magnitudes(codes, exceptions.base, layout) | low) - layout.half, signs(codes), out=into)
    restore(out, exceptions, start, stop)
    return out.view(layout.dtype)


def restore(bits_RK: torch.Tensor, exceptions: Exceptions, start: int, stop: int) -> None:
    """Put the exceptions of rows [start, stop) into their places."""
    whole = stop - start == len(exceptions.starts) - 1
    first, last = (0, len(exceptions.columns)) if whole else exceptions.starts[[start, stop]].tolist()
    if first == last:
        return
    rows = torch.arange(stop - start, device=bits_RK.device)
    of_entry = torch.repeat_interleave(rows, exceptions.starts[start : stop + 1].diff(), output_size=last - first)
    bits_RK[of_entry, exceptions.columns[first:last].long()] = exceptions.bits[first:last].to(torch.int16)


def decode_coarse(codes_RK: torch.Tensor, listed_E: torch.Tensor, layout: Layout, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) as their codes alone say: rounded to three mantissa bits, exceptions 0; in the matrix' dtype."""
    rows, columns = codes_RK.shape
    stop, base = rows if stop is None else stop, listed_E[:HEADER]
    out = torch.empty(stop - start, columns, dtype=torch.int16, device=codes_RK.device)
    for first, last in row_blocks(start, stop, columns):
        codes = codes_RK[first:last]
        torch.bitwise_or(magnitudes(codes, base, layout), signs(codes), out=out[first - start : last - start])
    return out.view(layout.dtype)
