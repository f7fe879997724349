"""What a model's text needs: one template and one set of end tokens for a checkpoint, whichever way in is taken."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastchat.conversation import conv_templates
from transformers import Qwen2Config

import cats
from cats.errors import CatsError
from cats.stopping import StopStrings
from cats.text import NAMED, OWN, ModelText, checkpoint_name, is_vicuna, listed_end_ids, load_tokenizer, render
from tests import speaking_model, tiny_models
from tests.prompt_paths import QUESTION, prompts_of_every_path
from tests.speaking_model import byte_tokenizer
from tests.tiny_models import SIZES, TinyModel

VICUNA = "A chat between a curious user and an artificial intelligence assistant. "
VICUNA += "The assistant gives helpful, detailed, and polite answers to the user's questions. "
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
OWN_JINJA = "Own:{% for message in messages %}{{ message['content'] + ('>' if message['role'] == 'user' else eos_token) }}{% endfor %}"
Turns = tuple[tuple[str, str], ...]
TALKS: dict[str, Turns] = {
    "one question": (("user", "Hi."),),
    "a system message": (("system", "Be brief."), ("user", "Hi.")),
    "several turns": (("user", "Hi."), ("assistant", "Yes."), ("user", "And?")),
    "an answered talk": (("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes."), ("user", "And?"), ("assistant", "No.")),
}


def messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", NAMED)
def test_our_templates_write_what_fastchat_writes(name: str, talk: str) -> None:
    theirs, turns = conv_templates[name].copy(), TALKS[talk]
    for role, content in turns:
        if role == "system":
            theirs.set_system_message(content)
        else:
            theirs.append_message(theirs.roles[role == "assistant"], content)
    asks = turns[-1][0] == "user"
    if asks:
        theirs.append_message(theirs.roles[1], None)
    assert render(NAMED[name], messages(turns), asks, bos_token="<s>", eos_token="</s>") == theirs.get_prompt()


def test_answers_join_the_conversation_behind_one_bos() -> None:
    text = ModelText(byte_tokenizer(), "vicuna_v1.1")
    first, second = text.prompt_ids("Hi."), text.prompt_ids(messages(TALKS["several turns"]))
    assert text.decode(first, special=True) == f"<s>{VICUNA}USER: Hi. ASSISTANT:"
    assert text.decode(second, special=True) == f"<s>{VICUNA}USER: Hi. ASSISTANT: Yes.</s>USER: And? ASSISTANT:"
    assert text.answer([*text.tokenizer.encode(" So. ", add_special_tokens=False), 2]) == "So."


@pytest.mark.parametrize("talk", ["one question", "several turns"])
def test_the_tokenizers_own_template_gives_the_same_prompt(talk: str) -> None:
    own, named = (ModelText(byte_tokenizer(), name) for name in (OWN, "vicuna_v1.1"))
    assert own.prompt_ids(messages(TALKS[talk])) == named.prompt_ids(messages(TALKS[talk]))


def test_there_is_never_a_second_bos() -> None:
    doubled = ModelText(byte_tokenizer("{{ bos_token }}{{ bos_token }}" + PLAIN))
    assert doubled.prompt_ids("Hi.").count(1) == 1
    assert ModelText(byte_tokenizer()).ids("<s>Hi.").count(1) == 1


def test_the_template_is_the_named_one_else_the_checkpoints_own_else_vicunas(tmp_path: Path) -> None:
    assert ModelText(byte_tokenizer(PLAIN)).template == OWN
    assert ModelText(byte_tokenizer(PLAIN), vicuna=True).template == OWN
    assert ModelText(byte_tokenizer(PLAIN), "llama-2").template == "llama-2"
    assert ModelText(byte_tokenizer(None), vicuna=True).template == "vicuna_v1.1"
    (tmp_path / "mine.jinja").write_text("Q:" + PLAIN)
    mine = ModelText(byte_tokenizer(), str(tmp_path / "mine.jinja"))
    assert mine.decode(mine.prompt_ids("Hi.")) == "Q:Hi."
    silent = ModelText(byte_tokenizer(None))
    assert silent.decode(silent.ids("Hi.")) == "Hi."
    with pytest.raises(CatsError, match=r"no chat template of its own; name one: vicuna_v1\.1"):
        silent.prompt_ids("Hi.")
    complaints = {OWN: "no chat template of its own", "klingon": "unknown chat template 'klingon'", "x.jinja": "cannot read"}
    for name, complaint in complaints.items():
        with pytest.raises(CatsError, match=complaint):
            ModelText(byte_tokenizer(None), name)


def write_config(directory: Path, **fields: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_a_vicuna_is_known_by_its_own_name_not_by_the_folders_around_it(tmp_path: Path) -> None:
    assert is_vicuna(write_config(tmp_path / "vicuna-7b-v1.3", model_type="llama"))
    assert is_vicuna(write_config(tmp_path / "renamed", model_type="llama", _name_or_path="lmsys/vicuna-7b-v1.5"))
    assert is_vicuna(write_config(tmp_path / "models--lmsys--vicuna-7b-v1.3" / "snapshots" / "0123", model_type="llama"))
    assert not is_vicuna(write_config(tmp_path / "vicuna" / "base", model_type="llama"))
    assert not is_vicuna(write_config(tmp_path / "vicuna-like", model_type="qwen2"))
    assert checkpoint_name(tmp_path / "models--lmsys--vicuna-7b-v1.3" / "snapshots" / "0123") == "vicuna-7b-v1.3"


def test_end_tokens_are_those_of_every_file_the_tokenizer_and_the_template(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "model", eos_token_id=7)
    (directory / "generation_config.json").write_text('{"eos_token_id": [9, 4]}')
    assert listed_end_ids(directory) == (4, 7, 9)
    assert ModelText(byte_tokenizer(None), None, listed_end_ids(directory)).end_token_ids == (2, 4, 7, 9)
    turned = byte_tokenizer(None)
    turned.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    turned.chat_template = "{% for message in messages %}{{ message['content'] }}<|end|>\n{% endfor %}"
    assert ModelText(turned).end_token_ids == (2, turned.convert_tokens_to_ids("<|end|>"))
    for content, complaint in (("{", "cannot read"), ("[]", "not an object"), ('{"eos_token_id": "x"}', "no token id")):
        (directory / "generation_config.json").write_text(content)
        with pytest.raises(CatsError, match=complaint):
            listed_end_ids(directory)


def test_stop_strings_of_a_template_end_the_text() -> None:
    text = ModelText(byte_tokenizer(), "zero_shot")
    assert text.stop_strings == ("###",)
    assert text.answer(text.tokenizer.encode("Four.\n### Human: more", add_special_tokens=False)) == "Four."


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CatsError, match="there is no directory"):
        load_tokenizer(tmp_path / "absent")


def checkpoint(tmp_path: Path, name: str, template: str | None) -> Path:
    """The speaking model under another name, with another template."""
    built = speaking_model.build(tmp_path / "built")
    shutil.move(built.base, tmp_path / name)
    for path in (tmp_path / name).glob("chat_template*"):
        path.unlink()
    byte_tokenizer(template).save_pretrained(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "own", "named", "begins"),
    [
        ("model", OWN_JINJA, None, f"Own:{QUESTION}>"),
        ("vicuna-7b", None, None, f"<s>{VICUNA}USER: {QUESTION} ASSISTANT:"),
        ("vicuna-7b", PLAIN, "llama-2", f"<s>[INST] {QUESTION} [/INST]"),
    ],
    ids=["its own", "Vicuna without one", "--template wins"],
)
def test_every_way_in_shows_the_model_the_same_prompt(tmp_path: Path, name: str, own: str | None, named: str | None, begins: str) -> None:
    model = checkpoint(tmp_path, name, own)
    prompts = prompts_of_every_path(model, tmp_path, named)
    assert len(prompts) == 5
    for way, ids in prompts.items():
        assert load_tokenizer(model).decode(ids) == begins, way


def test_several_end_tokens_end_answers_at_the_front_door(speaking: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(speaking.base, tmp_path / "model")
    plain = cats.load(tmp_path / "model").chat(QUESTION, "autoregressive", max_new_tokens=12)
    end = plain.ids[5]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [251, end]}))
    model = cats.load(tmp_path / "model")
    assert set(model.end_token_ids or ()) == {2, 251, end}
    answer = model.chat(QUESTION, "autoregressive", max_new_tokens=12)
    assert answer.ids == plain.ids[: plain.ids.index(end) + 1]
    assert answer.finish == "eos"
    assert cats.generate(model, model.text.prompt_ids(QUESTION), "autoregressive", cats.GenerationConfig(12)).ids == answer.ids


def test_id_2_is_an_ordinary_token_of_a_qwen(tmp_path: Path) -> None:
    sizes = SIZES | {"num_key_value_heads": 2, "eos_token_id": 45}
    model = cats.load(tiny_models.build(tmp_path, Qwen2Config(**sizes)).base, dtype="float32")
    assert model.end_token_ids == (45,)
    free = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())
    passed = 0
    for prompt in tiny_models.prompts(12, 8):
        text = cats.generate(model, prompt, "autoregressive", free).ids
        wanted = text[: text.index(45) + 1] if 45 in text else text
        assert cats.generate(model, prompt, "autoregressive", cats.GenerationConfig(max_new_tokens=40)).ids == wanted
        passed += 2 in wanted[:-1]
    assert passed, "token 2 must occur before an answer's end"


def test_a_stop_string_of_many_tokens_is_found() -> None:
    """Even where each of its characters is a token."""
    stop = StopStrings(["x" * 100 + "."], lambda ids: "".join(map(chr, ids)))
    answer = [ord(character) for character in "so " + "x" * 100 + ". And"]
    assert stop(answer[:103], 103) is None
    assert stop(answer, 8) == 104
