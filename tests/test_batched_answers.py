"""Many answers at once are the answers one at a time; sampling does not depend on the company; the end of the context is kept."""

from dataclasses import replace

import pytest
import torch

import cats
from tests.tiny_models import EOS, TinyModel
from training.batched_answers import Choice, Request, answer_all

GREEDY = Choice(0.0, 1.0)
PROMPTS = [[1, *range(5, 5 + length)] for length in (3, 40, 12, 41, 7, 90, 25)]


def requests(prompts: list[list[int]] = PROMPTS) -> list[Request]:
    return [Request(prompt, (7, number)) for number, prompt in enumerate(prompts)]


def answered(base: cats.MultiAdapterCATSModel, choice: Choice, rows: int, limit: int = 24, ends: tuple[int, ...] = (EOS,)) -> list[Request]:
    made = requests()
    answer_all(base.base, made, choice, limit, ends, rows)
    return made


@pytest.fixture(scope="module")
def model(speaking: TinyModel) -> cats.MultiAdapterCATSModel:
    return cats.load(speaking.base, dtype="float64")


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_greedy_answers_are_those_of_plain_decoding(model: cats.MultiAdapterCATSModel, rows: int) -> None:
    plain = cats.build_method(cats.AutoregressiveConfig())
    straight = cats.generate(model, PROMPTS[0], plain, cats.GenerationConfig(max_new_tokens=24, eos_token_ids=())).ids
    ends = (straight[4],)  # so that some rows end early and are taken out
    config = cats.GenerationConfig(max_new_tokens=24, eos_token_ids=ends)
    made = answered(model, GREEDY, rows, ends=ends)
    for request in made:
        expected = cats.generate(model, request.prompt, plain, config)
        assert request.answer == list(expected.ids)
        assert request.ended == (expected.finish == "eos")
    assert made[0].ended


def test_a_sampled_answer_does_not_depend_on_its_batch(model: cats.MultiAdapterCATSModel) -> None:
    together = answered(model, Choice(1.0, 0.9), 7)
    assert [request.answer for request in together] == [request.answer for request in answered(model, Choice(1.0, 0.9), 2)]
    other = [replace(request, answer=[], seed=(8, 0)) for request in together]
    answer_all(model.base, other, Choice(1.0, 0.9), 24, (EOS,), 7)
    assert [request.answer for request in other] != [request.answer for request in together]


def test_answers_stop_at_the_end_of_the_context(model: cats.MultiAdapterCATSModel) -> None:
    context, plain = model.base.context, cats.build_method(cats.AutoregressiveConfig())
    made = requests([[1, *([9] * (context - 4))], [1, 5, 6], [1, *([9] * (context - 31))]])
    answer_all(model.base, made, GREEDY, 20, (), 4)
    config = cats.GenerationConfig(max_new_tokens=20, eos_token_ids=())
    assert [request.answer for request in made] == [list(cats.generate(model, request.prompt, plain, config).ids) for request in made]
    assert [len(request.answer) for request in made] == [3, 20, 20]
    assert not any(request.ended for request in made)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.6)])
def test_tokens_are_drawn_from_the_truncated_distribution(temperature: float, top_p: float) -> None:
    logits_V = torch.tensor([1.0, 3.0, 0.0, 2.5, -1.0])
    chances_V = (logits_V / temperature).softmax(-1)
    order = chances_V.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for token in order:
        if mass < top_p:
            kept.append(token)
            mass += float(chances_V[token])
    count = 100_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = Choice(temperature, top_p).tokens(logits_V.expand(count, -1), uniform)
    shares = torch.bincount(drawn, minlength=5) / count
    expected = torch.tensor([float(chances_V[token]) / mass if token in kept else 0.0 for token in range(5)])
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)


def test_tokens_are_told_as_they_are_written(model: cats.MultiAdapterCATSModel) -> None:
    made, told = requests(), list[int]()
    answer_all(model.base, made, GREEDY, 24, (EOS,), 3, told.append)
    assert sum(told) == sum(len(request.answer) for request in made)
    assert len(told) > 24
