"""Streamed weights give what resident ones give, bit for bit: tokens and logits, every method, every ring, every budget.

Logits are caught where the engine judges them. Budgets here count the weights only, so that they can be exact to the byte.
"""

import os
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cats
from cats.acceptance import Greedy, Verdict
from cats.cli.memory_flags import add_memory_flags, memory_options
from cats.linear import Linear
from cats.planning.plan import MemoryPlan, View
from cats.tree import TokenTree
from tests.methods import SHAPES, follows_the_clock, memory_for, sparse_views
from tests.tiny_models import EOS, FAMILIES, LAYERS, SHALLOW_EXIT, TinyModel, prompts
from tests.weight_kinds import STORED, of_kind, options_of, plain_of, rewritten

PROMPT = prompts(count=1, longest=20, seed=4)[0]
Tiny = Callable[[str], TinyModel]


class Witness(Greedy):
    """Greedy acceptance that keeps the logits it was shown."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        self.seen.append(logits_TV.clone())
        return super().judge(tree, nodes, logits_TV)


def run(model: cats.MultiAdapterCATSModel, shape: str) -> tuple[list[int], list[torch.Tensor]]:
    """An answer, and every logit behind it."""
    witness = Witness()
    config = cats.GenerationConfig(max_new_tokens=10, eos_token_ids=(EOS,))
    return cats.generate(model, PROMPT, SHAPES[shape], config, acceptance=witness).ids, witness.seen


def assert_equal(first: tuple[list[int], list[torch.Tensor]], second: tuple[list[int], list[torch.Tensor]]) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def plan_of(model: cats.MultiAdapterCATSModel) -> MemoryPlan:
    return model.base.source.plan


@cache
def resident(tiny: TinyModel, kind: str = "plain") -> cats.MultiAdapterCATSModel:
    return cats.load(plain_of(tiny.base, kind), tiny.adapters, dtype="float32")


@cache
def expected(tiny: TinyModel, shape: str, kind: str = "plain") -> tuple[list[int], list[torch.Tensor]]:
    if memory_for(shape) is not None:  # other copies draft other trees
        return run(streamed(tiny, cats.MemoryOptions(), kind), shape)
    return run(resident(tiny, kind if kind in STORED else "plain"), shape)


@pytest.fixture(params=["plain", "sum", "copy", "nested", "int8"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of the streamed weights; what is resident and expected is plain."""
    return str(request.param)


@cache
def streamed(tiny: TinyModel, memory: cats.MemoryOptions, kind: str = "plain") -> cats.MultiAdapterCATSModel:
    return cats.load(of_kind(tiny.base, kind), tiny.adapters, dtype="float32", memory=options_of(kind, memory), plan=None)


@cache
def smallest(tiny: TinyModel, ring_buffers: int = 1, kind: str = "plain", views: tuple[View, ...] = ()) -> int:
    """Bytes of the smallest budget of weights that this model, its adapters and these views fit into."""
    generous = cats.MemoryOptions(10**9, "weights", pinning=False, ring_buffers=ring_buffers, views=views)
    return plan_of(streamed(tiny, generous, kind)).charged


@pytest.mark.parametrize(
    ("shape", "ring_buffers"),
    [*((shape, 1) for shape in SHAPES), *((shape, ring) for ring in (2, 3) for shape in ("autoregressive", "cascade-tree", "kangaroo"))],
)
def test_every_method_and_ring(tiny: Tiny, kind: str, shape: str, ring_buffers: int) -> None:
    if kind == "plain" and memory_for(shape) is not None:
        pytest.skip("plain weights have no coarse form to draft with")
    pinning = kind != "nested"  # of matrices of a page and a half, three windows hold more than the budget leaves to be streamed
    views = sparse_views(shape)
    budget = smallest(tiny("llama"), ring_buffers, kind, views)
    memory = cats.MemoryOptions(budget, "weights", pinning=pinning, ring_buffers=ring_buffers, views=views)
    model = streamed(tiny("llama"), memory, kind)
    assert plan_of(model).streamed
    found, wanted = run(model, shape), expected(tiny("llama"), shape, kind)
    if follows_the_clock(shape):
        found, wanted = (found[0], []), (wanted[0], [])
    assert_equal(found, wanted)


