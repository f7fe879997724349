"""CATS with EAGLE's branches: which nodes are run, checked and chosen; what the settings leave out; trees of many sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import cats
from cats.calibration import Calibration
from cats.methods.cascade import HIDDEN, Cascade
from cats.methods.hidden_nodes import FIRST, LEAST, MOST, HiddenNodes, hidden
from cats.state import Cycle
from cats.tree import TokenTree
from tests.scripted_model import Script, follow, scripted_model
from tests.tiny_models import TinyModel, prompts

Tiny = Callable[[str], TinyModel]
CIRCLE = 8
RIGHT = follow([(token + 1) % CIRCLE for token in range(CIRCLE)])
WRONG = follow([(token + 2) % CIRCLE for token in range(CIRCLE)])
SECOND = Script(WRONG.current_VV + 0.9 * RIGHT.current_VV, RIGHT.previous_VV)
"""Right in its second choice."""
ASTRAY = Script(WRONG.current_VV + 0.9 * follow([(token + 3) % CIRCLE for token in range(CIRCLE)]).current_VV, WRONG.previous_VV)
"""Wrong in its first two."""


@dataclass(frozen=True)
class Proposal:
    tree: TokenTree
    nodes: Sequence[int]
    limit: int
    trunk: list[int]


class Recording(Cascade):
    """Keeps what it proposed."""

    def __init__(self, config: cats.CascadeConfig):
        super().__init__(config)
        self.proposals: list[Proposal] = []

    def propose(self, cycle: Cycle) -> Sequence[int]:
        nodes = super().propose(cycle)
        trunk = [0, *(node for node, kind in enumerate(cycle.tree.kinds) if kind == "trunk")]
        self.proposals.append(Proposal(cycle.tree, nodes, cycle.depth_limit, trunk))
        return nodes


def proposals(model: cats.MultiAdapterCATSModel, config: cats.CascadeConfig, length: int = 24) -> list[Proposal]:
    method = Recording(config)
    settings = cats.GenerationConfig(max_new_tokens=length, eos_token_ids=())
    cats.generate(model, prompts(1, 10, seed=1)[0], method, settings)
    return method.proposals


def scripted(draft: Script, shallow: Script, length: int = 40, **settings: Any) -> cats.Generation:
    config = cats.GenerationConfig(max_new_tokens=length, eos_token_ids=())
    method = cats.build_method(cats.CascadeConfig(**settings))
    found = cats.generate(scripted_model(RIGHT, draft, shallow), [0], method, config)
    assert found.ids == [(place + 1) % CIRCLE for place in range(length)]
    return found


def kinds(found: cats.Generation) -> set[tuple[str, ...]]:
    """Of the accepted paths of steps that the answer's end did not shorten."""
    return {trace.accepted_kinds for trace in found.traces[1:3]}


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("total", [2, 9, 16, 40])
def test_trunk_and_corrections_enter_and_the_rest_keeps_to_budget_and_depth(tiny: Tiny, total: int, rounds: int) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    config = cats.CascadeConfig(steps=3, tree_topk=4, total_tokens=total, sv_passes=rounds)
    for proposal in proposals(model, config):
        tree, chosen = proposal.tree, set(proposal.nodes)
        corrections = {node for node, kind in enumerate(tree.kinds) if kind == "correction"}
        forced = {*proposal.trunk, *corrections}
        assert forced <= chosen
        assert len(chosen) == max(len(forced), min(total, len(chosen)))
        assert len(proposal.trunk) == min(config.steps, proposal.limit) + 1
        assert {tree.parents[node] for node in corrections} <= set(proposal.trunk)
        assert all(tree.depths[node] <= proposal.limit for node in range(len(tree)))
        assert all(tree.scores[node] <= tree.scores[tree.parents[node]] for node in range(1, len(tree)))
        left_out = [tree.scores[node] for node in range(len(tree)) if node not in chosen]
        taken = [tree.scores[node] for node in chosen - forced]
        assert not taken or not left_out or min(taken) >= max(left_out)


@pytest.mark.parametrize("total", [16, 64, 200, 512])
def test_trees_of_many_sizes(tiny: Tiny, total: int) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    config = cats.CascadeConfig(steps=3, tree_topk=16, total_tokens=total, sv_passes=2)
    assert [len(proposal.nodes) for proposal in proposals(model, config, 20)][:2] == [total] * 2


def test_branches_are_drafted_on_and_not_siblings_of_the_trunk_alone() -> None:
    """The second choice of draft and verifier is right everywhere, their first never."""
    assert kinds(scripted(SECOND, SECOND, steps=3, tree_topk=8, total_tokens=64)) == {("sibling", *("continuation",) * 3)}


