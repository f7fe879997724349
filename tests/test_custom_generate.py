"""The methods inside `generate` of a model that transformers loaded: the same text, calls of processors and criteria, and draws."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import cats
from cats.methods import needs_of
from cats.planning.plan import COARSE
from tests.methods import SHAPES
from tests.tiny_models import CONTEXT, EOS, TinyModel, prompts, reload

ROOT = Path(__file__).resolve().parent.parent
Tiny = Callable[[str], TinyModel]
PROMPT = torch.tensor(prompts(count=1, longest=20, seed=4))
RUNNABLE = {shape: config for shape, config in SHAPES.items() if COARSE not in needs_of(config).views}
PROCESSED: dict[str, Any] = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 6}
GREEDY: dict[str, dict[str, Any]] = {
    "plain": {"max_new_tokens": 40},
    "processors": {"max_new_tokens": 40, **PROCESSED},
    "no end token": {"max_new_tokens": 30, "eos_token_id": None, "suppress_tokens": [5, 6, 7]},
}
SAMPLED: dict[str, Any] = {
    "max_new_tokens": 30,
    "do_sample": True,
    "temperature": 1.3,
    "top_p": 0.9,
    "top_k": 20,
    "repetition_penalty": 1.2,
}


@cache
def loaded(tiny: TinyModel) -> Any:
    return reload(tiny, torch.float64)


@cache
def ours(tiny: TinyModel, shape: str) -> Any:
    return cats.transformers_generate(SHAPES[shape], tiny.adapters)


def text(model: Any, **asked: Any) -> list[int]:
    found: list[int] = model.generate(PROMPT, pad_token_id=0, **asked)[0].tolist()
    return found


@pytest.mark.parametrize("case", GREEDY)
@pytest.mark.parametrize("shape", RUNNABLE)
def test_greedy_text_is_generates_own(tiny: Tiny, shape: str, case: str) -> None:
    for family in ("llama-grouped", "qwen3"):
        model = loaded(tiny(family))
        assert text(model, custom_generate=ours(tiny(family), shape), **GREEDY[case]) == text(model, **GREEDY[case])


@pytest.mark.parametrize("shape", RUNNABLE)
def test_sampled_text_is_generates_own_draw_by_draw(tiny: Tiny, shape: str) -> None:
    """One seed, one text: at every token the same processed distribution is drawn from by the same random numbers."""
    model, found = loaded(tiny("llama")), []
    for custom in ({}, {"custom_generate": ours(tiny("llama"), shape)}):
        torch.manual_seed(11)
        found.append([text(model, **SAMPLED, **custom) for _ in range(4)])
    assert found[0] == found[1]
    assert len({tuple(ids) for ids in found[0]}) == 4


class Swaying(LogitsProcessor):
    """Notes the ids that it is shown; moves the logits by how often it was asked."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return scores + 0.5 * torch.sin(torch.arange(scores.shape[1]) * len(self.seen))


class EndsAfter(StoppingCriteria):
    """Notes the ids that it is shown; ends the text after a token."""

    def __init__(self, token: int) -> None:
        self.seen: list[list[int]] = []
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: object, **given: object) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("shape", ["cascade-tree", "lookahead", "medusa"])
def test_processors_and_criteria_are_called_as_by_generate(tiny: Tiny, shape: str, sampled: bool) -> None:
    calls, texts = [], []
    for custom in ({}, {"custom_generate": ours(tiny("llama"), shape)}):
        processor, criterion = Swaying(), EndsAfter(17)
        torch.manual_seed(2)
        lists = {"logits_processor": LogitsProcessorList([processor]), "stopping_criteria": StoppingCriteriaList([criterion])}
        texts.append(text(loaded(tiny("llama")), max_new_tokens=60, do_sample=sampled, **lists, **custom))
        calls.append((processor.seen, criterion.seen))
    assert texts[0] == texts[1]
    assert calls[0] == calls[1]


