"""What is particular to CATS: the shallow verifier takes part, in a chain too, and never in what is written."""

from collections.abc import Callable

import pytest
import torch

import cats
from tests.tiny_models import TinyModel, prompts

Tiny = Callable[[str], TinyModel]
SHAPES = {"chain": cats.CascadeConfig(steps=4), "tree": cats.CascadeConfig(steps=4, tree_topk=3, total_tokens=16)}


def answers(model: cats.MultiAdapterCATSModel, config: cats.CascadeConfig) -> list[cats.Generation]:
    settings = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())
    return [cats.generate(model, prompt, cats.build_method(config), settings) for prompt in prompts(4, 10, seed=1)]


def accepted_length(generations: list[cats.Generation]) -> float:
    traces = [trace for generation in generations for trace in generation.traces[1:]]
    return sum(trace.committed for trace in traces) / len(traces)


@pytest.mark.parametrize("shape", SHAPES)
def test_scrambling_the_shallow_adapter_costs_acceptance_and_changes_no_text(tiny: Tiny, shape: str) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters, dtype="float64")
    before = answers(model, SHAPES[shape])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.adapters["shallow"].parameters():
        parameter.data = parameter.data.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(parameter)
    model.adapters["shallow"].norm.weight.data.neg_()
    after = answers(model, SHAPES[shape])
    assert [answer.ids for answer in after] == [answer.ids for answer in before]
    assert accepted_length(after) < accepted_length(before)


def test_corrections_are_accepted_in_a_chain(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    kinds = {kind for answer in answers(model, SHAPES["chain"]) for trace in answer.traces for kind in trace.accepted_kinds}
    assert kinds == {"trunk", "correction"}


@pytest.mark.parametrize("total", [10, 16, 30])
def test_the_tree_keeps_to_its_budget_unless_trunk_and_corrections_need_more(tiny: Tiny, total: int) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    config = cats.CascadeConfig(steps=4, tree_topk=4, total_tokens=total, sv_passes=2)
    for answer in answers(model, config):
        assert all(trace.nodes <= max(total, 2 * config.steps + 2) for trace in answer.traces)
        assert max(trace.nodes for trace in answer.traces) >= min(total, 16)


def test_more_rounds_accept_more_for_more_layer_passes(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    one, three = (answers(model, cats.CascadeConfig(steps=2, sv_passes=rounds)) for rounds in (1, 3))
    assert accepted_length(three) > accepted_length(one)
    passes = [[trace.layer_passes for answer in run for trace in answer.traces[1:]] for run in (one, three)]
    assert max(passes[1]) > max(passes[0])