@pytest.mark.parametrize(
    ("family", "shape", "share"),
    [
        *(("llama", shape, share) for shape in ("autoregressive", "cascade-tree") for share in (0.0, 0.2, 0.5, 0.8, 1.0)),
        *((family, "cascade-tree", share) for family in ("llama-rope-llama3", "qwen2", "qwen3", "mistral") for share in (0.0, 0.5)),
    ],
)
def test_budgets_from_the_smallest_to_everything(tiny: Tiny, kind: str, family: str, shape: str, share: float) -> None:
    least = smallest(tiny(family), 1, kind)
    everything = plan_of(streamed(tiny(family), cats.MemoryOptions(10**9, "weights"), kind)).charged
    model = streamed(tiny(family), cats.MemoryOptions(round(least + share * (everything - least)), "weights", ring_buffers=1), kind)
    plan = plan_of(model)
    assert plan.charged <= (plan.budget_bytes or 0)
    copies = sum(piece.nbytes for piece in plan.pinned if not piece.precisions & {"exact"}) if kind == "int8" else 0
    assert bool(plan.streamed) == (share < 1 and (kind != "int8" or copies > 0))  # matrices that are pinned give up their copies
    assert_equal(run(model, shape), expected(tiny(family), shape, kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny: Tiny, kind: str, family: str) -> None:
    model = streamed(tiny(family), cats.MemoryOptions(pinning=False, ring_buffers=2), kind)
    assert_equal(run(model, "cascade-tree"), expected(tiny(family), "cascade-tree", kind))


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        *((torch.float16, dtype) for dtype in ("auto", "bfloat16", "float32", "float64")),
        *((torch.bfloat16, dtype) for dtype in ("auto", "float32")),
        *((torch.float32, dtype) for dtype in ("bfloat16", "float64")),
    ],
)
def test_every_dtype(tiny: Tiny, tmp_path: Path, kind: str, stored: torch.dtype, dtype: str) -> None:
    """Half precision is upcast exactly; a narrower arithmetic rounds what it is given, streamed or not."""
    if kind == "nested" and stored == torch.float32:
        pytest.skip("nested weights are half precision")
    source = tiny("llama-grouped")
    plain, base = rewritten(source.base, "plain", tmp_path / "plain", stored), rewritten(source.base, kind, tmp_path / "kind", stored)
    memory = options_of(kind, cats.MemoryOptions(pinning=False, ring_buffers=2))
    model = cats.load(base, source.adapters, dtype=dtype, memory=memory)
    assert_equal(run(model, "cascade-chain"), run(cats.load(plain, source.adapters, dtype=dtype), "cascade-chain"))


