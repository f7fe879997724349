"""The contract of `Method` carries what comes next: CAS-Spec's layer subsets, as a stub.

The stub is small but whole: it drafts, gets back what it needs, and accepts tokens; its answers must be plain ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import cats
from cats.acceptance import Verdict
from cats.methods.base import Method
from cats.planning.plan import COARSE, View
from cats.runtime.direct_file import window_bytes
from cats.state import Cycle
from tests.scripted_model import LAYERS, random_script, scripted_model
from tests.tiny_models import LAYERS as TINY_LAYERS
from tests.tiny_models import TinyModel, prompts
from tests.weight_kinds import of_kind, options_of, plain_of

Tiny = Callable[[str], TinyModel]
CONFIG = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())


def plain(model: cats.MultiAdapterCATSModel, prompt: list[int]) -> list[int]:
    return cats.generate(model, prompt, cats.build_method(cats.AutoregressiveConfig()), CONFIG).ids


@dataclass
class ViewStub(Method):
    """Drafts a chain with another view of the model; the entries it leaves behind are approximate."""

    view: View
    steps: int = 4
    verdicts: list[bool] = field(default_factory=list)

    @property
    def max_nodes(self) -> int:
        return self.steps + 1

    def propose(self, cycle: Cycle) -> Sequence[int]:
        nodes = [0]
        while len(nodes) <= min(self.steps, cycle.depth_limit):
            token = int(cycle.target_logits(nodes[-1:], self.view)[0].argmax())
            nodes.append(cycle.tree.add(nodes[-1], token, "trunk"))
        return nodes

    def observe(self, cycle: Cycle, nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        self.verdicts += [verdict.accepted[node] for node in nodes[1:]]


SUBSETS = {
    "nothing": View(),
    "attention": View(attention=frozenset({2, 4})),
    "mlp": View(mlp=frozenset({1, 3})),
    "whole layers": View(attention=frozenset({3, 4}), mlp=frozenset({3, 4})),
    "apart": View(attention=frozenset({2, 3}), mlp=frozenset({1, 4})),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_cas_spec_stub_is_lossless(tiny: Tiny, name: str) -> None:
    model = cats.load(tiny("llama").base, dtype="float64")
    stub = ViewStub(SUBSETS[name])
    for prompt in prompts(count=2, longest=10, seed=8):
        assert cats.generate(model, prompt, stub, CONFIG).ids == plain(model, prompt)
    assert any(stub.verdicts)
    assert all(stub.verdicts) == (name == "nothing")


def test_a_draft_without_some_parts_is_the_model_with_those_parts_zero(tiny: Tiny) -> None:
    """Layer-subset logits against the whole model with the skipped parts' output projections set to zero."""
    model, without = (cats.load(tiny("llama").base, dtype="float64") for _ in range(2))
    skipped, prompt = SUBSETS["apart"], prompts(count=1, longest=10, seed=9)[0]
    for layer in skipped.attention:
        without.base.layers[layer].self_attn.o_proj.weight.data.zero_()
    for layer in skipped.mlp:
        without.base.layers[layer].mlp.down_proj.weight.data.zero_()
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        seen = model.base.forward_draft_or_large_model(input_ids=ids, view=skipped)
        torch.testing.assert_close(seen, without.base.hidden_states(ids, [TINY_LAYERS])[TINY_LAYERS])


def test_the_skipping_draft_of_a_scripted_model_loses_only_what_it_skips() -> None:
    """Without its last attention the scripted target forgets the token before the last one, and nothing else."""
    target = random_script(6, seed=0)
    model = scripted_model(target, target, target)
    skipped = View(attention=frozenset({LAYERS - 1}))
    with torch.inference_mode():
        hidden = model.base.forward_draft_or_large_model(input_ids=torch.tensor([[1, 4, 2]]), view=skipped)
        logits = model.base.target_logits(hidden)[0, -1].numpy()
    assert np.corrcoef(logits, target.current_VV[2])[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["sum", "copy", "nested", "int8"])
@pytest.mark.parametrize("ring_buffers", [1, 3])
def test_resident_coarse_weights_draft_and_streamed_ones_verify(tiny: Tiny, kind: str, ring_buffers: int) -> None:
    """Nothing is streamed for drafting, and the exact model alone decides."""
    exact, stub = cats.load(plain_of(tiny("llama").base, kind)), ViewStub(COARSE)
    memory = options_of(kind, cats.MemoryOptions(pinning=False, ring_buffers=ring_buffers))
    model = cats.load(of_kind(tiny("llama").base, kind), memory=memory)
    streamer = model.base.source.streamer
    assert streamer is not None
    one_stream = sum(window_bytes(streamed.place) for streamed in streamer.order)
    for prompt in prompts(count=2, longest=10, seed=8):
        before = streamer.bytes_taken
        found = cats.generate(model, prompt, stub, CONFIG)
        assert found.ids == plain(exact, prompt)
        assert streamer.bytes_taken - before == len(found.traces) * one_stream
    assert sum(stub.verdicts) > 0.7 * len(stub.verdicts)


REFUSED = {
    "no such form": (COARSE, "have no coarse form to draft with; known are exact"),
    "a streamed part": (View(mlp=frozenset({1})), "which is streamed; only weights that are in memory draft"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_view_that_would_draft_with_what_is_not_resident_is_refused(tiny: Tiny, case: str) -> None:
    view, sentence = REFUSED[case]
    model = cats.load(tiny("llama").base, memory=cats.MemoryOptions(pinning=False))
    with pytest.raises(cats.CatsError, match=sentence):
        cats.generate(model, [5, 6, 7], ViewStub(view), CONFIG)


@dataclass
class Unverified(ViewStub):
    """Tries to have committed what only its draft has computed, or to continue a draft exactly."""

    deed: str = "commit"

    def propose(self, cycle: Cycle) -> Sequence[int]:
        nodes = list(super().propose(cycle))
        if self.deed == "commit":
            cycle.state.commit(cycle, nodes, 0)
        cycle.target_logits(nodes[1:])
        return nodes


@pytest.mark.parametrize(("deed", "sentence"), [("commit", "cannot be committed"), ("go on", "under different views")])
def test_what_a_draft_wrote_counts_for_nothing(tiny: Tiny, deed: str, sentence: str) -> None:
    with pytest.raises(RuntimeError, match=sentence):
        cats.generate(cats.load(tiny("llama").base), [5, 6, 7], Unverified(SUBSETS["mlp"], deed=deed), CONFIG)


@dataclass
class Undermined(ViewStub):
    """Runs two nodes exactly, the first of them by a draft again, and then a third one exactly."""

    def propose(self, cycle: Cycle) -> Sequence[int]:
        nodes = [0, cycle.tree.add(0, 5, "trunk")]
        cycle.target_logits(nodes)
        cycle.target_logits(nodes[:1], SUBSETS["mlp"])
        third = cycle.tree.add(nodes[1], 6, "trunk")
        cycle.target_logits([third])
        return [*nodes, third]


def test_nothing_is_run_exactly_behind_what_a_draft_ran_last_however_far_above(tiny: Tiny) -> None:
    """The third node's parent is exact, and its grandparent's keys and values are not."""
    with pytest.raises(RuntimeError, match="behind nodes that a draft ran last"):
        cats.generate(cats.load(tiny("llama").base), [5, 6, 7], Undermined(SUBSETS["mlp"]), CONFIG)
