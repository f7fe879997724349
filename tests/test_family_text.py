"""One checkpoint directory, one reading of it: every command takes the same prompt ids and end tokens, and answers as transformers does.

On tiny Llama-3, Qwen2, Qwen3 and Mistral directories whose answer ends with a token that only generation_config.json lists.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cats
from cats.__main__ import main as ask
from cats.adapter import AdapterModel
from cats.state import DecodeState
from cats.text import load_tokenizer
from evaluation import CATS_dynamic, correctness
from tests.family_checkpoints import PUBLISHED, QUESTION, FamilyCheckpoint, greedy
from tests.methods import SHAPES, memory_for
from training import chat_tokens, train_finetune
from training.chat_tokens import ChatTokens

Published = Callable[[str], FamilyCheckpoint]
LONGEST = 24


@pytest.fixture
def prompts_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every prompt that the engine reads."""
    seen: list[list[int]] = []
    read = DecodeState.read_prompt

    def noted(state: DecodeState) -> torch.Tensor:
        seen.append(list(state.tokens))
        return read(state)

    monkeypatch.setattr(DecodeState, "read_prompt", noted)
    return seen


def expected(checkpoint: FamilyCheckpoint) -> list[int]:
    """transformers' greedy answer under the checkpoint's own generation settings."""
    answer = greedy(checkpoint.tiny, checkpoint.prompt_ids, LONGEST)
    assert 1 < len(answer) < LONGEST
    assert answer[-1] in checkpoint.end_ids
    return answer


def with_adapters(checkpoint: FamilyCheckpoint) -> list[str]:
    tiny = checkpoint.tiny
    adapters = ["--draft-adapter-path", str(tiny.draft), "--shallow-adapter-path", str(tiny.shallow)]
    return ["--model-path", str(tiny.base), *adapters, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", str(LONGEST)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_that_asks(published: Published, name: str, prompts_read: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = published(name)
    ask([QUESTION, *with_adapters(checkpoint)])
    assert prompts_read == [checkpoint.prompt_ids]
    assert f"[{len(expected(checkpoint))} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_library(published: Published, name: str, prompts_read: list[list[int]]) -> None:
    checkpoint = published(name)
    for memory in set(map(memory_for, SHAPES)):
        model = cats.load(checkpoint.tiny.base, checkpoint.tiny.adapters, dtype="float32", memory=memory)
        assert model.end_token_ids == checkpoint.end_ids
        for shape in (shape for shape in SHAPES if memory_for(shape) == memory):
            answer = model.chat(QUESTION, SHAPES[shape], max_new_tokens=LONGEST)
            assert (answer.ids, answer.finish) == (expected(checkpoint), "eos")
    assert set(map(tuple, prompts_read)) == {tuple(checkpoint.prompt_ids)}


def questions(folder: Path) -> Path:
    path = folder / "question.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "sums", "turns": [QUESTION]}) + "\n")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_evaluation(published: Published, name: str, prompts_read: list[list[int]], tmp_path: Path) -> None:
    checkpoint = published(name)
    more = ["--question-file", str(questions(tmp_path)), "--output-dir", str(tmp_path / "answers"), "--model-id", "tiny"]
    CATS_dynamic.main([*with_adapters(checkpoint), *more])
    record: dict[str, Any] = json.loads((tmp_path / "answers" / "0.jsonl").read_text().splitlines()[0])["choices"][0]
    assert set(map(tuple, prompts_read)) == {tuple(checkpoint.prompt_ids)}
    assert (record["new_tokens"], record["finish"]) == ([len(expected(checkpoint))], ["eos"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_comparison_with_transformers(
    published: Published, name: str, prompts_read: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = published(name)
    methods = ["--methods", "autoregressive", "cascade_chain", "cascade_tree", "--prompts", str(questions(tmp_path))]
    correctness.main([*with_adapters(checkpoint), *methods])
    assert set(map(tuple, prompts_read)) == {tuple(checkpoint.prompt_ids)}
    assert "0 differ" in capsys.readouterr().out


def talks(folder: Path, count: int = 8) -> Path:
    """Conversations of one and of two exchanges that open with `QUESTION`."""
    made = []
    for number in range(count):
        turns = [QUESTION, f"Five and {number}.", "And then?", "Then six."][: 2 + 2 * (number % 2)]
        entries = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        made.append({"id": f"c{number}", "conversations": entries})
    path = folder / "talks.json"
    path.write_text(json.dumps(made))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_training(published: Published, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned is what will be asked: the first answer follows the prompt of inference and ends with an end token."""
    checkpoint, encoded = published(name), []
    encode = chat_tokens.encode_chats

    def noted(*arguments: Any) -> list[ChatTokens]:
        encoded.extend(encode(*arguments))
        return encode(*arguments)

    monkeypatch.setattr(train_finetune, "encode_chats", noted)
    fixed = ["--model-path", str(checkpoint.tiny.base), "--data-path", str(talks(tmp_path)), "--exit-layers", "1", "3"]
    small = ["--steps", "2", "--rows", "2", "--length", "64", "--warmup", "1", "--validation-rows", "2", "--cpu"]
    train_finetune.main([*fixed, *small, "--outdir", str(tmp_path / "out")])
    assert AdapterModel.from_pretrained(tmp_path / "out" / "exit3").exit_layer == 3
    assert len(encoded) == 8
    tokenizer, rewrites = load_tokenizer(checkpoint.tiny.base), name == "qwen3"
    for chat in encoded:
        assert chat.ids_N[: len(checkpoint.prompt_ids)].tolist() == checkpoint.prompt_ids
        whole, taught = (str(tokenizer.decode(ids)) for ids in (chat.ids_N, chat.ids_N[chat.answer_N]))
        two, marks = "And then?" in whole, sum(taught.count(end) for end in PUBLISHED[name].ends)
        assert ("Five and" in taught, "Then six." in taught) == (not (two and rewrites), two)
        assert marks == (2 if two and not rewrites else 1)
        assert (np.flatnonzero(chat.answer_N)[0] == len(checkpoint.prompt_ids)) == (not (two and rewrites))
        assert taught.startswith("<think>") == rewrites
