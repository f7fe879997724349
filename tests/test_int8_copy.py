"""An int8 copy of plain weights drafts; it is made at loading, resident where the exact weights are not, and decides no token."""

from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import cats
from cats.cli.memory_flags import add_memory_flags, memory_options
from cats.methods import with_needs
from cats.planning.plan import COARSE, Demand, ModelSizes, Piece, plan_memory
from cats.weight import Int8Copy
from tests.test_contract import CONFIG, ViewStub, plain
from tests.tiny_models import TinyModel, prompts

Tiny = Callable[[str], TinyModel]
STREAMED = cats.MemoryOptions(pinning=False, coarse="int8", nodes=5)


def test_the_copy_is_within_half_a_step_of_every_number() -> None:
    weight = Int8Copy(torch.float32, sparing=True)
    exact = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact[3] = 0
    parts = weight.make(exact)
    assert (parts["codes"].dtype, parts["scales"].shape) == (torch.int8, (40,))
    error = (weight.rows(parts, 0, 40) - exact.float()).abs()
    assert bool((error <= parts["scales"][:, None] * 0.501).all())
    assert torch.equal(parts["codes"].abs().amax(1) == 127, exact.any(1))
    assert torch.equal(weight.rows(parts, 5, 9), weight.rows(parts, 0, 40)[5:9])


def scramble(model: cats.MultiAdapterCATSModel) -> int:
    """Make noise of every copy; returns how many there were."""
    copies = [tensor for piece, tensor in model.base.source._resident.items() if piece.part == "codes"]
    for tensor in copies:
        tensor.random_(-127, 128, generator=torch.Generator().manual_seed(1))
    return len(copies)


def test_a_scrambled_copy_costs_speed_and_no_token(tiny: Tiny) -> None:
    exact, model = cats.load(tiny("llama").base), cats.load(tiny("llama").base, memory=STREAMED)
    verdicts = []
    for wrong in (False, True):
        stub = ViewStub(COARSE)
        if wrong:
            assert scramble(model) == 6 * 7
        for prompt in prompts(count=2, longest=10, seed=8):
            assert cats.generate(model, prompt, stub, CONFIG).ids == plain(exact, prompt)
        verdicts.append(sum(stub.verdicts) / len(stub.verdicts))
    assert verdicts[0] > 0.7
    assert verdicts[1] < 0.5


def test_a_copy_without_a_budget(tiny: Tiny) -> None:
    """Everything is resident, exact weights and copies."""
    exact, model = cats.load(tiny("qwen2").base), cats.load(tiny("qwen2").base, memory=cats.MemoryOptions(coarse="int8"))
    stub, prompt = ViewStub(COARSE), prompts(count=1, longest=10, seed=8)[0]
    assert cats.generate(model, prompt, stub, CONFIG).ids == plain(exact, prompt)
    assert scramble(model) == 6 * 7


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_a_pinned_matrix_gives_up_its_copy(tiny: Tiny, share: float) -> None:
    """It drafts itself, and more is pinned for it."""
    exact, memory = cats.load(tiny("llama").base), replace(STREAMED, budget_bytes=10**9, covers="weights", ring_buffers=1)
    least = cats.load(tiny("llama").base, memory=memory, plan=None).base.source.plan.charged
    everything = cats.load(tiny("llama").base, memory=cats.MemoryOptions(10**9, "weights")).base.source.plan
    alone = sum(piece.resident_bytes for piece in everything.pinned)
    enough = replace(memory, budget_bytes=round(least + share * alone * 0.7), pinning=True)
    model = cats.load(tiny("llama").base, memory=enough, plan=None)
    plan, stub = model.base.source.plan, ViewStub(COARSE)
    assert plan.charged <= (plan.budget_bytes or 0)
    exactly = {(piece.layer, piece.matrix) for piece in plan.pinned if piece.part == "exact"}
    copied = {(piece.layer, piece.matrix) for piece in plan.pinned if piece.part == "codes"}
    assert exactly
    assert not exactly & copied
    assert len(exactly | copied) == 6 * 7
    prompt = prompts(count=1, longest=10, seed=8)[0]
    assert cats.generate(model, prompt, stub, CONFIG).ids == plain(exact, prompt)


@pytest.mark.parametrize("budget", range(60, 400, 7))
def test_plans_with_copies_keep_to_the_budget(budget: int) -> None:
    """In whole huge pages too, where two sums are rounded up."""
    size = 1_700_000
    pieces = []
    for layer in range(40):
        pieces.append(Piece(layer, "mlp.up_proj", 2 * size, 2 * size, "exact", stands_for=frozenset({"coarse"})))
        pieces.append(Piece(layer, "mlp.up_proj", size, size, "codes", frozenset({"coarse"})))
    sizes = ModelSizes(40, 8, 8, 8, 8, (("mlp.up_proj", 2 * size),), 0, 0, 0, stored=tuple(pieces))
    demand = Demand(views=(COARSE,), positions=1)
    if budget < 80:
        with pytest.raises(cats.CatsError, match="need"):
            plan_memory(sizes, demand, budget * 10**6)
        return
    plan = plan_memory(sizes, demand, budget * 10**6)
    assert plan.charged <= budget * 10**6
    served = {piece.layer for piece in plan.pinned}
    assert len(served) == 40
    assert bool(plan.streamed) == (budget < 137)


def test_copies_of_what_is_no_plain_checkpoint_are_refused() -> None:
    with pytest.raises(cats.CatsError, match="coarse is 'int4'; it must be int8"):
        cats.MemoryOptions(coarse="int4")


def test_a_copy_that_nothing_drafts_with_is_refused() -> None:
    parser = ArgumentParser()
    add_memory_flags(parser)
    arguments = parser.parse_args(["--coarse", "int8", "--no-pinning"])
    for methods in ([], [cats.AutoregressiveConfig()]):
        with pytest.raises(cats.CatsError, match="--coarse holds a copy that some methods draft with; name one of them"):
            memory_options(arguments, 8, methods)
    assert with_needs(cats.MemoryOptions(coarse="int8")).coarse == "int8"
