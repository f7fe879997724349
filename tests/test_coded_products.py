"""Compiled products of codes: the numbers that cats/nested/format.py says they stand for, and nested weights bit for bit as plain ones."""

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from cats.kernels import code
from cats.kernels.layers import Description, word
from cats.kernels.team import Team
from cats.nested import format
from cats.weight import Coded

if not code.LANES:
    pytest.skip("no fused multiply-add of vectors on this processor", allow_module_level=True)

SHAPES = [(64, 64), (37, 96), (130, 576), (5, 100), (3, 7)]
TEAM = Team(2)


def matrix(rows: int, columns: int, dtype: torch.dtype, wide: bool = False) -> torch.Tensor:
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    numbers *= 2.0 ** torch.randint(-6 if wide else -2, 3, (rows, columns), generator=torch.Generator().manual_seed(1))
    numbers[0, : columns // 3] = 0.0
    if wide and rows * columns > 2000:
        numbers[rows // 2, 1::17] *= 1e-6  # exceptions
    return numbers.to(dtype)


def product(x_TK: torch.Tensor, at: int, rows: int) -> torch.Tensor:
    """By the word of a matrix."""
    out = np.full((len(x_TK), rows), np.nan, np.float32)
    scratch = np.zeros((TEAM.size, code.DECODED * x_TK.shape[1] // 2 + 1), np.float32)
    TEAM.run(code.run_product, 1, at, 0, x_TK.numpy(), out, scratch)
    return torch.from_numpy(out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 7, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_codes_alone_are_the_coarse_numbers(shape: tuple[int, int], count: int, dtype: torch.dtype, wide: bool) -> None:
    weight = matrix(*shape, dtype, wide)
    codes, _, exceptions = format.encode(weight)
    layout = format.layout_of(dtype)
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(2))
    coarse = format.decode_coarse(codes, exceptions, layout)
    least = torch.tensor(8 * int(exceptions[0]) << layout.low_bits, dtype=torch.int16) | format.signs(codes)  # what a code of 0 counts as
    coarse = torch.where(codes & 127 == 0, least.view(dtype), coarse)
    coded = Coded(codes, layout, exceptions)
    described = Description(coded)
    assert torch.equal(product(x, described.word(coded), shape[0]), product(x, word(coarse), shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 7, 20])
@pytest.mark.parametrize("wide", [False, True])
def test_nested_weights_multiply_as_the_plain_ones_bit_for_bit(shape: tuple[int, int], count: int, wide: bool) -> None:
    weight = matrix(*shape, torch.bfloat16, wide)
    codes, low, exceptions = format.encode(weight)
    if wide and weight.numel() > 2000:
        assert len(format.exceptions_of(exceptions, shape[0]).bits) > 0
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(2))
    coded = Coded(codes, format.layout_of(torch.bfloat16), exceptions, low)
    described = Description(coded)
    assert torch.equal(product(x, described.word(coded), shape[0]), product(x, word(weight), shape[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 7])
def test_integers_are_scaled_by_row(shape: tuple[int, int], count: int) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(2))
    coded = Coded(codes, scales=scales)
    described = Description(coded)
    found = product(x, described.word(coded), shape[0])
    assert torch.equal(found, product(x, word(codes.float()), shape[0]) * scales)
