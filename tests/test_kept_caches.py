"""Answers with caches kept from the answer before are those without, for every method; only what is new of a prompt is run."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

import cats
from cats.rows import Rows
from cats.state import DecodeState
from tests.methods import SHAPES, memory_for
from tests.test_cache import assert_state_is_sound, steps
from tests.test_threads import MEMORY
from tests.tiny_models import CONTEXT, EOS, TinyModel, prompts
from tests.weight_kinds import of_kind

Tiny = Callable[[str], TinyModel]
CONFIG = cats.GenerationConfig(max_new_tokens=10, eos_token_ids=(EOS,))
SAMPLED = cats.GenerationConfig(max_new_tokens=10, eos_token_ids=(), temperature=1.5, seed=3)
FIRST = prompts(count=1, longest=20, seed=4)[0]
MORE = [9, 14, 30]
ROOMY = cats.MemoryOptions(4 * 10**9, positions=CONTEXT, nodes=64)


@cache
def loaded(tiny: TinyModel, memory: cats.MemoryOptions | None = None) -> cats.MultiAdapterCATSModel:
    return cats.load(tiny.base, tiny.adapters, dtype="float64", memory=memory)


class Talk:
    """One model, one method, and caches that are kept; every answer is compared with one that has none."""

    def __init__(self, model: cats.MultiAdapterCATSModel, shape: str, config: cats.GenerationConfig = CONFIG):
        self.model, self.config, self.kept = model, config, cats.KeptCaches(model)
        self.method = cats.build_method(SHAPES[shape], model)

    def ask(self, prompt: Sequence[int], eos: Sequence[int] = (), stop_after: int | None = None) -> list[int]:
        """The answer, after how much of the prompt was run has been checked."""
        config = dataclasses.replace(self.config, eos_token_ids=tuple(eos)) if eos else self.config
        stop = None if stop_after is None else (lambda text, new: stop_after if len(text) > stop_after + 1 else None)
        known = shared(self.kept.tokens, prompt)
        found = cats.generate(self.model, prompt, self.method, config, stop=stop, kept=self.kept)
        assert found.traces[0].prompt_rows == len(prompt) - known
        whole = self.alone(prompt, config)
        assert found.ids == (whole if stop_after is None else whole[: len(found.ids)])
        return found.ids

    def alone(self, prompt: Sequence[int], config: cats.GenerationConfig) -> list[int]:
        tokens = self.kept.tokens
        found = cats.generate(self.model, prompt, "autoregressive", config).ids
        assert self.kept.tokens == ([] if self.model.base.source.one_answer else tokens)
        return found

    def interrupt(self, prompt: Sequence[int], count: int) -> list[int]:
        """The first tokens of an answer whose generator is closed after so many steps."""
        answer = cats.stream(self.model, prompt, self.method, self.config, kept=self.kept)
        found = [token for _ in range(count) for token in next(answer).tokens]
        answer.close()
        return found


def shared(known: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens of the prompt that need not be run; the last one always is."""
    same = [place for place, (one, other) in enumerate(zip(known, prompt[:-1], strict=False)) if one != other]
    return min([*same, len(known), len(prompt) - 1])


