"""The Python front door: load, chat, generate and stream with text or ids, and the method that is meant."""

from collections.abc import Callable

import pytest

import cats
from cats import AutoregressiveConfig, KangarooConfig
from cats.api import chosen_method
from cats.errors import CatsError
from cats.methods.cascade import Cascade
from cats.methods.kangaroo import Kangaroo
from cats.methods.prompt_lookup import PromptLookup
from tests.scripted_model import follow, scripted_model
from tests.tiny_models import TinyModel

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And?"},
]


@pytest.fixture(scope="module")
def model(speaking: TinyModel) -> cats.CatsModel:
    return cats.load(speaking.base, {"draft": speaking.draft, "shallow": str(speaking.shallow)}, dtype="float32", template="vicuna_v1.1")


def test_a_chat_answers_with_text_ids_and_traces(model: cats.CatsModel) -> None:
    answer = model.chat("Hi.", max_new_tokens=12)
    assert 0 < len(answer.ids) <= 12
    assert answer.text == model.text.answer(answer.ids)
    assert answer.finish in ("length", "eos")
    cycles = [trace.committed for trace in answer.traces[1:]]
    assert answer.accepted_length == sum(cycles) / len(cycles) > 1
    assert model.chat("Hi.", max_new_tokens=1).accepted_length is None


def test_a_conversation_may_open_with_a_system_message(model: cats.CatsModel) -> None:
    seen = model.text.decode(model.text.prompt_ids(TALK), special=True)
    assert seen == "<s>Be brief. USER: Hi. ASSISTANT: Yes.</s>USER: And? ASSISTANT:"
    assert model.chat(TALK, "autoregressive", max_new_tokens=8).ids == model.chat(TALK, max_new_tokens=8).ids


def test_text_and_ids_continue_alike(model: cats.CatsModel) -> None:
    config = cats.GenerationConfig(max_new_tokens=9)
    ids = model.text.ids("Once")
    from_text, from_ids = cats.generate(model, "Once", config=config), cats.generate(model, ids, "autoregressive", config)
    assert from_text.ids == from_ids.ids
    assert from_text.text == model.text.decode(from_ids.ids)
    assert [token for step in cats.stream(model, "Once", KangarooConfig(), config) for token in step.tokens] == from_ids.ids


def test_a_stop_string_ends_a_chat(model: cats.CatsModel) -> None:
    whole = model.chat("Hi.", max_new_tokens=12)
    stop = model.text.decode(whole.ids[5:6], special=True)
    cut = model.chat("Hi.", stop=[stop], max_new_tokens=12)
    assert cut.finish == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)]


def test_the_method_is_a_name_a_configuration_itself_or_the_best(model: cats.CatsModel, speaking: TinyModel) -> None:
    built = cats.build_method(AutoregressiveConfig())
    assert chosen_method(model, built) is built
    assert isinstance(chosen_method(model, "kangaroo"), Kangaroo)
    assert isinstance(chosen_method(model, KangarooConfig()), Kangaroo)
    assert isinstance(chosen_method(model, None), Cascade)
    assert isinstance(chosen_method(cats.load(speaking.base, {"draft": (speaking.draft, None)}), None), Kangaroo)
    assert isinstance(chosen_method(cats.load(speaking.base), None), PromptLookup)
    with pytest.raises(CatsError, match="unknown method 'magic'; known are autoregressive"):
        model.chat("Hi.", "magic")


def test_a_checkpoint_without_a_tokenizer_takes_ids_only(tiny: Callable[[str], TinyModel]) -> None:
    model = cats.load(tiny("llama").base)
    answer = cats.generate(model, [5, 6, 7], "autoregressive", cats.GenerationConfig(max_new_tokens=4))
    assert answer.ids
    for call in (lambda: answer.text, lambda: model.chat("Hi."), lambda: cats.generate(model, "Hi.")):
        with pytest.raises(CatsError, match="the checkpoint has no tokenizer"):
            call()
    with pytest.raises(CatsError, match="so a template does nothing"):
        cats.load(tiny("llama").base, template="llama-2")


def test_a_model_that_does_not_know_its_end_must_be_told() -> None:
    script = follow([1, 2, 3, 0])
    model = scripted_model(script, script, script)
    with pytest.raises(CatsError, match="does not know what ends an answer; set eos_token_ids"):
        cats.generate(model, [0], "autoregressive", cats.GenerationConfig(max_new_tokens=4))
    assert cats.generate(model, [0], "autoregressive", cats.GenerationConfig(max_new_tokens=9, eos_token_ids=(3,))).ids == [1, 2, 3]
    model.end_token_ids = (2,)
    assert cats.generate(model, [0], "autoregressive", cats.GenerationConfig(max_new_tokens=9)).ids == [1, 2]
    with pytest.raises(CatsError, match=r"not made by cats\.load"):
        cats.generate(model, "Hi.")


def test_every_public_name_is_there() -> None:
    assert all(getattr(cats, name) is not None for name in cats.__all__)
    assert set(cats.__all__) <= set(dir(cats))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = cats.lode
