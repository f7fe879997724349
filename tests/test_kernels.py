"""The compiled functions against NumPy in float64, and bit for bit against themselves: other rows, other threads, other places."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

import numba

from cats.kernels import code
from cats.kernels.team import Team

if not code.LANES:
    pytest.skip("no fused multiply-add of vectors on this processor", allow_module_level=True)

KINDS = {code.BF16: torch.bfloat16, code.F16: torch.float16, code.F32: torch.float32}
TEAMS = {size: Team(size) for size in (1, 2, 3)}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(x_TK: torch.Tensor, weight_RK: torch.Tensor, kind: int, threads: int = 2) -> np.ndarray:
    out = np.full((len(x_TK), len(weight_RK)), np.nan, np.float32)
    TEAMS[threads].run(code.run_product, 1, 8 * weight_RK.data_ptr() + kind, 0, x_TK.numpy(), out, np.empty((0, 0), np.float32))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "length"), [(64, 64), (130, 96), (7, 5), (66, 37), (1, 16), (9, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 40])
def test_products_are_right_and_do_not_depend_on_the_rows_beside_or_the_threads(kind: int, rows: int, length: int, count: int) -> None:
    x, weight = numbers(count, length), numbers(rows, length, seed=1).to(KINDS[kind])
    out = product(x, weight, kind)
    wanted = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    assert bool((torch.from_numpy(out).double() - wanted).abs().le(1e-6 * scale + 1e-12).all())
    alone = np.concatenate([product(x[row : row + 1].contiguous(), weight, kind) for row in range(count)])
    assert (out == alone).all()
    assert all((product(x, weight, kind, threads) == out).all() for threads in (1, 3))


def test_a_weight_may_lie_anywhere() -> None:
    """Tensors in a checkpoint begin at any even byte."""
    x, weight = numbers(3, 48), numbers(20, 48, seed=1).bfloat16()
    shifted = torch.zeros(weight.numel() + 1, dtype=torch.bfloat16)[1:].copy_(weight.flatten()).view(20, 48)
    assert (product(x, weight, code.BF16) == product(x, shifted, code.BF16)).all()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 576])
def test_norms_are_those_of_float64(length: int) -> None:
    x, weight = numbers(5, length), numbers(length, seed=1)
    out = np.empty((5, length), np.float32)
    TEAMS[2].run(code.run_norm, 0, weight.data_ptr(), np.float32(1e-5), x.numpy(), out)
    wide = x.double()
    wanted = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    np.testing.assert_allclose(out, wanted.numpy(), rtol=2e-6, atol=1e-7)


def test_exponentials_are_exact_to_a_few_units_and_their_sum_is_too() -> None:
    x = np.linspace(-120, 0, 64 * code.LANES).astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    raised = x.copy()
    total = exponentials(raised)
    np.testing.assert_allclose(raised[x > -86], wanted[x > -86], rtol=4e-7)
    assert (raised[x < -87.1] == 0).all()
    assert abs(total - wanted.sum()) < 1e-5 * wanted.sum()


@numba.njit
def exponentials(x: np.ndarray) -> float:
    return code.to_exponentials(x.ctypes.data, len(x), np.float32(0.0))


@pytest.mark.parametrize("width", [64, 8, 20, 128])
@pytest.mark.parametrize(("seen", "others"), [(1, ()), (33, ()), (0, (3, 9, 40)), (17, (20, 30, 22)), (500, (700, 600))])
def test_attention_is_that_of_float64_and_sees_a_path_in_any_slots(width: int, seen: int, others: tuple[int, ...]) -> None:
    keys, values, queries = numbers(800, width), numbers(800, width, seed=1), numbers(3, width, seed=2)
    path = [*range(seen), *others]
    out = attended(queries, keys, values, seen, others)
    chances = (queries.double() @ keys[path].double().T).softmax(-1)
    np.testing.assert_allclose(out, (chances @ values[path].double()).numpy(), rtol=2e-5, atol=2e-6)
    moved_keys, moved_values = (torch.cat([table[path], table]) for table in (keys, values))
    assert (out == attended(queries, moved_keys, moved_values, len(path), ())).all()  # the same path, committed
    one_by_one = [attended(queries[head : head + 1].contiguous(), keys, values, seen, others) for head in range(3)]
    assert (out == np.concatenate(one_by_one)).all()


def attended(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: int, others: tuple[int, ...]) -> np.ndarray:
    out, scores = np.empty(queries.shape, np.float32), np.empty((len(queries), 1024), np.float32)
    heads, width = queries.shape
    q, k, v = (tensor.data_ptr() for tensor in (queries, keys, values))
    slots = np.array(others, np.int64)
    code.attend(q, heads, width, k, v, 4 * width, seen, slots, scores.ctypes.data, scores.strides[0], out.ctypes.data)
    return out


def test_an_error_in_one_thread_reaches_the_caller_and_the_team_goes_on() -> None:
    def fails(crew: code.Crew) -> None:
        if crew.me == 1:
            raise ValueError("of thread 1")

    with pytest.raises(ValueError, match="of thread 1"):
        TEAMS[2].run(fails, 0)
    seen: list[int] = []
    note: Callable[[code.Crew], None] = lambda crew: seen.append(crew.me)  # noqa: E731
    TEAMS[2].run(note, 0)
    assert sorted(seen) == [0, 1]
