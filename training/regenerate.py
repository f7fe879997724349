"""Let the base model answer the prompts of conversations itself, by plain decoding in batches, as distillation wants.

Every answer replaces the one in the conversation, and the next prompt follows the model's own answer. An answer that
was cut off at its length ends its conversation and is marked `"finished": false`, so that no end-of-sequence token is
learnt there. Finished conversations are kept: the same command goes on after an interruption.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import cats
from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.text import ModelText
from training.batched_answers import Choice, Request, answer_all
from training.conversations import Conversation, Turn

RESULT = "regenerated.json"


CHUNK = 4  # batches of answers between two writes


@dataclass(frozen=True)
class Regeneration:
    """How answers are written. Temperature 0 is greedy; `rows` answers are written at once, which changes only rounding."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    rows: int = 32

    def __post_init__(self) -> None:
        for name, valid in (
            ("max_new_tokens", self.max_new_tokens >= 1),
            ("temperature", self.temperature >= 0),
            ("top_p", 0 < self.top_p <= 1),
            ("rows", self.rows >= 1),
        ):
            if not valid:
                raise CatsError(f"{name} is {getattr(self, name)}, with which no answer can be written; see ge_data --help.")


class Answerer:
    """The model in the assistant's place."""

    def __init__(self, model: cats.MultiAdapterCATSModel, text: ModelText, settings: Regeneration):
        self.base, self.text, self.settings = model.base, text, settings
        self.choice = Choice(settings.temperature, settings.top_p)

    def answers(self, chats: dict[int, Conversation], on_tokens: Callable[[int], object] = lambda count: None) -> dict[int, Conversation]:
        """The conversations, by number, with the model's own answers; shorter where an answer is empty, cut off, or the context is full.

        `on_tokens` is called with the number of new tokens, whenever there are some.
        """
        written: dict[int, tuple[Turn, ...]] = dict.fromkeys(chats, ())
        open_numbers = list(chats)
        for place in range(0, max((len(chat.turns) for chat in chats.values()), default=0), 2):
            asked = {number: (*written[number], chats[number].turns[place]) for number in open_numbers if place < len(chats[number].turns)}
            answered = self.answer_turn({number: replace(chats[number], turns=turns) for number, turns in asked.items()}, place, on_tokens)
            written |= {number: (*asked[number], turn) for number, turn in answered.items()}
            open_numbers = [number for number, turn in answered.items() if turn.finished]
        return {number: replace(chats[number], turns=turns) for number, turns in written.items()}

    def answer_turn(self, asked: dict[int, Conversation], place: int, on_tokens: Callable[[int], object]) -> dict[int, Turn]:
        """One answer to each conversation that ends with a question; none where it is empty or the question fills the context."""
        prompts = {number: self.text.prompt_ids(chat.messages) for number, chat in asked.items()}
        requests = {
            number: Request(prompt, (self.settings.seed, number, place))
            for number, prompt in prompts.items()
            if len(prompt) < self.base.context
        }
        settings, ends = self.settings, self.text.end_token_ids
        answer_all(self.base, list(requests.values()), self.choice, settings.max_new_tokens, ends, settings.rows, on_tokens)
        texts = {number: self.text.answer(request.answer) for number, request in requests.items()}
        return {number: Turn(1, text, requests[number].ended) for number, text in texts.items() if text}


def regenerate(answerer: Answerer, chats: Sequence[Conversation], directory: Path, rank: int = 0, processes: int = 1) -> None:
    """Write this process's share of the answers to `<directory>/answers_<rank>.jsonl`, one conversation a line.

    Conversations that any earlier run finished, with any number of processes, are not made again.
    """
    done = {number for number, _ in finished_answers(directory)}
    open_numbers = [number for number in range(len(chats)) if number not in done][rank::processes]
    size = CHUNK * answerer.settings.rows
    written = 0

    def count(tokens: int) -> None:
        nonlocal written
        written += tokens
        bar.set_postfix_str(f"{written:,} tokens", refresh=False)

    with appending(directory / f"answers_{rank}.jsonl") as file, live_bar(total=len(open_numbers), desc="answer", disable=rank > 0) as bar:
        for start in range(0, len(open_numbers), size):
            chunk = open_numbers[start : start + size]
            for number, chat in answerer.answers({number: chats[number] for number in chunk}, count).items():
                file.write(json.dumps({"number": number} | as_sharegpt(chat)) + "\n")
            file.flush()
            bar.update(len(chunk))


def appending(path: Path) -> TextIO:
    """`path` opened for appending, after dropping a last line that a killed run left unfinished."""
    if path.exists():
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.rfind(b"\n") + 1])
    return path.open("a", encoding="utf-8")


def finished_answers(directory: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and ShareGPT item of every finished conversation."""
    for path in sorted(directory.glob("answers_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                item = json.loads(line)
                yield item.pop("number"), item


def collect(directory: Path, count: int) -> list[dict[str, Any]]:
    """All finished conversations in their order, those left without an answer dropped; an incomplete set raises `CatsError`."""
    items = dict(finished_answers(directory))
    if len(items) < count:
        raise CatsError(f"{directory} holds {len(items)} of {count} conversations; run the same command again to go on.")
    return [item for _, item in sorted(items.items()) if item["conversations"]]


def as_sharegpt(chat: Conversation) -> dict[str, Any]:
    """The ShareGPT item of a conversation; the mark `finished` is written only where it is false."""
    entries = []
    for turn in chat.turns:
        entry: dict[str, Any] = {"from": ("human", "gpt")[turn.role], "value": turn.text}
        entries.append(entry if turn.finished else entry | {"finished": False})
    return {"id": chat.id, "conversations": entries}
