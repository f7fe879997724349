"""Nested weights give back every bit: all 2^16 half-precision numbers under every base, and matrices that are all one thing."""

import pytest
import torch

import cats
from cats.nested import format
from cats.nested.format import BLOCK, LAYOUTS, Layout

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def reassembled(numbers_RK: torch.Tensor, base: int, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(bits after a round trip, which of them are exceptions), however many there are."""
    pieces = format.split(numbers_RK, base, layout)
    places = pieces.misfits_RK.nonzero()
    bits = numbers_RK.view(torch.int16)[places[:, 0], places[:, 1]]
    listed = format.listed(base, pieces.misfits_RK.sum(1), places[:, 1], bits)
    format.check_exceptions(listed, tuple(numbers_RK.shape), "it")
    return format.decode(pieces.codes_RK, pieces.low_RB, listed, layout).view(torch.int16), pieces.misfits_RK


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit: -0 is not 0, and NaN is itself."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))


def bases(layout: Layout) -> range:
    """All that a matrix can have."""
    return range(0, format.base_for((layout.infinity >> layout.low_bits) - 1) + 1)


def test_every_number_under_every_base(layout: Layout) -> None:
    for base in bases(layout):
        for columns in (256,) if base % 16 else (256, 2**10, 2**16):
            numbers = EVERY.view(layout.dtype).view(-1, columns)
            found, _ = reassembled(numbers, base, layout)
            assert torch.equal(found, numbers.view(torch.int16))


def test_exceptions_are_what_the_codes_have_no_room_for(layout: Layout) -> None:
    """Upper bits from 1 (a code's) to 127 beyond the base, and what rounds to zero, fit; a rounding to infinity never does."""
    magnitude = (EVERY.int() & 0x7FFF) + layout.half >> layout.low_bits
    for base in bases(layout):
        _, misfits = reassembled(EVERY.view(layout.dtype)[None], base, layout)
        above = magnitude - 8 * base
        fits = (magnitude == 0) | ((above >= 1) & (above <= 127) & (magnitude < layout.infinity >> layout.low_bits))
        assert torch.equal(misfits[0], ~fits)
    assert bool(misfits[0][EVERY.view(layout.dtype).isnan()].all())


def test_codes_are_the_nearest_numbers_of_three_mantissa_bits(layout: Layout) -> None:
    """Against a rounding of float64: within 1/16 of the number, and finite."""
    numbers = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(layout.dtype)
    codes, _, listed = format.encode(numbers)
    coarse = format.decode_coarse(codes, listed, layout)
    assert coarse.dtype == layout.dtype
    large = numbers.abs() > numbers.abs().max() * 2.0**-13
    error = (coarse.double() - numbers.double()).abs()[large] / numbers.double().abs()[large]
    assert float(error.max()) <= 1 / 16
    assert float(error.max()) > 1 / 20
    everything = format.split(EVERY.view(layout.dtype)[None], bases(layout)[-1], layout)
    shortest = format.listed(bases(layout)[-1], torch.zeros(1, dtype=torch.long), EVERY[:0], EVERY[:0])
    assert bool(format.decode_coarse(everything.codes_RK, shortest, layout).isfinite().all())


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 63, 64, 65, 128, 200])
def test_rows_of_any_length_and_any_part_of_a_matrix(layout: Layout, columns: int) -> None:
    numbers = torch.randn(23, columns, generator=torch.Generator().manual_seed(columns)).mul_(0.02).to(layout.dtype)
    numbers[3, columns // 2] = 5e-8
    parts = format.encode(numbers) if columns > 31 else None
    if parts is None:
        found, _ = reassembled(numbers, format.base_for(format.top_of(numbers, layout)), layout)
        assert torch.equal(found, numbers.view(torch.int16))
        return
    assert parts[1].shape == (23, -(-columns // BLOCK) * BLOCK * layout.low_bits // 8)
    for start, stop in ((0, 23), (0, 1), (3, 4), (4, 23), (7, 7)):
        assert same(format.decode(*parts, layout, start, stop), numbers[start:stop])
        coarse = format.decode_coarse(parts[0], parts[2], layout)
        assert same(format.decode_coarse(parts[0], parts[2], layout, start, stop), coarse[start:stop])


def test_decoding_in_blocks_is_decoding_at_once(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(layout.dtype)
    parts = format.encode(numbers)
    monkeypatch.setattr(format, "AT_ONCE", 200)
    assert same(format.decode(*parts, layout), numbers)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-7, 60000.0, 6e-5])
def test_matrices_of_one_value_have_no_exceptions(layout: Layout, value: float) -> None:
    """Subnormals of float16 among them; zeros of both signs."""
    numbers = torch.full((5, 70), value).to(layout.dtype)
    codes, low, listed = format.encode(numbers)
    assert len(format.exceptions_of(listed, 5).columns) == 0
    assert same(format.decode(codes, low, listed, layout), numbers)


def test_zeros_among_large_numbers_are_no_exceptions(layout: Layout) -> None:
    """Pruned and padded matrices: code 0 is kept for them."""
    numbers = torch.full((5, 70), 30000.0).to(layout.dtype)
    numbers[:, ::2], numbers[1] = 0.0, -0.0
    parts = format.encode(numbers)
    assert int(parts[2][0]) > 0
    assert len(parts[2]) == 1 + 6
    assert same(format.decode(*parts, layout), numbers)
    assert same(format.decode_coarse(parts[0], parts[2], layout)[1], numbers[1])


@pytest.mark.parametrize("strange", [float("inf"), float("-inf"), float("nan")])
def test_strange_numbers_are_exceptions(layout: Layout, strange: float) -> None:
    numbers = torch.randn(20, 70, generator=torch.Generator().manual_seed(2)).to(layout.dtype)
    numbers[7, 11] = strange
    parts = format.encode(numbers)
    assert same(format.decode(*parts, layout), numbers)
    assert float(format.decode_coarse(parts[0], parts[2], layout)[7, 11]) == 0


def test_too_many_exceptions_are_refused() -> None:
    numbers = torch.full((10, 100), 1e-30).bfloat16()
    numbers[0, 0] = 1.0
    with pytest.raises(cats.CatsError, match=r"up_proj has 999 of 1000 numbers that codes .* more than 1%: its range is too wide"):
        format.encode(numbers, "up_proj")


def test_a_damaged_list_is_refused() -> None:
    listed = format.listed(3, torch.tensor([1, 0, 1]), torch.tensor([4, 5]), torch.tensor([7, 8]))
    format.check_exceptions(listed, (3, 6), "it")
    for place, value in ((0, -1), (0, 256), (1, 1), (2, 9), (4, 1), (5, 6), (6, -1)):
        damaged = listed.clone()
        damaged[place] = value
        with pytest.raises(cats.CatsError, match="is no list of exceptions of a matrix of 3 rows and 6 columns"):
            format.check_exceptions(damaged, (3, 6), "it")
    for length in (4, 8):
        with pytest.raises(cats.CatsError, match="is no list of exceptions"):
            format.check_exceptions(listed[:length], (3, 6), "it")
