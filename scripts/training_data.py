"""Data of the training comparison: prompts to train on with answers of several kinds, and held-out prompts in three disjoint parts.

Conversations are cut to their first question and answer. Every kind of answer covers the same prompts in the same order.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cats.errors import CatsError
from cats.records import sha256
from training import ge_data
from training.chat_tokens import training_text
from training.conversations import Conversation, Turn, read_sharegpt
from training.provenance import agree, write_json
from training.regenerate import RESULT, as_sharegpt

CORPUS = "corpus"
ANSWERS: dict[str, tuple[str, ...]] = {
    "greedy": ("--temperature", "0"),
    "sampled": ("--temperature", "0.8"),
}
HELD_OUT = ("selection", "test", "validation")


@dataclass(frozen=True)
class DataPlan:
    """Which prompts, and how long.

    Attributes:
        prompts: conversations chosen from the corpus, to be answered by the model.
        train_on: how many of them the cells are trained on.
        prompt_tokens: longest prompt, template included.
        new_tokens: longest answer, written or taken from the corpus; a row is prompt and answer.
        selection, test, validation: held-out prompts of each part.
    """

    model: Path
    corpus: Path
    held_out: Path
    prompts: int
    train_on: int
    prompt_tokens: int
    new_tokens: int
    selection: int
    test: int
    validation: int
    seed: int
    answer_rows: int = 128

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_tokens + self.new_tokens

    def description(self) -> dict[str, Any]:
        """What decides the data; file names without the paths of this machine."""
        facts = {name: getattr(self, name) for name in ("prompts", "train_on", "prompt_tokens", "new_tokens", *HELD_OUT, "seed")}
        return facts | {
            "corpus": self.corpus.name,
            "corpus_sha256": sha256(self.corpus),
            "held_out": self.held_out.name,
            "held_out_sha256": sha256(self.held_out),
            "model_sha256": sha256(self.model / "model.safetensors"),
        }


class TrainingData:
    """Everything under one folder; what is there already is kept."""

    def __init__(self, plan: DataPlan, root: Path):
        self.plan, self.root = plan, root

    def choose(self) -> None:
        """Write the prompts: those to train on, and the held-out ones in their parts."""
        agree(self.root / "data.json", self.plan.description(), write=True)
        wanted = {"train": (self.plan.corpus, [("train", self.plan.prompts)])}
        wanted["held out"] = (self.plan.held_out, [(part, getattr(self.plan, part)) for part in HELD_OUT])
        for source, parts in wanted.values():
            if all(self.prompts(part).exists() for part, _ in parts):
                continue
            chats = self.fitting(read_sharegpt(source), sum(count for _, count in parts))
            for part, count in parts:
                write_json(self.prompts(part), [as_sharegpt(chat) for chat in chats[:count]], indent=None)
                chats = chats[count:]

    def fitting(self, chats: Sequence[Conversation], count: int) -> list[Conversation]:
        """The first `count` conversations, in an order that the seed decides, whose first prompt is short enough."""
        text = training_text(self.plan.model, None)
        found: list[Conversation] = []
        for place in np.random.default_rng(self.plan.seed).permutation(len(chats)):
            chat = replace(chats[place], turns=chats[place].turns[:2])
            if chat.turns[1].text and len(text.prompt_ids(chat.messages[:1])) <= self.plan.prompt_tokens:
                found.append(replace(chat, id=f"{place}"))
            if len(found) == count:
                return found
        raise CatsError(f"only {len(found)} of {count} conversations have a first prompt of at most {self.plan.prompt_tokens} tokens.")

    def prompts(self, part: str) -> Path:
        """The chosen conversations of a part, with the corpus's own answers."""
        return self.root / f"{part}.json"

    def answer(self, part: str, kind: str) -> Path:
        """The part's conversations with answers of a kind, written by the model where they are not the corpus's."""
        if kind == CORPUS:
            return self.prompts(part)
        outdir = self.root / "answers" / part / kind
        flags = ["--model-path", str(self.plan.model), "--data-path", str(self.prompts(part)), "--outdir", str(outdir), "--cpu"]
        flags += ["--exit-layers", "1", "--length", str(self.plan.length), "--seed", str(self.plan.seed)]
        flags += ["--max-new-tokens", str(self.plan.new_tokens), "--answer-rows", str(self.plan.answer_rows)]
        if not (outdir / "0" / RESULT).exists():
            ge_data.main([*flags, "--regenerate", "--text-only", *ANSWERS[kind]])
        return outdir / "0" / RESULT

    def targets(self, part: str, kinds: Sequence[str]) -> dict[str, Path]:
        """One file per kind, over the same prompts, which every kind answers, in one order: by length, since a shard pads its rows."""
        chats = {kind: {chat.id: chat for chat in read_sharegpt(self.answer(part, kind))} for kind in kinds}
        shared = [chat.id for chat in read_sharegpt(self.prompts(part)) if all(chat.id in own for own in chats.values())]
        chosen = shared[: self.plan.train_on] if part == "train" else shared
        order = sorted(chosen, key=lambda chat_id: sum(len(turn.text) for own in chats.values() for turn in own[chat_id].turns))
        paths = {kind: self.root / "targets" / part / f"{kind}.json" for kind in kinds}
        for kind, path in paths.items():
            write_json(path, [as_sharegpt(chats[kind][chat_id]) for chat_id in order], indent=None)
        return paths

    def home(self, part: str, kinds: str) -> Path:
        """Folder of the states of one kind of answer, or of several kinds joined by `+`, whose shards are linked into one folder."""
        home = self.root / "states" / part / kinds
        for kind in kinds.split("+") if "+" in kinds else ():
            for path in (self.root / "states" / part / kind).rglob("states*.*"):
                linked = home / kind / path.relative_to(self.root / "states" / part / kind)
                linked.parent.mkdir(parents=True, exist_ok=True)
                if not linked.exists():
                    os.link(path, linked)
        return home

    def states(self, part: str, kind: str, path: Path, exits: Sequence[int]) -> Path:
        """States of the base over a file of `targets`, one row a conversation."""
        outdir = self.home(part, kind)
        flags = ["--model-path", str(self.plan.model), "--data-path", str(path), "--outdir", str(outdir), "--cpu", "--shard-rows", "16"]
        ge_data.main([*flags, "--exit-layers", *map(str, exits), "--length", str(self.plan.length)])
        return outdir


def prompt_of(chat: Conversation) -> Conversation:
    """The conversation with a placeholder in the answer's place."""
    return replace(chat, turns=(chat.turns[0], Turn(1, ".")))
