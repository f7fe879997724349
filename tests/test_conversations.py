"""Reading ShareGPT files, rendering them with answer spans, and the loss mask that follows for any tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cats.errors import CatsError
from cats.text import ModelText
from tests.speaking_model import byte_tokenizer
from training.chat_tokens import encode_chats, inside
from training.conversations import Conversation, Turn, read_sharegpt

CHAT = Conversation("c", (Turn(0, "What is 2+2?"), Turn(1, "It is 4."), Turn(0, "Naïve 日本?"), Turn(1, "Yes: naïve 日本.\n  Two lines")))
ANSWERS = ["It is 4.", "Yes: naïve 日本.\n  Two lines"]


def sharegpt(path: Path, *items: Any) -> Path:
    path.write_text(json.dumps(list(items)))
    return path


def item(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


def test_leading_answers_and_trailing_questions_are_dropped(tmp_path: Path) -> None:
    turns = (("gpt", "hi"), ("human", " a "), ("gpt", "b"), ("human", "c"))
    (chat,) = read_sharegpt(sharegpt(tmp_path / "a.json", item(*turns), item(("human", "alone"))))
    assert chat.turns == (Turn(0, "a"), Turn(1, "b"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[{", "cannot read conversations"),
        ("{}", "not a list"),
        ("[{}]", "item 0 .* no list 'conversations'"),
        ('[{"conversations": [{"from": "human"}]}]', "without text"),
        ('[{"conversations": [{"from": "cat", "value": "x"}]}]', "from 'cat'"),
        ('[{"conversations": []}]', "no conversation"),
        (json.dumps([item(("human", "a"), ("human", "b"), ("gpt", "c"))]), "roles out of order"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(CatsError, match=sentence) as caught:
        read_sharegpt(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def text_in(template: str | None, tokenizer: PreTrainedTokenizerFast | None = None) -> ModelText:
    return ModelText(tokenizer or byte_tokenizer(), template)


@pytest.mark.parametrize(("template", "end"), [("vicuna_v1.1", "</s>"), ("llama-2", " </s><s>"), ("qwen-7b-chat", "<|im_end|>\n")])
def test_spans_hold_the_answers_and_their_end_marks(template: str, end: str) -> None:
    rendered = text_in(template).rendered(CHAT.messages)
    assert [rendered.text[slice(*span)].strip("\n ") for span in rendered.answers] == [(answer + end).strip("\n ") for answer in ANSWERS]


def test_a_span_starts_where_the_prompt_of_inference_ends() -> None:
    rendered = text_in("vicuna_v1.1").rendered(CHAT.messages)
    assert all(rendered.text[:start].endswith(" ASSISTANT:") for start, _ in rendered.answers)


def test_an_answer_that_was_cut_off_has_no_end_mark() -> None:
    cut = Conversation("c", (*CHAT.turns[:3], Turn(1, "Two", finished=False)))
    rendered = text_in("vicuna_v1.1").rendered(cut.messages, cut.unfinished)
    assert rendered.text[slice(*rendered.answers[-1])] == " Two"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = byte_tokenizer("{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}")
    with pytest.raises(CatsError, match="conversation c: the chat template tokenizer rewrites earlier turns"):
        encode_chats(text_in(None, forgetful), [CHAT], 10_000)


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of another family, trained on the chat itself."""
    text = [text_in("vicuna_v1.1").rendered(CHAT.messages).text] * 4
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "sentencepiece-bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer: Any = trainers.BpeTrainer(vocab_size=90, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))])
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=specials, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "byte-level-bpe", "sentencepiece-bpe", "unigram"])
@pytest.mark.parametrize("template", ["vicuna_v1.1", "llama-2"])
def test_the_mask_covers_the_answers_and_nothing_else(kind: str, template: str) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else trained(kind)
    text = text_in(template, tokenizer)
    (chat,) = encode_chats(text, [CHAT], 10_000)
    rendered = text.rendered(CHAT.messages)
    offsets = tokenizer(rendered.text, return_offsets_mapping=True)["offset_mapping"]
    covered = {place for (start, end), counts in zip(offsets, chat.answer_N, strict=True) if counts for place in range(start, end)}
    spans = [set(range(*span)) for span in rendered.answers]
    assert covered <= set().union(*spans)
    missed = "".join(rendered.text[place] for span in spans for place in sorted(span - covered))
    assert missed.replace("<s>", "").strip() == ""
    assert sum(chat.answer_N[chat.ids_N == tokenizer.eos_token_id]) == 2
    assert not chat.answer_N[chat.ids_N == tokenizer.bos_token_id].any()


def test_truncation_cuts_ids_and_mask_alike() -> None:
    text = text_in("vicuna_v1.1")
    (whole,), (cut,) = (encode_chats(text, [CHAT], longest) for longest in (10_000, 190))
    assert len(cut.ids_N) == 190 < len(whole.ids_N)
    assert (cut.ids_N == whole.ids_N[:190]).all()
    assert (cut.answer_N == whole.answer_N[:190]).all()


def test_tokens_that_cross_a_span_do_not_count() -> None:
    import numpy as np

    offsets = np.array([[0, 0], [0, 3], [3, 5], [4, 6], [5, 5], [5, 9], [9, 12], [20, 21]])
    assert inside(offsets, [(3, 9), (20, 22)]).tolist() == [False, False, True, True, True, True, False, True]
