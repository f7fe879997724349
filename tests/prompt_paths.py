"""The ids that every way into the project gives the model for one question, for tests that compare them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import cats
from cats import engine
from cats.cli import ask
from evaluation import CATS_dynamic, correctness
from evaluation.transformers_reference import Reference
from training import train_finetune
from training.chat_tokens import ChatTokens

QUESTION = "What is 2+2?"
ANSWER = "Four."


class PromptShownError(BaseException):
    """Ends a command once it has shown its prompt; not one of the faults that a command reports."""


@contextmanager
def catching(owner: Any, name: str, found: list[list[int]], argument: int) -> Iterator[None]:
    """Replace a function by one that keeps the ids it is given and ends the command."""

    def catch(*arguments: Any, **_: Any) -> None:
        found.append([int(token) for token in arguments[argument]])
        raise PromptShownError

    with mock.patch.object(owner, name, catch):
        try:
            yield
        except PromptShownError:
            return


def prompts_of_every_path(model: Path, folder: Path, template: str | None = None) -> dict[str, list[int]]:
    """Way in -> prompt ids of `QUESTION`, for a checkpoint directory with a tokenizer; `folder` takes what the commands write."""
    chosen = [] if template is None else ["--template", template]
    (folder / "question.jsonl").write_text(json.dumps({"question_id": 1, "category": "x", "turns": [QUESTION]}) + "\n")
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    (folder / "chats.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    questions, chats = str(folder / "question.jsonl"), str(folder / "chats.json")
    found: dict[str, list[list[int]]] = {name: [] for name in ("python -m cats", "model.chat", "CATS_dynamic", "correctness")}
    with catching(engine, "stream", found["python -m cats"], 1):
        ask.main([QUESTION, "--model-path", str(model), *chosen])
    with catching(engine, "stream", found["model.chat"], 1):
        cats.load(model, template=template).chat(QUESTION)
    settings = ["--method", "autoregressive", "--model-id", "x", "--question-file", questions, "--output-dir", str(folder / "out")]
    with catching(engine, "stream", found["CATS_dynamic"], 1):
        CATS_dynamic.main(["--model-path", str(model), "--device", "cpu", *settings, *chosen])
    with catching(Reference, "greedy", found["correctness"], 1):
        correctness.main(["--model-path", str(model), "--device", "cpu", "--methods", "autoregressive", "--prompts", questions, *chosen])
    return {name: ids for name, (ids,) in found.items()} | {"train_finetune": prompt_of_training(model, chats, folder, chosen)}


def prompt_of_training(model: Path, chats: str, folder: Path, chosen: list[str]) -> list[int]:
    """What stands before the first answer in the rows that train_finetune learns from."""
    rows: list[ChatTokens] = []

    def keep(tokens: list[ChatTokens], *_: Any) -> None:
        rows.extend(tokens)
        raise PromptShownError

    with mock.patch.object(train_finetune, "token_rows", keep), suppress(PromptShownError):
        run = ["--exit-layers", "1", "--length", "256", "--steps", "1", "--outdir", str(folder)]
        train_finetune.main(["--model-path", str(model), "--data-path", chats, *run, *chosen])
    return [int(token) for token in rows[0].ids_N[: int(rows[0].answer_N.argmax())]]