def hold(talk: Talk) -> None:
    """A conversation with everything that may happen between two turns."""
    answer = talk.ask(FIRST)
    second = [*FIRST, *answer, *MORE]
    answer = talk.ask(second)
    assert talk.ask(second) == answer  # again: the whole prompt is known
    assert talk.ask([*second, *talk.ask(second, eos=answer[3:4])])  # ended by an end token
    edited = [*FIRST[:3], 40, *FIRST[4:], *answer, *MORE]
    answer = talk.ask(edited)
    talk.ask([*edited, *talk.interrupt(edited, 1), 33])
    talk.ask([*edited, *talk.interrupt(edited, 3), 33, 34])
    talk.ask([*edited, *talk.ask(edited, stop_after=4), 35])
    talk.ask(FIRST[:2])
    talk.ask([17, *FIRST])  # nothing in common


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answers_are_those_without(tiny: Tiny, shape: str) -> None:
    hold(Talk(loaded(tiny("llama-grouped"), memory_for(shape)), shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_answers_are_those_without(tiny: Tiny, shape: str) -> None:
    talk = Talk(loaded(tiny("llama"), memory_for(shape)), shape, SAMPLED)
    second = [*FIRST, *talk.ask(FIRST), *MORE]
    assert talk.ask(second) == talk.ask(second)
    talk.ask([*second, *talk.interrupt(second, 2), 33])


@pytest.mark.parametrize("shape", ["cascade-tree", "kangaroo", "medusa", "autoregressive"])
def test_streamed_weights_answer_so_too(tiny: Tiny, shape: str) -> None:
    hold(Talk(loaded(tiny("llama"), MEMORY["streamed"]), shape))


@pytest.mark.parametrize("shape", ["cascade-tree", "autoregressive"])
def test_a_budget_for_the_process_has_room_for_them(tiny: Tiny, shape: str) -> None:
    """Positions are planned once; an answer without the caches takes their place."""
    model = loaded(tiny("llama"), ROOMY)
    talk = Talk(model, shape)
    prompt = list(FIRST)
    for _ in range(3):
        found = cats.generate(model, prompt, talk.method, CONFIG, kept=talk.kept)
        assert found.ids == cats.generate(loaded(tiny("llama")), prompt, "autoregressive", CONFIG).ids
        prompt += [*found.ids, *MORE]
    tokens = talk.kept.tokens
    with pytest.raises(cats.CatsError, match=rf"may take {CONTEXT} positions|the model's context holds"):
        cats.generate(model, [*tokens, *[5] * CONTEXT], talk.method, CONFIG, kept=talk.kept)
    assert talk.kept.tokens == tokens
    cats.generate(model, FIRST, talk.method, CONFIG)
    assert talk.kept.tokens == []
    assert model.base.source.ledger.taken["KV caches"] == 0


def test_a_conversation_longer_than_the_plan_is_refused_and_stays(tiny: Tiny) -> None:
    model = loaded(tiny("llama"), dataclasses.replace(ROOMY, positions=40))
    kept = cats.KeptCaches(model)
    found = cats.generate(model, FIRST, "autoregressive", CONFIG, kept=kept)
    with pytest.raises(cats.CatsError, match="may take 50 positions and the memory plan holds 40; give --budget-positions 50"):
        cats.generate(model, [*FIRST, *found.ids, *[5] * 40][:40], "autoregressive", CONFIG, kept=kept)
    assert kept.tokens[: len(FIRST)] == FIRST
    kept.close()
    assert kept.tokens == []
    assert model.base.source.ledger.taken["KV caches"] == 0


def test_nested_weights_answer_so_too(tiny: Tiny) -> None:
    """The coarse form in memory, the rest streamed."""
    base, config = of_kind(tiny("llama").base, "nested"), cats.NestedConfig(steps=4, adaptive=False)
    model, prompt = cats.load(base, memory=cats.MemoryOptions(90_000, "weights"), method=config), list(FIRST)
    assert model.base.source.plan.streamed
    kept = cats.KeptCaches(model)
    for turn in range(3):
        found = cats.generate(model, prompt, config, CONFIG, kept=kept)
        assert found.ids == cats.generate(model, prompt, "autoregressive", CONFIG).ids
        assert found.traces[0].prompt_rows == (1 + len(MORE) if turn else len(FIRST))
        prompt += [*found.ids, *MORE]


def test_only_new_rows_go_through_the_layers(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tiny("llama"))
    talk, rows = Talk(model, "cascade-tree"), list[int]()
    answer = talk.ask(FIRST)
    run = model.base.run_layers

    def counted(groups: Sequence[Rows], start: int, end: int, *view: object) -> int:
        if start == 0:
            rows.append(sum(group.hidden_BTD.shape[1] for group in groups))
        return run(groups, start, end, *view)  # type: ignore[arg-type]

    monkeypatch.setattr(model.base, "run_layers", counted)
    following = cats.stream(model, [*FIRST, *answer, *MORE], talk.method, CONFIG, kept=talk.kept)
    assert next(following).trace.prompt_rows == 1 + len(MORE)
    assert rows == [1 + len(MORE)]


def test_a_second_turn_saves_streams_of_the_weights(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that cannot keep a sublayer streams every layer once per group of rows."""
    monkeypatch.setattr("cats.state.PREFILL_ROWS", 16)
    model = loaded(tiny("llama"), cats.MemoryOptions(pinning=False, ring_buffers=1))
    assert not model.base.source.holds_sublayers
    kept, prompt = cats.KeptCaches(model), [5 + place % 40 for place in range(64)]
    first = cats.generate(model, prompt, "autoregressive", CONFIG, kept=kept)
    second = cats.generate(model, [*prompt, *first.ids, *MORE], "autoregressive", CONFIG, kept=kept)
    assert first.traces[0].bytes_streamed >= 4 * second.traces[0].bytes_streamed > 0


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_resumed_caches_equal_caches_from_scratch(tiny: Tiny, shape: str) -> None:
    """Also where fewer tokens are shared than an adapter has read, and where more are."""
    model = loaded(tiny("llama"), memory_for(shape))
    state, _ = list(steps(model, FIRST, shape, SAMPLED))[-1]
    text = state.tokens
    for length in (len(text) - 1, len(FIRST) + 4, len(FIRST), 5, 0):
        resumed(state, [*text[:length], 41, 42])
        assert_state_is_sound(state)


def resumed(state: DecodeState, prompt: list[int]) -> None:
    state.resume(prompt, state.capacity + 4)
    state.read_prompt()
    state.tokens.append(7)


def test_an_answer_that_fails_leaves_nothing_behind(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(loaded(tiny("llama")), "cascade-tree")
    answer = talk.ask(FIRST)
    with monkeypatch.context() as patched:
        patched.setattr(talk.method, "propose", lambda cycle: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cats.generate(talk.model, [*FIRST, *answer, *MORE], talk.method, CONFIG, kept=talk.kept)
    assert talk.kept.tokens == []
    talk.ask([*FIRST, *answer, *MORE])


def test_other_adapters_begin_with_empty_caches(tiny: Tiny) -> None:
    model = loaded(tiny("llama"))
    kept = cats.KeptCaches(model)
    cats.generate(model, FIRST, "kangaroo", CONFIG, kept=kept)
    found = cats.generate(model, FIRST, "cascade", CONFIG, kept=kept)
    assert found.traces[0].prompt_rows == len(FIRST)


def test_one_answer_at_a_time_and_of_one_model(tiny: Tiny) -> None:
    model = loaded(tiny("llama"))
    kept = cats.KeptCaches(model)
    first = cats.stream(model, FIRST, "kangaroo", CONFIG, kept=kept)
    next(first)
    for refused in (kept.close, lambda: cats.generate(model, FIRST, "kangaroo", CONFIG, kept=kept)):
        with pytest.raises(cats.CatsError, match=r"serve an answer that is not finished; end it or close its generator"):
            refused()
    first.close()
    with pytest.raises(cats.CatsError, match=r"another model's; make KeptCaches"):
        cats.generate(loaded(tiny("llama-grouped")), FIRST, "kangaroo", CONFIG, kept=kept)


@pytest.mark.parametrize("memory", MEMORY)
def test_conversations_of_several_threads_do_not_mix(tiny: Tiny, memory: str) -> None:
    model, together = loaded(tiny("llama"), MEMORY[memory]), threading.Barrier(4)
    method = "cascade-tree" if memory != "resident, process" else "kangaroo"

    def talk(number: int) -> list[list[int]]:
        kept, prompt, answers = cats.KeptCaches(model), [5 + number, 6, 7], list[list[int]]()
        torch.set_num_threads(1)
        together.wait()
        for _ in range(3):
            answers.append(cats.generate(model, prompt, SHAPES[method], CONFIG, kept=kept).ids)
            prompt = [*prompt, *answers[-1], 20 + number]
        return answers

    def alone(number: int) -> list[list[int]]:
        prompt, answers = [5 + number, 6, 7], list[list[int]]()
        for _ in range(3):
            answers.append(cats.generate(loaded(tiny("llama")), prompt, "autoregressive", CONFIG).ids)
            prompt = [*prompt, *answers[-1], 20 + number]
        return answers

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, range(4))) == [alone(number) for number in range(4)]
