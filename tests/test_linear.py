"""Products with weights that are upcast in blocks: against float64, and independent of where a weight lies."""

import pytest
import torch

import cats.linear
from cats import kernels
from cats.linear import Linear, WorkSpace, project

WIDTH = 96
HALF_TOLERANCE, TOLERANCE = 5e-2, 1e-4


@pytest.fixture(params=[1 << 21, 40 * WIDTH], ids=["whole", "blocks"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cats.linear, "BLOCK", request.param)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("rows", [1, 3, 9, 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_products_are_right(dtype: torch.dtype, stored: torch.dtype, rows: int) -> None:
    x, weight = drawn(1, rows, WIDTH, dtype=dtype, seed=1), 0.1 * drawn(131, WIDTH, dtype=stored, seed=2)
    bias = drawn(131, dtype=dtype, seed=3)
    expected = x.double() @ weight.to(dtype).double().T + bias.double()
    found = project(x, weight, bias, WorkSpace())
    assert found.dtype == dtype
    tolerance = HALF_TOLERANCE if dtype in (torch.bfloat16, torch.float16) else TOLERANCE
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("shift", [1, 2, 8])
def test_the_place_of_a_weight_does_not_show(shift: int) -> None:
    weight = drawn(131, WIDTH, dtype=torch.float32, seed=4)
    elsewhere = torch.empty(weight.numel() + shift)[shift:].view(weight.shape).copy_(weight)
    for rows in (1, 7, 16):
        x = drawn(1, rows, WIDTH, dtype=torch.float32, seed=5)
        assert torch.equal(project(x, weight, None, WorkSpace()), project(x, elsewhere, None, WorkSpace()))


def test_gradients_pass_through() -> None:
    layer = Linear(drawn(5, WIDTH, dtype=torch.bfloat16, seed=6), None, WorkSpace())
    x = drawn(2, WIDTH, dtype=torch.float32, seed=7).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.float().sum(0).expand(2, -1))


@pytest.mark.parametrize(
    ("units", "fast"),
    [
        ({"avx512_f", "avx2"}, ()),
        ({"avx512_f", "avx512_bf16"}, (torch.bfloat16,)),
        ({"amx_bf16", "amx_tile"}, (torch.bfloat16,)),
        ({"avx512_bf16", "avx512_fp16"}, (torch.bfloat16, torch.float16)),
        ({"amx_fp16"}, (torch.float16,)),
    ],
)
def test_a_cpu_is_asked_for_units_of_each_half_precision(
    monkeypatch: pytest.MonkeyPatch, units: set[str], fast: tuple[torch.dtype, ...]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True))
    assert tuple(dtype for dtype in (torch.bfloat16, torch.float16) if cats.linear.has_half_units(dtype)) == fast


def test_older_versions_of_torch_are_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_fp16_supported", raising=False)
    assert cats.linear.has_half_units(torch.bfloat16)
    assert not cats.linear.has_half_units(torch.float16)


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float16])
def test_only_a_fast_half_precision_is_multiplied_as_it_is(monkeypatch: pytest.MonkeyPatch, fast: torch.dtype) -> None:
    monkeypatch.setattr(cats.linear, "FAST_HALVES", frozenset({fast}))
    multiplied, linear = [], torch.nn.functional.linear

    def watch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        multiplied.append(weight.dtype)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = drawn(1, 40, WIDTH, dtype=dtype, seed=8), 0.1 * drawn(131, WIDTH, dtype=dtype, seed=9)
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(project(x, weight, None, WorkSpace()).double(), expected, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)
        upcast = [] if kernels.multiply(torch.float32) else [torch.float32]  # torch is not asked for what is compiled
        assert multiplied == ([dtype] if dtype == fast else upcast)
        multiplied.clear()
