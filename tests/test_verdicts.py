"""Scripted predictors through the whole engine: accepted never, always, sometimes; corrections; EOS; a budget of one; exact ties.

Every text is a walk on a circle of eight tokens: the target always continues t with t + 1.
"""

import numpy as np
import pytest
import torch

import cats
from cats.trace import Confusion, StepTrace
from tests.methods import shapes_for
from tests.scripted_model import DRAFT_EXIT, LAYERS, SHALLOW_EXIT, Script, follow, scripted_model

CIRCLE = 8
RIGHT = follow([(token + 1) % CIRCLE for token in range(CIRCLE)])
WRONG = follow([(token + 2) % CIRCLE for token in range(CIRCLE)])
LENGTH = 60
SHAPES = shapes_for(width=6 * CIRCLE)


def answer(draft: Script, shallow: Script, method: cats.MethodConfig, **fields: object) -> cats.Generation:
    config = cats.GenerationConfig(**({"max_new_tokens": LENGTH, "eos_token_ids": ()} | fields))  # type: ignore[arg-type]
    return cats.generate(scripted_model(RIGHT, draft, shallow), [0], method, config)


def whole_steps(generation: cats.Generation) -> list[StepTrace]:
    """Steps that the answer's end did not shorten."""
    return [
        trace
        for trace in generation.traces[1:]
        if sum(later.committed for later in generation.traces[generation.traces.index(trace) :]) > 20
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("draft", "shallow"), [(RIGHT, RIGHT), (WRONG, WRONG), (RIGHT, WRONG), (WRONG, RIGHT)])
def test_the_text_is_the_targets_whatever_the_drafts_say(shape: str, draft: Script, shallow: Script) -> None:
    assert answer(draft, shallow, SHAPES[shape]).ids == [(place + 1) % CIRCLE for place in range(LENGTH)]


@pytest.mark.parametrize(
    ("method", "draft", "shallow", "kinds"),
    [
        (cats.AutoregressiveConfig(), RIGHT, RIGHT, ()),
        (cats.KangarooConfig(steps=6, threshold=0.3), RIGHT, RIGHT, ("trunk",) * 6),
        (cats.KangarooConfig(steps=6, threshold=0.3), WRONG, RIGHT, ()),
        (cats.EagleSelfConfig(steps=4), RIGHT, RIGHT, ("trunk",) * 4),
        (cats.EagleSelfConfig(steps=4), WRONG, RIGHT, ()),
        (cats.CascadeConfig(steps=5), RIGHT, RIGHT, ("trunk",) * 5 + ("correction",)),
        (cats.CascadeConfig(steps=5), RIGHT, WRONG, ("trunk",) * 5),
        (cats.CascadeConfig(steps=5), WRONG, RIGHT, ("correction",)),
        (cats.CascadeConfig(steps=5), WRONG, WRONG, ()),
        (cats.CascadeConfig(steps=5, sv_passes=3), WRONG, RIGHT, ("correction",) * 3),
        (cats.CascadeConfig(steps=2, sv_passes=3), RIGHT, RIGHT, (("trunk",) * 2 + ("correction",)) * 3),
    ],
)
def test_each_step_accepts_what_the_scripts_foresee(
    method: cats.MethodConfig, draft: Script, shallow: Script, kinds: tuple[str, ...]
) -> None:
    steps = whole_steps(answer(draft, shallow, method))
    assert steps
    for trace in steps:
        assert trace.accepted_kinds == kinds
        assert trace.committed == trace.accepted + 1 == len(kinds) + 1


def test_a_chain_breaks_exactly_where_the_draft_errs() -> None:
    successors = [(token + 1) % CIRCLE for token in range(CIRCLE)]
    successors[3] = 0
    root = 1
    for trace in answer(follow(successors), RIGHT, cats.EagleSelfConfig(steps=4)).traces[1:-2]:
        right = next((steps for steps in range(4) if (root + steps) % CIRCLE == 3), 4)
        assert trace.accepted == right
        root = (root + right + 1) % CIRCLE


def test_siblings_are_accepted_where_the_second_choice_is_right() -> None:
    second = Script(WRONG.current_VV + 0.9 * RIGHT.current_VV, RIGHT.previous_VV)
    steps = whole_steps(answer(second, WRONG, cats.CascadeConfig(steps=3, tree_topk=2, total_tokens=40)))
    assert {trace.accepted_kinds for trace in steps} == {("sibling", "continuation")}


