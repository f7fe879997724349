"""A device with memory of its own: two accounts, three homes. Plans are arithmetic; the store runs with a stand-in for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import cats
import cats.loading
import cats.runtime.store
from cats.errors import BudgetError
from cats.planning.plan import Demand, ModelSizes, plan_memory
from tests.test_streaming import assert_equal, run
from tests.tiny_models import TinyModel

Tiny = Callable[[str], TinyModel]
SIZES = ModelSizes(10, 64, 128, 1000, 64, (("self_attn.q_proj", 40_000), ("mlp.up_proj", 100_000)), 512, 128_000, 50_000, 1000, 640)
DEMAND = Demand(front=2, adapters=1, positions=100, nodes=8, ring_buffers=2, interpreter_bytes=10**6)
EVERYTHING = sum(nbytes for _, nbytes in plan_memory(SIZES, DEMAND, None, "process", 10**9).device_charges)
PART = EVERYTHING - 600_000
"""Behind the front 520 000 bytes fit, the two places of 100 000 for what does not among them."""


@pytest.mark.parametrize("covers", ["weights", "process"])
@pytest.mark.parametrize(("device", "host"), [(EVERYTHING, None), (PART, None), (PART, 2_000_000), (PART, 500_000), (PART, 250_000)])
def test_every_piece_has_one_home_and_no_account_is_exceeded(device: int, host: int | None, covers: str) -> None:
    budget = host if host is None or covers == "weights" else host + 3_500_000  # libraries, and whole huge pages
    plan = plan_memory(SIZES, DEMAND, budget, covers, device)
    homes = [*plan.pinned, *plan.hosted, *plan.streamed]
    assert len(homes) == len(set(homes)) == len(SIZES.pieces)
    assert {piece for piece in SIZES.pieces if piece.layer < 2} <= plan.pinned
    assert sum(nbytes for _, nbytes in plan.device_charges) <= device
    assert budget is None or plan.charged <= budget
    assert bool(plan.ring_bytes) == bool(plan.streamed)
    assert list(plan.streamed) == [piece for piece in SIZES.pieces if piece in set(plan.streamed)]


def test_pieces_go_to_the_device_then_to_the_host_then_to_flash() -> None:
    everything, hosted = (plan_memory(SIZES, DEMAND, None, "weights", device) for device in (EVERYTHING, PART))
    flash = plan_memory(SIZES, DEMAND, 500_000, "weights", PART)
    assert not everything.hosted
    assert not everything.streamed
    assert "staging" not in dict(everything.device_charges)
    assert hosted.hosted
    assert not hosted.streamed
    assert dict(hosted.device_charges)["staging"] == 200_000
    assert flash.hosted
    assert flash.streamed
    assert not plan_memory(SIZES, replace(DEMAND, pinning=False), None, "weights", PART).hosted


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"the device's memory needs at least .* with layers \[0, 2\) resident"):
        plan_memory(SIZES, DEMAND, None, "weights", 10**6)
    with pytest.raises(BudgetError, match="the weights need at least"):
        plan_memory(SIZES, DEMAND, 100_000, "weights", PART)


def test_a_processor_has_one_memory(tiny: Tiny) -> None:
    with pytest.raises(cats.CatsError, match="limits a CUDA device's own memory, and the device is cpu"):
        cats.load(tiny("llama").base, memory=cats.MemoryOptions(device_bytes=10**9))


class Copies:
    """Stands in for a device's two places: copies that arrive a little later."""

    def __init__(self, device: torch.device, largest: int) -> None:
        self.nbytes, self.copied_bytes = 2 * largest, 0

    @contextmanager
    def copied(self, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, "Copies"]]:
        self.asked = 0
        self.copied_bytes += weight.nbytes
        yield weight.clone(), self

    def query(self) -> bool:
        """Not at once."""
        self.asked += 1
        return self.asked > 2


class Elsewhere(cats.runtime.store.Store):
    """A store that takes the processor for a device of its own."""

    def _staged(self) -> bool:
        return True


@pytest.mark.parametrize("shape", ["autoregressive", "cascade-tree"])
@pytest.mark.parametrize("host_bytes", [None, 60_000])
def test_copies_give_what_residents_give(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, shape: str, host_bytes: int | None) -> None:
    monkeypatch.setattr(cats.runtime.store, "Staging", Copies)
    monkeypatch.setattr(cats.runtime.store, "register", lambda arena: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(cats.loading, "Store", Elsewhere)
    monkeypatch.setattr(cats.loading, "check_device", lambda asked, device: None)
    source, expected = tiny("llama"), run(cats.load(tiny("llama").base, tiny("llama").adapters), shape)
    roomy = cats.load(source.base, source.adapters, memory=cats.MemoryOptions(device_bytes=10**9, nodes=64, positions=64)).base.source
    device_bytes = sum(nbytes for _, nbytes in roomy.plan.device_charges) - 80_000
    covers = {} if host_bytes is None else {"covers": "weights", "budget_bytes": host_bytes}
    memory = cats.MemoryOptions(device_bytes=device_bytes, nodes=64, positions=64, ring_buffers=2, **covers)  # type: ignore[arg-type]
    model = cats.load(source.base, source.adapters, memory=memory)
    plan = model.base.source.plan
    assert plan.hosted
    assert bool(plan.streamed) == (host_bytes is not None)
    assert_equal(run(model, shape), expected)
