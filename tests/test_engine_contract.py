"""What a caller's `stop` and a method may do in the engine, and what is said where one of them does what it may not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

import cats
from cats.acceptance import Verdict
from cats.errors import ContractError
from cats.methods.base import Method
from cats.state import AdapterState, Cycle
from cats.trace import StageSeconds, Stopwatch
from cats.tree import TokenTree
from tests.scripted_model import follow, scripted_model

CIRCLE = follow([(token + 1) % 8 for token in range(8)])
PLAIN = cats.build_method(cats.AutoregressiveConfig())
LONG = cats.build_method(cats.PromptLookupConfig(max_ngram=2, continuation=5))
PROMPT = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]


def circle(context: int = 128) -> cats.MultiAdapterCATSModel:
    return scripted_model(CIRCLE, CIRCLE, CIRCLE, context=context)


def answer(method: Method, tokens: int = 20, stop: Callable[[list[int], int], int | None] | None = None) -> cats.Generation:
    return cats.generate(circle(), PROMPT, method, cats.GenerationConfig(max_new_tokens=tokens, eos_token_ids=()), stop=stop)


ROWS = 20
WHOLE = [(token + 3) % 8 for token in range(20)]


@pytest.mark.parametrize("method", [PLAIN, LONG], ids=["plain", "chain"])
@pytest.mark.parametrize("back", range(9))
def test_stop_may_cut_a_step_all_of_it_and_what_came_before(method: Method, back: int) -> None:
    def stop(text: list[int], new: int) -> int | None:
        return len(text) - back if len(text) > 10 else None

    found = answer(method, stop=stop)
    assert found.finish == "stop"
    assert len(found.ids) >= 11 - back
    assert found.ids == WHOLE[: len(found.ids)]


@pytest.mark.parametrize("tokens", [1, 7])
def test_stop_may_leave_nothing_of_an_answer(tokens: int) -> None:
    found = answer(LONG, stop=lambda text, new: 0 if len(text) >= tokens else None)
    assert (found.ids, found.finish) == ([], "stop")


def test_a_step_says_how_much_it_takes_back() -> None:
    config = cats.GenerationConfig(max_new_tokens=20, eos_token_ids=())
    steps = list(cats.stream(circle(), PROMPT, PLAIN, config, stop=lambda text, new: 2 if len(text) == 5 else None))
    assert [step.taken_back for step in steps] == [0, 0, 0, 0, 2]
    assert (steps[-1].tokens, steps[-1].finish, steps[-1].trace.committed) == ([], "stop", 0)


@pytest.mark.parametrize("says", [-1, 6, True])
def test_what_is_no_length_of_the_answer_is_told_in_a_sentence(says: int) -> None:
    with pytest.raises(cats.CatsError, match=rf"`stop` returned {says} for an answer of 5 tokens; let it return how many"):
        answer(PLAIN, stop=lambda text, new: says if len(text) == 5 else None)


@dataclass
class Scripted(Method):
    """Grows what it is told to and proposes what it is told to."""

    grow: Callable[[TokenTree, int], object] = lambda tree, limit: None
    nodes: Sequence[int] | None = None

    @property
    def max_nodes(self) -> int:
        return 8

    def propose(self, cycle: Cycle) -> Sequence[int]:
        self.grow(cycle.tree, cycle.depth_limit)
        return range(len(cycle.tree)) if self.nodes is None else self.nodes


def deeper(tree: TokenTree, limit: int) -> None:
    node = 0
    for _ in range(6):
        node = tree.add(node, (tree.tokens[node] + 1) % 8, "trunk")


def deeper_probes(tree: TokenTree, limit: int) -> None:
    node = 0
    for _ in range(6):
        node = tree.add_probe(node, 1)


@pytest.mark.parametrize("grow", [deeper, deeper_probes])
@pytest.mark.parametrize(("context", "tokens"), [(128, 6), (17, 20)], ids=["length", "context"])
def test_a_method_that_goes_too_deep_is_told_so_by_name(grow: Callable[[TokenTree, int], object], context: int, tokens: int) -> None:
    config = cats.GenerationConfig(max_new_tokens=tokens, eos_token_ids=())
    with pytest.raises(ContractError, match=r"the method Scripted broke its contract: a \w+ node at depth 5 .* depth_limit 4"):
        cats.generate(circle(context), PROMPT, Scripted(grow), config)


def chain_of_three(tree: TokenTree, limit: int) -> None:
    tree.add(tree.add(tree.add(0, 3, "trunk"), 4, "trunk"), 5, "trunk")


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        ([], "do not begin with the root"),
        ([1, 2], "do not begin with the root"),
        ([0, 2, 1], "not in ascending order: 1 follows 2"),
        ([0, 1, 1], "not in ascending order: 1 follows 1"),
        ([0, 1, 3], "node 3 comes without its parent 2"),
        ([0, 1, 2, 3, 4], "node 4 is not in the tree, which has 4 nodes"),
    ],
)
@pytest.mark.parametrize("tau", [0.0, 0.09])
def test_nodes_that_cannot_be_verified_are_refused(nodes: list[int], complaint: str, tau: float) -> None:
    relaxed = {"temperature": 1.0, "typical_tau": tau, "typical_alpha": 0.3} if tau else {}
    config = cats.GenerationConfig(max_new_tokens=20, eos_token_ids=(), **relaxed)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=complaint):
        cats.generate(circle(), PROMPT, Scripted(chain_of_three, nodes), config)


def test_a_node_that_was_never_named_is_refused() -> None:
    with pytest.raises(ContractError, match="the token of the proposed node 1 was never named"):
        answer(Scripted(lambda tree, limit: tree.add_unknown(0, "trunk")))


class Lookup(Method):
    """Plain decoding that charges a stage of its own."""

    max_nodes = 1

    def propose(self, cycle: Cycle) -> Sequence[int]:
        with cycle.stage("lookup"):
            return [0]


def test_a_method_may_charge_a_stage_of_its_own_name() -> None:
    found = answer(Lookup(cats.AutoregressiveConfig()))
    assert found.ids == WHOLE
    assert all(trace.seconds["lookup"] > 0 for trace in found.traces[1:])
    assert found.traces[1].seconds.stages == ["lookup", "target", "accept"]
    assert found.traces[1].spans[0][0] == "lookup"


def test_what_was_never_charged_is_nothing_and_totals_are_no_stages() -> None:
    assert StageSeconds(target=1.0)["draft"] == 0.0
    with pytest.raises(ContractError, match="'total' is measured across stages"), Stopwatch().stage("total"):
        pass


@dataclass
class Router(Method):
    """Drafts with its adapter every so often, and decodes plainly in between; notes how much its adapter has left to read."""

    every: int
    adapters = ("draft",)
    waiting: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)

    @property
    def max_nodes(self) -> int:
        return 2

    def propose(self, cycle: Cycle) -> Sequence[int]:
        self.waiting.append(len(cycle.state.adapters["draft"].pending_ND))
        if len(self.waiting) % self.every or cycle.depth_limit < 1:
            return [0]
        cycle.advance([0], cycle.state.exits["draft"])
        self.drafted.append(int(cycle.adapter_logits("draft", [0])[0].argmax()))
        return [0, cycle.tree.add(0, self.drafted[-1], "trunk")]

    def observe(self, cycle: Cycle, nodes: Sequence[int], logits_TV: object, verdict: Verdict) -> None:
        if len(nodes) > 1:
            assert verdict.accepted[1], "the adapter must have read every token, in order"


def test_an_adapter_that_is_left_out_for_long_does_not_pile_up_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cats.state, "PREFILL_ROWS", ROWS)
    passes: list[int] = []
    read = AdapterState.read

    def noting(adapter: AdapterState, hidden_ND: torch.Tensor) -> None:
        passes.append(len(hidden_ND))
        read(adapter, hidden_ND)

    monkeypatch.setattr(AdapterState, "read", noting)
    router = Router(every=ROWS + 10)
    config = cats.GenerationConfig(max_new_tokens=2 * ROWS + 30, eos_token_ids=())
    found = cats.generate(circle(), PROMPT, router, config)
    assert found.ids == [(token + 3) % 8 for token in range(config.max_new_tokens)]
    assert len(router.drafted) == 2
    assert max(router.waiting) == ROWS
    assert passes == [len(PROMPT), ROWS, ROWS]