def test_the_verifier_extends_branches_that_it_corrects() -> None:
    """The draft errs everywhere: what a correction continues with is the verifier's own, in as many rounds as there are."""
    for rounds in (1, 2, 3):
        found = scripted(ASTRAY, RIGHT, steps=1, tree_topk=2, total_tokens=24, sv_passes=rounds)
        assert kinds(found) == {("correction", *("continuation",) * (rounds - 1))}


@pytest.mark.parametrize(
    ("verifier", "expected"),
    [
        ("all", ("correction", "continuation", "continuation")),
        ("siblings", ("sibling", "continuation", "continuation")),
        ("corrections", ("correction",)),
        ("none", ()),
    ],
)
def test_what_the_verifier_is_for_can_be_limited(verifier: Any, expected: tuple[str, ...]) -> None:
    found = scripted(ASTRAY, RIGHT, steps=1, tree_topk=2, total_tokens=24, sv_passes=3, verifier=verifier)
    assert kinds(found) == {expected}
    judged = {trace.shallow_accepted for trace in found.traces[1:3]}
    assert judged == ({None} if verifier == "none" else {0})


def test_a_chain_without_verifier_has_no_corrections() -> None:
    assert kinds(scripted(RIGHT, RIGHT, steps=3, verifier="none")) == {("trunk",) * 3}
    assert kinds(scripted(WRONG, RIGHT, steps=3, verifier="none")) == {()}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"verifier": "siblings"}, "verifier siblings has no siblings"),
        ({"verifier": "none", "sv_passes": 2}, "sv-passes 2 has no correction to go on from"),
        ({"total_tokens": HIDDEN}, "total-tokens is 0"),
    ],
)
def test_settings_that_do_nothing_in_a_chain_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(cats.CatsError, match=sentence):
        cats.CascadeConfig(**settings)


def test_calibrated_scores_choose_the_nodes() -> None:
    """The draft is right where it is less sure, the verifier does not know: a calibration that turns the draft round finds it."""
    model = scripted_model(RIGHT, SECOND, Script(0 * WRONG.current_VV, 0 * WRONG.previous_VV))
    settings = cats.GenerationConfig(max_new_tokens=30, eos_token_ids=())
    method = cats.CascadeConfig(steps=2, tree_topk=2, total_tokens=7)
    lengths = []
    for weight in (1.0, -1.0):
        model.adapters["shallow"].calibration = Calibration(drafted=(0.0, weight), checked=(0.0, weight, 0.0))
        found = cats.generate(model, [0], cats.build_method(method), settings)
        lengths.append(len(found.traces))
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize(("seconds", "streamed", "expected"), [(0.1, 0.2, 80), (0.1, 0.0, LEAST), (0.1, 9.0, MOST), (0.0, 1.0, MOST)])
def test_as_many_nodes_as_the_stream_hides(seconds: float, streamed: float, expected: int) -> None:
    assert hidden(40, seconds, streamed) == expected


def test_hidden_nodes_are_learnt_from_the_target_pass_alone() -> None:
    readings = iter([{"compute": 0.5, "stream_wait": 0.25}, {"compute": 1.0, "stream_wait": 0.5}])
    source = SimpleNamespace(stream_seconds=0.75)
    cycle: Any = SimpleNamespace(reading=lambda: (next(readings), 0), state=SimpleNamespace(base=SimpleNamespace(source=source)))
    learnt = HiddenNodes()
    assert learnt.nodes == FIRST
    learnt.proposed(cycle)
    learnt.verified(cycle, 50)
    assert learnt.nodes == 150  # 50 nodes in 0.25 s of computing, 0.75 s of stream


def test_where_nothing_is_streamed_the_tree_gets_small(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    config = cats.CascadeConfig(steps=3, tree_topk=8, total_tokens=HIDDEN)
    assert [len(proposal.nodes) for proposal in proposals(model, config)][:3] == [FIRST, LEAST, LEAST]


def test_where_something_is_streamed_its_seconds_are_known(tiny: Tiny) -> None:
    memory = cats.MemoryOptions(pinning=False)
    model = cats.load(tiny("llama").base, tiny("llama").adapters, memory=memory, plan=None)
    source = model.base.source
    assert source.stream_seconds == 0
    config = cats.CascadeConfig(steps=3, tree_topk=8, total_tokens=HIDDEN)
    sizes = [len(proposal.nodes) for proposal in proposals(model, config)]
    assert source.stream_seconds > 0
    assert all(LEAST <= size <= MOST for size in sizes[:2])