def test_a_weight_off_the_cache_line_gives_the_same(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """Where a tensor lies in its file must not show in the result: kernels may sum in another order for another alignment."""
    source = tiny("llama")
    for padding in (0, 8, 24):
        base = rewritten(source.base, kind, tmp_path, STORED.get(kind, torch.float32), padding=" " * padding)
        model = cats.load(base, source.adapters, dtype="float32", memory=options_of(kind, cats.MemoryOptions(pinning=False)))
        assert_equal(run(model, "cascade-tree"), expected(source, "cascade-tree", kind))


def test_one_byte_less_is_refused(tiny: Tiny, kind: str) -> None:
    least = smallest(tiny("llama"), 1, kind)
    with pytest.raises(cats.CatsError, match=rf"need at least .* with layers \[0, {SHALLOW_EXIT}\) resident.*raise --memory-budget"):
        streamed(tiny("llama"), cats.MemoryOptions(least - 1, "weights", ring_buffers=1), kind)


def test_pinned_matrices_are_spread_over_the_pass(tiny: Tiny, kind: str) -> None:
    least = smallest(tiny("llama"), 1, kind)
    everything = plan_of(streamed(tiny("llama"), cats.MemoryOptions(10**9, "weights"), kind)).charged
    plan = plan_of(streamed(tiny("llama"), cats.MemoryOptions((least + everything) // 2, "weights", ring_buffers=1), kind))
    per_layer = [sum(piece.layer == index for piece in plan.streamed) for index in range(SHALLOW_EXIT, LAYERS)]
    assert max(per_layer) - min(per_layer) <= 2


def test_a_cycle_takes_every_streamed_matrix_once(tiny: Tiny, kind: str) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(pinning=False), kind)
    config = cats.GenerationConfig(max_new_tokens=24, eos_token_ids=(EOS,))
    plain = cats.generate(model, PROMPT, cats.build_method(SHAPES["autoregressive"]), config).traces[1:]
    rows = {trace.bytes_streamed for trace in plain}
    assert max(rows) - min(rows) <= 2 * 4096  # one row of the embedding table each, in one block or two
    cascade = cats.generate(model, PROMPT, cats.build_method(SHAPES["cascade-chain"]), config).traces[1:]
    nodes = max(trace.nodes for trace in cascade)
    assert max(trace.bytes_streamed for trace in cascade) <= max(rows) + 2 * 4096 * nodes


@pytest.mark.parametrize("ring_buffers", [2, 3])
def test_nested_weights_of_which_nothing_stays(tiny: Tiny, ring_buffers: int) -> None:
    """Where nothing drafts with the codes they are streamed too, each time to another place of the ring."""
    model = cats.load(of_kind(tiny("llama").base, "nested"), memory=cats.MemoryOptions(pinning=False, ring_buffers=ring_buffers))
    assert any(piece.part == "codes" for piece in plan_of(model).streamed)
    plain = cats.load(plain_of(tiny("llama").base, "nested"))
    for _ in range(2):
        assert_equal(run(model, "prompt-lookup"), run(plain, "prompt-lookup"))


def test_an_abandoned_answer_leaves_the_stream_usable(tiny: Tiny, kind: str) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(pinning=False), kind)
    steps = cats.stream(model, PROMPT, cats.build_method(SHAPES["cascade-chain"]), cats.GenerationConfig(max_new_tokens=16))
    next(steps)
    next(steps)
    steps.close()
    assert_equal(run(model, "cascade-chain"), expected(tiny("llama"), "cascade-chain", kind))


def test_a_failure_in_the_middle_of_a_pass_leaves_the_stream_usable(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(pinning=False), kind)
    with monkeypatch.context() as patched:
        patched.setattr(model.base.layers[4].mlp.up_proj, "open", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, "cascade-chain")
    assert_equal(run(model, "cascade-chain"), expected(tiny("llama"), "cascade-chain", kind))


@pytest.mark.parametrize("memory", [cats.MemoryOptions(pinning=False), cats.MemoryOptions(10**9, "weights")])
def test_a_file_changed_between_answers_is_noticed(tiny: Tiny, tmp_path: Path, kind: str, memory: cats.MemoryOptions) -> None:
    """Also where every layer is resident: rows of the embedding table are still read."""
    base = rewritten(tiny("llama").base, kind, tmp_path, STORED.get(kind, torch.float32))
    model = cats.load(base, memory=options_of(kind, memory), plan=None)
    run(model, "autoregressive")
    os.utime(base / "model.safetensors", ns=(1, 1))
    with pytest.raises(cats.CatsError, match="was changed or replaced while"):
        run(model, "autoregressive")


def test_what_is_made_at_first_use_was_charged(tiny: Tiny) -> None:
    """Rotary tables, and one work space for base and adapters."""
    model = streamed(tiny("llama"), cats.MemoryOptions(2 * 10**9, nodes=64))
    run(model, "cascade-tree")
    granted, projections = dict(plan_of(model).charges), [part for part in model.modules() if isinstance(part, Linear)]
    assert all(projection.work is model.base.work for projection in projections)
    assert model.base.work.nbytes <= granted["work space"]
    tables = [rope._cos_ND for rope in (model.base.rope, *(adapter.rope for adapter in model.adapters.values()))]
    assert 2 * sum(table.nbytes for table in tables if table is not None) <= granted["rotary tables"]


def test_what_the_plan_did_not_count_is_refused(tiny: Tiny) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(2 * 10**9, positions=32, nodes=4))
    with pytest.raises(cats.CatsError, match="give --budget-positions 40"):
        cats.generate(model, [5] * 8, cats.build_method(SHAPES["autoregressive"]), cats.GenerationConfig(max_new_tokens=32))
    with pytest.raises(cats.CatsError, match="grows trees of up to"):
        cats.generate(model, [5] * 8, cats.build_method(SHAPES["cascade-tree"]), cats.GenerationConfig(max_new_tokens=8))


def test_contradictions_are_refused(tiny: Tiny) -> None:
    with pytest.raises(cats.CatsError, match="nothing is streamed"):
        cats.MemoryOptions(flash_bandwidth=1e9)
    with pytest.raises(cats.CatsError, match="cannot emulate"):
        cats.load(tiny("llama").base, memory=cats.MemoryOptions(pinning=False, flash_bandwidth=1e15))
    with pytest.raises(cats.CatsError, match="hold them all; leave it out"):
        cats.load(tiny("llama").base, memory=cats.MemoryOptions(10**9, "weights", flash_bandwidth=1e6))


def test_a_pickle_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny("llama").base / "config.json").read_bytes())
    torch.save(load_file(tiny("llama").base / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(cats.CatsError, match="a pickle, which cannot be streamed"):
        cats.load(tmp_path, memory=cats.MemoryOptions(pinning=False))


@pytest.mark.parametrize("flags", [["--no-pinning"], ["--memory-budget", "1GB", "--budget-covers", "weights"]])
def test_positions_that_no_budget_counts_are_refused(flags: list[str]) -> None:
    parser = ArgumentParser()
    add_memory_flags(parser)
    with pytest.raises(cats.CatsError, match="--budget-positions sizes the caches"):
        memory_options(parser.parse_args([*flags, "--budget-positions", "64"]), 8, [])