def test_continuations_are_accepted_after_a_correction() -> None:
    """The draft errs after even tokens, the shallow verifier never: a correction, then the draft's own token after it."""
    draft = follow([(token + 2) % CIRCLE if token % 2 == 0 else (token + 1) % CIRCLE for token in range(CIRCLE)])
    steps = whole_steps(answer(draft, RIGHT, cats.CascadeConfig(steps=3, tree_topk=2, total_tokens=24)))
    assert ("correction", "continuation") in {trace.accepted_kinds[-2:] for trace in steps}


@pytest.mark.parametrize(
    ("draft", "shallow", "agreed", "confusion"),
    [
        (RIGHT, RIGHT, 5, Confusion(tp=5)),
        (RIGHT, WRONG, 0, Confusion(fn=5)),
        (WRONG, WRONG, 5, Confusion(fp=5)),
        (WRONG, RIGHT, 0, Confusion(tn=5)),
    ],
)
def test_the_confusion_matrix_counts_the_shallow_verifier_against_the_target(
    draft: Script, shallow: Script, agreed: int, confusion: Confusion
) -> None:
    for trace in whole_steps(answer(draft, shallow, cats.CascadeConfig(steps=5))):
        assert (trace.shallow_accepted, trace.confusion) == (agreed, confusion)


def test_a_threshold_ends_the_draft_after_the_first_token() -> None:
    unsure = follow([(token + 1) % CIRCLE for token in range(CIRCLE)], margin=1.0)
    steps = whole_steps(answer(unsure, RIGHT, cats.KangarooConfig(steps=6, threshold=0.6)))
    assert {trace.nodes for trace in steps} == {2}


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_layer_passes_are_those_of_the_stages(steps: int) -> None:
    """Each drafted token and the last one run through [0, d), then everything once through [d, L): nothing twice."""
    for trace in whole_steps(answer(RIGHT, RIGHT, cats.EagleSelfConfig(steps=steps))):
        assert trace.layer_passes == (steps + 1) * DRAFT_EXIT + LAYERS - DRAFT_EXIT
    for trace in whole_steps(answer(RIGHT, RIGHT, cats.CascadeConfig(steps=steps))):
        assert trace.layer_passes == (steps + 1) * DRAFT_EXIT + LAYERS - DRAFT_EXIT + SHALLOW_EXIT  # the free token's own


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_tiny_budgets_are_met_exactly(shape: str, length: int) -> None:
    got = answer(RIGHT, WRONG, SHAPES[shape], max_new_tokens=length)
    assert (got.ids, got.finish) == ([1, 2, 3][:length], "length")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eos", range(1, CIRCLE))
def test_eos_ends_the_answer_wherever_it_falls(shape: str, eos: int) -> None:
    got = answer(RIGHT, RIGHT, SHAPES[shape], eos_token_ids=(eos,))
    assert (got.ids, got.finish) == (list(range(1, eos + 1)), "eos")
    assert sum(trace.committed for trace in got.traces) == eos


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_ties_fall_as_in_plain_decoding(shape: str) -> None:
    """The target ties t + 1 with t + 3 everywhere; the drafts lean one way each."""
    tied = Script(RIGHT.current_VV + np.roll(RIGHT.current_VV, 2, axis=1), RIGHT.previous_VV)
    model = scripted_model(tied, WRONG, RIGHT, dtype=torch.float32)
    config = cats.GenerationConfig(max_new_tokens=LENGTH, eos_token_ids=())
    plain = cats.generate(model, [0], cats.build_method(cats.AutoregressiveConfig()), config).ids
    assert cats.generate(model, [0], SHAPES[shape], config).ids == plain


@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_steps_are_the_whole_answer(shape: str) -> None:
    model, config = scripted_model(RIGHT, RIGHT, WRONG), cats.GenerationConfig(max_new_tokens=17, eos_token_ids=())
    method = SHAPES[shape]
    steps = list(cats.stream(model, [0], method, config))
    assert [token for step in steps for token in step.tokens] == cats.generate(model, [0], method, config).ids
    assert [step.finish for step in steps] == [None] * (len(steps) - 1) + ["length"]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stop_string_ends_the_answer_after_the_token_that_completes_it(shape: str) -> None:
    letters = cats.StopStrings(["ef"], lambda ids: "".join(chr(ord("a") + token) for token in ids))
    config = cats.GenerationConfig(max_new_tokens=LENGTH, eos_token_ids=())
    got = cats.generate(scripted_model(RIGHT, RIGHT, RIGHT), [0], SHAPES[shape], config, stop=letters)
    assert (got.ids, got.finish) == ([1, 2, 3, 4, 5], "stop")
