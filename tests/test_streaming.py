"""Streamed weights give what resident ones give, bit for bit: tokens and logits, every method, every ring, every budget.

Logits are caught where the engine judges them. Budgets here count the weights only, so that they can be exact to the byte.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cats
from cats.acceptance import Greedy, Verdict
from cats.planning.plan import MemoryPlan
from cats.tree import TokenTree
from tests.methods import SHAPES
from tests.tiny_models import EOS, FAMILIES, LAYERS, SHALLOW_EXIT, TinyModel, prompts

PROMPT = prompts(count=1, longest=20, seed=4)[0]
Tiny = Callable[[str], TinyModel]


class Witness(Greedy):
    """Greedy acceptance that keeps the logits it was shown."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        self.seen.append(logits_TV.clone())
        return super().judge(tree, nodes, logits_TV)


def run(model: cats.MultiAdapterCATSModel, shape: str, prompt: Sequence[int] = PROMPT) -> tuple[list[int], list[torch.Tensor]]:
    """An answer, and every logit behind it."""
    witness = Witness()
    config = cats.GenerationConfig(max_new_tokens=16, eos_token_ids=(EOS,))
    return cats.generate(model, prompt, cats.build_method(SHAPES[shape]), config, acceptance=witness).ids, witness.seen


def assert_equal(first: tuple[list[int], list[torch.Tensor]], second: tuple[list[int], list[torch.Tensor]]) -> None:
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def plan_of(model: cats.MultiAdapterCATSModel) -> MemoryPlan:
    plan: MemoryPlan = model.base.source.plan  # type: ignore[attr-defined]
    return plan


@cache
def resident(tiny: TinyModel, dtype: str = "float32") -> cats.MultiAdapterCATSModel:
    return cats.load(tiny.base, tiny.adapters, dtype=dtype)


@cache
def streamed(tiny: TinyModel, memory: cats.MemoryOptions, dtype: str = "float32") -> cats.MultiAdapterCATSModel:
    return cats.load(tiny.base, tiny.adapters, dtype=dtype, memory=memory)


@cache
def smallest(tiny: TinyModel, ring_buffers: int = 1) -> int:
    """Bytes of the smallest budget of weights that this model and its adapters fit into."""
    generous = cats.MemoryOptions(10**9, "weights", pinning=False, ring_buffers=ring_buffers)
    return plan_of(streamed(tiny, generous)).charged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ring_buffers", [1, 2, 3])
def test_every_method_and_ring(tiny: Tiny, shape: str, ring_buffers: int) -> None:
    memory = cats.MemoryOptions(smallest(tiny("llama"), ring_buffers), "weights", ring_buffers=ring_buffers)
    model = streamed(tiny("llama"), memory)
    assert plan_of(model).streamed
    assert_equal(run(model, shape), run(resident(tiny("llama")), shape))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", ["autoregressive", "cascade-tree", "kangaroo"])
def test_budgets_from_the_smallest_to_everything(tiny: Tiny, shape: str, share: float) -> None:
    least = smallest(tiny("llama"))
    everything = plan_of(streamed(tiny("llama"), cats.MemoryOptions(10**9, "weights"))).charged
    model = streamed(tiny("llama"), cats.MemoryOptions(round(least + share * (everything - least)), "weights", ring_buffers=1))
    plan = plan_of(model)
    assert plan.charged <= (plan.budget_bytes or 0)
    assert bool(plan.streamed) == (share < 1)
    assert_equal(run(model, shape), run(resident(tiny("llama")), shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny: Tiny, family: str) -> None:
    model = streamed(tiny(family), cats.MemoryOptions(pinning=False, ring_buffers=2))
    assert_equal(run(model, "cascade-tree"), run(resident(tiny(family)), "cascade-tree"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_dtype(tiny: Tiny, tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    """Half precision is widened exactly; a narrower arithmetic rounds what it is given, streamed or not."""
    source = tiny("llama-grouped")
    tensors = load_file(source.base / "model.safetensors")
    save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source.base / "config.json").read_bytes())
    converted = replace(source, base=tmp_path)
    model = cats.load(tmp_path, converted.adapters, dtype=dtype, memory=cats.MemoryOptions(pinning=False, ring_buffers=2))
    assert_equal(run(model, "cascade-chain"), run(cats.load(tmp_path, converted.adapters, dtype=dtype), "cascade-chain"))


def test_a_weight_off_the_cache_line_gives_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """Where a tensor lies in its file must not show in the result: kernels may sum in another order for another alignment."""
    source = tiny("llama")
    tensors = load_file(source.base / "model.safetensors")
    for padding in (0, 8, 24, 40):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "padding": " " * padding})
        (tmp_path / "config.json").write_bytes((source.base / "config.json").read_bytes())
        model = cats.load(tmp_path, source.adapters, memory=cats.MemoryOptions(pinning=False))
        assert_equal(run(model, "cascade-tree"), run(resident(source), "cascade-tree"))


