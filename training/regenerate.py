"""Let the base model answer the prompts of conversations itself, by plain decoding, as distillation wants.

Every answer replaces the one in the conversation, and the next prompt follows the model's own answer. An answer that
was cut off at its length ends its conversation and is marked `"finished": false`, so that no end-of-sequence token is
learnt there. Finished conversations are kept: the same command goes on after an interruption.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import cats
from cats.errors import CatsError
from training.chat_tokens import without_bos
from training.conversations import Conversation, Renderer, Turn

RESULT = "regenerated.json"


@dataclass(frozen=True)
class Regeneration:
    """How answers are written. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def config(self, seed: int, eos: tuple[int, ...]) -> cats.GenerationConfig:
        """The generation settings of one answer."""
        seed += self.seed * 1_000_003
        return cats.GenerationConfig(self.max_new_tokens, self.temperature, self.top_p, seed=seed, eos_token_ids=eos)


class Answerer:
    """The model in the assistant's place."""

    def __init__(self, model: cats.MultiAdapterCATSModel, tokenizer: PreTrainedTokenizerFast, renderer: Renderer, settings: Regeneration):
        self.model, self.tokenizer, self.renderer, self.settings = model, tokenizer, renderer, settings
        self.method = cats.build_method(cats.AutoregressiveConfig())
        eos = model.base.config.eos_token_id
        self.eos = tuple(eos) if isinstance(eos, list) else (eos,)

    def answer(self, chat: Conversation, number: int) -> Conversation:
        """The conversation with the model's own answers; shorter where an answer is empty, cut off, or the context is full."""
        turns: tuple[Turn, ...] = ()
        for place in range(0, len(chat.turns), 2):
            asked = (*turns, chat.turns[place])
            prompt = self.prompt_ids(replace(chat, turns=(*asked, Turn(1, "."))))
            if len(prompt) >= self.model.base.context:
                break
            config = self.settings.config(number * 1000 + place, self.eos)
            generation = cats.generate(self.model, prompt, self.method, config)
            text = str(self.tokenizer.decode(generation.ids, skip_special_tokens=True)).strip()
            if not text:
                break
            finished = generation.finish == "eos"
            turns = (*asked, Turn(1, text, finished))
            if not finished:
                break
        return replace(chat, turns=turns)

    def prompt_ids(self, chat: Conversation) -> list[int]:
        """Tokens up to where the last answer of `chat` begins."""
        rendered = without_bos(self.renderer(chat), self.tokenizer.bos_token)
        return list(self.tokenizer(rendered.text[: rendered.answers[-1][0]])["input_ids"])


def regenerate(answerer: Answerer, chats: Sequence[Conversation], directory: Path, rank: int = 0, processes: int = 1) -> None:
    """Write this process's share of the answers to `<directory>/answers_<rank>.jsonl`, one conversation a line.

    Conversations that any earlier run finished, with any number of processes, are not made again.
    """
    done = {number for number, _ in finished_answers(directory)}
    open_numbers = [number for number in range(len(chats)) if number not in done][rank::processes]
    with appending(directory / f"answers_{rank}.jsonl") as file:
        for number in tqdm(open_numbers, desc="answer", unit="conversation", disable=rank > 0):
            chat = answerer.answer(chats[number], number)
            file.write(json.dumps({"number": number} | as_sharegpt(chat)) + "\n")
            file.flush()


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
