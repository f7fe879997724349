"""Greedy answers of every method are those of transformers' own `generate`, token for token.

A new method is covered by the shape that tests/methods.py must give it. float32 and float64, where near ties do not flip.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

import cats
from tests.methods import SHAPES, memory_for
from tests.tiny_models import CONTEXT, EOS, FAMILIES, LAYERS, SIZES, TinyModel, build, prompts, reload

LENGTHS = (1, 2, 7, 40)
PROMPTS = [*prompts(count=1, longest=20, seed=4), [7]]
SLIDES: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 24}
ALTERNATING = ["full_attention", "sliding_attention"] * (LAYERS // 2)
QUICK = ("llama", "llama-grouped", "qwen3", "mistral")
"""Families that every run looks at; the others are slow tests."""
Tiny = Callable[[str], TinyModel]


@cache
def loaded(tiny: TinyModel, dtype: str = "float32", memory: cats.MemoryOptions | None = None) -> cats.MultiAdapterCATSModel:
    return cats.load(tiny.base, tiny.adapters, dtype=dtype, memory=memory)


@cache
def expected(tiny: TinyModel, prompt: tuple[int, ...], length: int, dtype: str = "float32") -> list[int]:
    """New tokens of transformers' greedy generation, cut after EOS (EOS included)."""
    model = reload(tiny, getattr(torch, dtype))
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=EOS, pad_token_id=0)  # type: ignore[operator]
    answer: list[int] = ids[0, len(prompt) :].tolist()
    return answer


def answer(model: cats.MultiAdapterCATSModel, prompt: list[int], shape: str, config: cats.GenerationConfig) -> cats.Generation:
    return cats.generate(model, prompt, SHAPES[shape], config)


def test_every_method_has_a_shape() -> None:
    assert {config.name for config in SHAPES.values()} == set(cats.METHODS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES])
def test_greedy_is_transformers_greedy(tiny: Tiny, family: str, shape: str) -> None:
    for place, prompt in enumerate(PROMPTS):
        whole = expected(tiny(family), tuple(prompt), max(LENGTHS))
        for length in LENGTHS if place == 0 else (max(LENGTHS),):
            config = cats.GenerationConfig(max_new_tokens=length, eos_token_ids=(EOS,))
            got = answer(loaded(tiny(family), memory=memory_for(shape)), prompt, shape, config)
            assert got.ids == whole[:length], f"{len(prompt)} prompt tokens, {length} new ones"
            assert got.finish == ("eos" if EOS in whole[:length] else "length")
            assert sum(trace.committed for trace in got.traces) == len(got.ids)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_in_float64(tiny: Tiny, shape: str) -> None:
    for prompt in PROMPTS:
        config = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=(EOS,))
        model, whole = loaded(tiny("llama"), "float64", memory_for(shape)), expected(tiny("llama"), tuple(prompt), 40, "float64")
        assert answer(model, prompt, shape, config).ids == whole


@pytest.mark.parametrize("shape", SHAPES)
def test_any_token_may_be_eos(tiny: Tiny, shape: str) -> None:
    """Every token of an answer in turn is declared EOS: the first one, one in mid-path, the next token after a path."""
    model, prompt = loaded(tiny("llama-grouped"), memory=memory_for(shape)), PROMPTS[0]
    whole = answer(model, prompt, "autoregressive", cats.GenerationConfig(max_new_tokens=16, eos_token_ids=())).ids
    for place, token in enumerate(whole):
        got = answer(model, prompt, shape, cats.GenerationConfig(max_new_tokens=16, eos_token_ids=(token, 0)))
        first = next(spot for spot, seen in enumerate(whole) if seen in (token, 0))
        assert (got.ids, got.finish) == (whole[: first + 1], "eos"), f"token {place} of the answer as EOS"


@pytest.mark.parametrize("room", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_answers_end_with_the_context(tiny: Tiny, shape: str, room: int) -> None:
    prompt = torch.randint(EOS + 1, 40, (CONTEXT - room,), generator=torch.Generator().manual_seed(room)).tolist()
    whole = expected(tiny("llama"), tuple(prompt), room)
    config = cats.GenerationConfig(max_new_tokens=50, eos_token_ids=(EOS,))
    got = answer(loaded(tiny("llama"), memory=memory_for(shape)), prompt, shape, config)
    assert got.ids == whole
    assert got.finish == ("eos" if EOS in whole else "context")


def test_a_prompt_that_fills_the_context_is_refused(tiny: Tiny) -> None:
    for length in (0, CONTEXT, CONTEXT + 1):
        with pytest.raises(cats.CatsError):
            answer(loaded(tiny("llama")), [5] * length, "cascade-tree", cats.GenerationConfig())


def test_long_prompts_are_read_in_pieces(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(count=1, longest=60, seed=5)[0] * 3
    prompt = prompt[:70]
    whole = expected(tiny("llama-grouped"), tuple(prompt), 20)
    monkeypatch.setattr("cats.state.PREFILL_ROWS", 16)
    for shape in SHAPES:
        model = loaded(tiny("llama-grouped"), memory=memory_for(shape))
        assert answer(model, prompt, shape, cats.GenerationConfig(max_new_tokens=20)).ids == whole


WINDOWED: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral": lambda: MistralConfig(**(SIZES | {"sliding_window": 24})),
    "mistral, a switch of other families": lambda: MistralConfig(**(SIZES | SLIDES | {"use_sliding_window": False})),
    "qwen2, later layers": lambda: Qwen2Config(**(SIZES | SLIDES | {"max_window_layers": 3})),
    "qwen3, every second layer": lambda: Qwen3Config(**(SIZES | SLIDES | {"head_dim": 12, "layer_types": ALTERNATING})),
}


@pytest.mark.parametrize("case", WINDOWED)
def test_a_sliding_window_is_the_context(tmp_path_factory: pytest.TempPathFactory, case: str) -> None:
    """Up to the window plain causal attention is exact, and answers end there."""
    windowed = build(tmp_path_factory.mktemp("windowed"), WINDOWED[case]())
    model, prompt = loaded(windowed), PROMPTS[0]
    assert model.base.context == 24
    whole = expected(windowed, tuple(prompt), 24 - len(prompt))
    assert answer(model, prompt, "cascade-tree", cats.GenerationConfig(max_new_tokens=60)).ids == whole


@pytest.mark.parametrize("shape", SHAPES)
def test_one_method_object_serves_many_answers(tiny: Tiny, shape: str) -> None:
    """Nothing is left behind by an answer, nor by one that was abandoned half way."""
    model = loaded(tiny("llama"), memory=memory_for(shape))
    method = cats.build_method(SHAPES[shape], model)
    config = cats.GenerationConfig(max_new_tokens=20, eos_token_ids=(EOS,))
    fresh = [answer(model, prompt, shape, config).ids for prompt in PROMPTS]
    abandoned = cats.stream(model, PROMPTS[-1], method, replace(config, eos_token_ids=()))
    next(abandoned), next(abandoned)
    assert [cats.generate(model, prompt, method, config).ids for prompt in PROMPTS] == fresh