def test_one_byte_less_is_refused(tiny: Tiny) -> None:
    least = smallest(tiny("llama"))
    with pytest.raises(cats.CatsError, match=rf"needs at least .* with layers \[0, {SHALLOW_EXIT}\) resident.*raise --memory-budget"):
        cats.load(tiny("llama").base, tiny("llama").adapters, memory=cats.MemoryOptions(least - 1, "weights", ring_buffers=1))


def test_pinned_matrices_are_spread_over_the_pass(tiny: Tiny) -> None:
    least = smallest(tiny("llama"))
    everything = plan_of(streamed(tiny("llama"), cats.MemoryOptions(10**9, "weights"))).charged
    plan = plan_of(streamed(tiny("llama"), cats.MemoryOptions((least + everything) // 2, "weights", ring_buffers=1)))
    per_layer = [sum(layer == index for layer, _ in plan.streamed) for index in range(SHALLOW_EXIT, LAYERS)]
    assert max(per_layer) - min(per_layer) <= 2


def test_a_cycle_takes_every_streamed_matrix_once(tiny: Tiny) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(pinning=False))
    config = cats.GenerationConfig(max_new_tokens=24, eos_token_ids=(EOS,))
    plain = cats.generate(model, PROMPT, cats.build_method(SHAPES["autoregressive"]), config).traces[1:]
    rows = {trace.bytes_streamed for trace in plain}
    assert max(rows) - min(rows) <= 2 * 4096  # one row of the embedding table each, in one block or two
    cascade = cats.generate(model, PROMPT, cats.build_method(SHAPES["cascade-chain"]), config).traces[1:]
    nodes = max(trace.nodes for trace in cascade)
    assert max(trace.bytes_streamed for trace in cascade) <= max(rows) + 2 * 4096 * nodes


def test_an_abandoned_answer_leaves_the_stream_usable(tiny: Tiny) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(pinning=False))
    steps = cats.stream(model, PROMPT, cats.build_method(SHAPES["cascade-chain"]), cats.GenerationConfig(max_new_tokens=16))
    next(steps)
    next(steps)
    steps.close()
    assert_equal(run(model, "cascade-chain"), run(resident(tiny("llama")), "cascade-chain"))


def test_a_failure_in_the_middle_of_a_pass_leaves_the_stream_usable(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(tiny("llama"), cats.MemoryOptions(pinning=False))
    layer = model.base.layers[4]
    with monkeypatch.context() as patched:
        patched.setattr(layer.mlp, "forward", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, "cascade-chain")
    assert_equal(run(model, "cascade-chain"), run(resident(tiny("llama")), "cascade-chain"))


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
    with pytest.raises(cats.CatsError, match="a pickle, which cannot be streamed"):
        directory = tiny("llama").base.parent / "pickled"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_bytes((tiny("llama").base / "config.json").read_bytes())
        torch.save(load_file(tiny("llama").base / "model.safetensors"), directory / "pytorch_model.bin")
        cats.load(directory, memory=cats.MemoryOptions(pinning=False))