def test_drafts_are_accepted(tiny: Tiny) -> None:
    """The last layer runs less often than there are tokens."""
    model, runs = loaded(tiny("llama")), list[int]()
    hook = model.model.layers[-1].self_attn.register_forward_pre_hook(lambda *given: runs.append(1))
    found = text(model, custom_generate=ours(tiny("llama"), "cascade-tree"), max_new_tokens=40, eos_token_id=None)
    hook.remove()
    assert len(found) == PROMPT.shape[1] + 40
    assert len(runs) < 30


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.got: list[list[int] | str] = []

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.got.append("end")


def test_a_streamer_gets_prompt_tokens_and_end(tiny: Tiny) -> None:
    model, theirs, mine = loaded(tiny("llama")), Recorder(), Recorder()
    model.generate(PROMPT, streamer=theirs, pad_token_id=0, **GREEDY["plain"])
    custom = cats.transformers_generate(SHAPES["kangaroo"], tiny("llama").adapters, streamer=mine)
    text(model, custom_generate=custom, **GREEDY["plain"])
    assert mine.got == theirs.got


def test_scores_and_logits_are_returned_where_asked_for(tiny: Tiny) -> None:
    model = loaded(tiny("llama"))
    asked = GREEDY["processors"] | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 0}
    theirs = model.generate(PROMPT, **asked)
    mine = model.generate(PROMPT, custom_generate=ours(tiny("llama"), "cascade-tree"), **asked)
    assert mine.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(getattr(mine, name)), torch.cat(getattr(theirs, name)))
    mine.sequences += 1  # an ordinary tensor


def test_weights_are_shared_and_follow_the_model(tiny: Tiny) -> None:
    model, custom = reload(tiny("llama"), torch.float32), cats.transformers_generate("cascade", tiny("llama").adapters)
    base = custom.model_for(model).base
    assert base.layers is model.model.layers
    assert base.lm_head is model.lm_head
    assert custom.model_for(model).base is base
    torch.nn.Module.to(model, torch.float64)
    assert custom.model_for(model).base.dtype == torch.float64
    assert text(model, custom_generate=custom, max_new_tokens=9) == text(model, max_new_tokens=9)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "num_beams is 2"),
    "several answers": ({"num_return_sequences": 2, "do_sample": True}, "the batch has 2 rows"),
    "padding": ({"attention_mask": torch.tensor([[0, *[1] * (PROMPT.shape[1] - 1)]])}, "the attention_mask hides tokens"),
    "states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not kept"),
    "too long": ({"max_new_tokens": CONTEXT}, f"the model's context holds {CONTEXT}; lower max_new_tokens"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_honoured_is_refused(tiny: Tiny, case: str) -> None:
    asked, sentence = REFUSALS[case]
    with pytest.raises(cats.CatsError, match=sentence):
        text(loaded(tiny("llama")), **({"max_new_tokens": 4, "custom_generate": ours(tiny("llama"), "kangaroo")} | asked))


def test_a_cache_with_a_text_is_refused(tiny: Tiny) -> None:
    model, filled = loaded(tiny("llama")), DynamicCache()
    model(PROMPT, past_key_values=filled)
    with pytest.raises(cats.CatsError, match="past_key_values holds a text already"):
        text(model, past_key_values=filled, max_new_tokens=4, custom_generate=ours(tiny("llama"), "kangaroo"))


def test_methods_that_draft_with_a_coarse_form_are_refused(tiny: Tiny) -> None:
    with pytest.raises(cats.CatsError, match="have no coarse form"):
        text(loaded(tiny("llama")), max_new_tokens=4, custom_generate=cats.transformers_generate("nested"))


def test_end_tokens_of_the_model_end_the_text(tiny: Tiny) -> None:
    model = loaded(tiny("llama"))
    whole = text(model, max_new_tokens=30, eos_token_id=None)
    token = whole[PROMPT.shape[1] + 7]
    found = text(model, max_new_tokens=30, eos_token_id=[token, EOS], custom_generate=ours(tiny("llama"), "cascade-tree"))
    assert found == text(model, max_new_tokens=30, eos_token_id=[token, EOS])
    assert found[-1] in (token, EOS)


def test_the_python_of_the_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    block = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)[0]
    exec(compile(block, "docs/transformers.md", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out
