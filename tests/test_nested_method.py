"""The coarse form of a model drafts: what it costs and gains, and that the exact model alone decides; refusals."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import cats
from cats.acceptance import Verdict
from cats.cli.ask import main
from cats.methods.nested import Nested
from cats.methods.pacing import CYCLES_NEEDED, PRIOR, CycleCost, Pacing, margin_class
from cats.planning.plan import COARSE, EXACT
from cats.state import Cycle
from cats.trace import StepTrace
from tests.methods import SHAPES
from tests.scripted_model import follow, random_script, scripted_model
from tests.test_int8_copy import scramble
from tests.tiny_models import LAYERS, TinyModel, _llama, build, prompts

Tiny = Callable[[str], TinyModel]
OPEN = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())
COPY = cats.MemoryOptions(coarse="int8")
OURS = [shape for shape in SHAPES if shape.startswith("nested")]
CIRCLE = follow([1, 2, 3, 4, 5, 0])


def accepted(traces: Sequence[StepTrace]) -> float:
    """Tokens a cycle, the last one left out, which ends with the answer."""
    cycles = [trace.committed for trace in traces if not trace.prefill][:-1]
    return sum(cycles) / len(cycles)


@pytest.mark.parametrize("shape", OURS)
def test_a_scrambled_copy_costs_accepted_tokens_and_changes_none(tiny: Tiny, shape: str) -> None:
    exact, model = cats.load(tiny("llama").base), cats.load(tiny("llama").base, tiny("llama").adapters, memory=COPY)
    lengths = []
    for wrong in (False, True):
        if wrong:
            assert scramble(model) == LAYERS * 7
        traces = []
        for prompt in prompts(count=2, longest=10, seed=8):
            found = cats.generate(model, prompt, SHAPES[shape], OPEN)
            assert found.ids == cats.generate(exact, prompt, "autoregressive", OPEN).ids
            traces += found.traces
        lengths.append(accepted(traces))
    if not getattr(SHAPES[shape], "adaptive", False):  # which here, where drafts cost as much as exact passes, are short
        assert lengths[0] > 4
        assert lengths[1] < 2.5


@pytest.mark.parametrize("shape", OURS)
def test_every_node_is_run_by_the_exact_pass_from_the_first_layer_on(tiny: Tiny, shape: str) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters, memory=COPY)
    for trace in cats.generate(model, [5, 6, 7], SHAPES[shape], OPEN).traces[1:-1]:
        exactly = [cost for cost in trace.passes if cost.view == EXACT and cost.adapter is None]
        assert sum(cost.layers for cost in exactly) == LAYERS
        assert {cost.rows for cost in exactly} == {trace.nodes}
        assert any(cost.view == COARSE for cost in trace.passes)


def test_the_draft_of_a_long_text_is_as_good_as_that_of_a_short_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    long = build(tmp_path_factory.mktemp("long"), _llama(max_position_embeddings=700))
    model, config = cats.load(long.base, memory=COPY), replace(OPEN, max_new_tokens=600)
    found = cats.generate(model, [5, 6, 7], cats.NestedConfig(steps=10, adaptive=False), config)
    assert found.ids == cats.generate(cats.load(long.base), [5, 6, 7], "autoregressive", config).ids
    cycles = found.traces[1:]
    quarter = len(cycles) // 4
    assert accepted(cycles[-quarter:]) > 0.8 * accepted(cycles[:quarter])


def test_at_a_budget_the_coarse_form_is_resident_and_the_smallest_budget_is_said(tiny: Tiny) -> None:
    base, prompt = tiny("llama").base, [5, 6, 7]
    least = cats.MemoryOptions(10**9, "weights", pinning=False, ring_buffers=1, coarse="int8")
    model = cats.load(base, memory=least, method="nested")
    plan = model.base.source.plan
    assert plan.streamed
    assert all(piece in plan.pinned for piece in plan.sizes.pieces if COARSE.needs(piece))  # type: ignore[union-attr]
    fits = cats.load(base, memory=replace(least, budget_bytes=plan.charged), method="nested")
    found = cats.generate(fits, prompt, config=OPEN)
    assert found.ids == cats.generate(cats.load(base), prompt, "autoregressive", OPEN).ids
    assert accepted(found.traces) > 4
    assert all(cost.bytes_streamed == 0 for trace in found.traces for cost in trace.passes if cost.view == COARSE)
    with pytest.raises(cats.CatsError, match=r"the weights need at least .* raise --memory-budget"):
        cats.load(base, memory=replace(least, budget_bytes=plan.charged - 1), method="nested")


def test_weights_without_a_coarse_form_are_refused(
    tiny: Tiny, speaking: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = cats.load(tiny("llama").base)
    with pytest.raises(cats.CatsError, match=r"have no coarse form .*cats\.cli\.nest.*--coarse int8"):
        cats.generate(model, [5, 6, 7], "nested", OPEN)
    monkeypatch.setattr("cats.cats_model.load_base", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(cats.CatsError, match=r"this checkpoint has none; convert it by python -m cats\.cli\.nest, or give --coarse int8"):
        cats.load(tiny("llama").base, method="nested")
    with pytest.raises(SystemExit) as ended:
        main(["two words", "--model-path", str(speaking.base), "--method", "nested"])
    assert ended.value.code == 2
    assert "this checkpoint has none" in capsys.readouterr().err


def test_contradictions_are_refused() -> None:
    with pytest.raises(cats.CatsError, match="limits siblings"):
        cats.NestedConfig(total_tokens=30)
    with pytest.raises(cats.CatsError, match="root, steps and siblings alone are 24"):
        cats.NestedConfig(siblings=3, total_tokens=23)


class Watched(Nested):
    """Keeps what each cycle has grown."""

    grown: list[tuple[list[int], dict[int, list[int]], dict[int, float], list[int]]]

    def observe(self, cycle: Cycle, nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        growth = self._growth
        assert growth is not None
        high, low = logits_TV.topk(2).values.unbind(1)
        margins = dict(zip(nodes, (high - low).tolist(), strict=True))
        assert list(nodes) == growth.nodes
        for branch in growth.branches.values():
            for before, node in pairwise(branch):
                assert verdict.accepted[node]
                assert cycle.tree.parents[node] == before
        for node in growth.branches:
            assert int(logits_TV[nodes.index(node)].topk(2).indices[1]) == cycle.tree.tokens[growth.branches[node][0]]
        self.grown.append((growth.trunk, growth.branches, margins, [cycle.tree.depths[node] for node in range(len(cycle.tree))]))


@pytest.mark.parametrize("total_tokens", [-1, 17])
def test_the_second_best_at_the_smallest_margins_is_continued(total_tokens: int) -> None:
    """In a model that drafts with its exact weights, margins are those of the target."""
    script = random_script(8, seed=3)
    model = scripted_model(script, script, script)
    method = Watched(cats.NestedConfig(steps=8, adaptive=False, siblings=2, total_tokens=total_tokens), Pacing())
    method.model, method.grown = model, []
    found = cats.generate(model, [1, 2], method, OPEN)
    assert found.ids == cats.generate(model, [1, 2], "autoregressive", OPEN).ids
    for trunk, branches, margins, depths in method.grown[:-1]:
        assert len(trunk) == 9
        assert set(branches) == set(sorted(trunk[:-1], key=margins.__getitem__)[:2])
        for node, branch in branches.items():
            assert len(branch) == min(8 - depths[node], 8 if total_tokens == -1 else 4)


def test_siblings_and_what_follows_them_are_accepted(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, memory=COPY)
    config = replace(OPEN, max_new_tokens=80, temperature=0.5, seed=1)
    with_siblings = cats.generate(model, [5, 6, 7], cats.NestedConfig(steps=8, adaptive=False, siblings=3), config)
    without = cats.generate(model, [5, 6, 7], cats.NestedConfig(steps=8, adaptive=False), config)
    assert with_siblings.ids == without.ids
    assert accepted(with_siblings.traces) > accepted(without.traces)
    assert {"trunk", "sibling", "continuation"} <= {kind for trace in with_siblings.traces for kind in trace.accepted_kinds}


@pytest.mark.parametrize("siblings", [0, 2])
def test_looked_up_tokens_are_checked_in_one_pass(siblings: int) -> None:
    """Six tokens follow the last time, and then what was drafted itself."""
    model = scripted_model(CIRCLE, CIRCLE, CIRCLE)
    config = cats.NestedConfig(steps=10, draft="lookup", adaptive=False, siblings=siblings)
    found = cats.generate(model, [0], config, OPEN)
    assert found.ids == [(place + 1) % 6 for place in range(40)]
    last = found.traces[-2]
    assert last.accepted == 10
    assert [cost.rows for cost in last.passes if cost.view == COARSE][:2] == [7, 3 + siblings]
    assert last.accepted_kinds == (*["lookup"] * 6, "trunk", *["lookup"] * 2, "trunk")


def test_a_correction_ends_what_was_looked_up() -> None:
    script = random_script(6, seed=4, spread=3.0)
    model = scripted_model(script, script, script)
    found = cats.generate(model, [3, 1], cats.NestedConfig(steps=6, draft="lookup", adaptive=False), OPEN)
    assert found.ids == cats.generate(model, [3, 1], "autoregressive", OPEN).ids
    assert {"lookup", "correction"} <= {kind for trace in found.traces for kind in trace.accepted_kinds}
    assert all(trace.accepted == trace.nodes - 1 for trace in found.traces[1:-1]), "dropped tokens are not verified"


def test_what_a_margin_is_worth_is_learnt_and_forgotten() -> None:
    pacing = Pacing()
    assert [margin_class(margin) for margin in (0.0, 0.049, 0.05, 0.099, 0.1, 1e9)] == [0, 0, 1, 1, 2, len(PRIOR) - 1]
    assert pacing.agreement(0.0) == PRIOR[0]
    for taken in (False, True):
        for _ in range(1000):
            pacing.judge(0.06, taken)
        assert pacing.agreement(0.07) == pytest.approx(float(taken), abs=0.1)
    assert pacing.agreement(0.0) == PRIOR[0]


@pytest.mark.parametrize(("draft", "chance", "pays"), [(1.0, 0.5, True), (1.0, 0.2, False), (3.0, 0.9, False), (0.1, 0.05, True)])
def test_a_draft_pays_while_what_it_brings_is_more_than_it_costs(draft: float, chance: float, pays: bool) -> None:
    """Tokens have cost 3 seconds each."""
    pacing = Pacing()
    for _ in range(CYCLES_NEEDED):
        assert pacing.pays(1e-9)
        pacing.learn(CycleCost(drafts=5, draft=5 * draft, rows=6, exact=10.0, total=12.0, tokens=4))
    assert pacing.pays(chance) == pays


def test_rows_that_cost_something_are_counted() -> None:
    pacing = Pacing()
    for rows in (4, 8, 12):
        pacing.learn(CycleCost(drafts=rows - 1, draft=0.1 * (rows - 1), rows=rows, exact=5 + 0.25 * rows, total=12.0, tokens=4))
    assert pacing.row_seconds == pytest.approx(0.25)
    assert pacing.pays(0.12)
    assert not pacing.pays(0.11)


@pytest.mark.parametrize(("draft", "least", "most"), [(1e-9, 12, 12), (1e9, 1, 1)])
def test_chains_are_long_where_drafts_are_cheap(tiny: Tiny, draft: float, least: int, most: int) -> None:
    model, config = cats.load(tiny("llama").base, memory=COPY), cats.NestedConfig(steps=12)
    method = cats.build_method(config, model)
    assert isinstance(method, Nested)
    for _ in range(CYCLES_NEEDED * 10):
        method.resources.learn(CycleCost(drafts=1, draft=draft, rows=2, exact=1.0, total=1.0, tokens=1))
    found = cats.generate(model, [5, 6, 7], method, OPEN)
    assert found.ids == cats.generate(model, [5, 6, 7], "autoregressive", OPEN).ids
    assert {trace.nodes - 1 for trace in found.traces[1:2]} <= set(range(least, most + 1))
