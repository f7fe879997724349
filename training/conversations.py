"""ShareGPT conversations: reading and checking them. Knows text; knows no template and no model."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

from cats.cli.progress import heartbeat
from cats.errors import CatsError
from cats.text import Message

ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1, "chatgpt": 1}


@dataclass(frozen=True)
class Turn:
    """One message: `role` 0 is the user, 1 the assistant; an answer that was cut off before its end is not `finished`."""

    role: int
    text: str
    finished: bool = True


@dataclass(frozen=True)
class Conversation:
    """Alternating turns that start with the user."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[Message]:
        """The turns as `cats.ModelText` takes them."""
        return [{"role": ("user", "assistant")[turn.role], "content": turn.text} for turn in self.turns]

    @property
    def unfinished(self) -> list[int]:
        """Places of the turns that were cut off."""
        return [place for place, turn in enumerate(self.turns) if not turn.finished]


def read_sharegpt(path: str | Path) -> list[Conversation]:
    """Read a ShareGPT file (JSON list, `.json` or `.json.gz`).

    Leading assistant turns and a trailing user turn are dropped, as every published ShareGPT pipeline does; a
    conversation that is left empty is skipped. Roles that do not alternate, unknown roles or broken JSON raise
    `CatsError` naming the item.
    """
    path = Path(path)
    try:
        opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as file, heartbeat("read conversations"):
            items = json.load(file)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CatsError(f"cannot read conversations from {path}: {error}; expected a JSON list in ShareGPT format.") from error
    if not isinstance(items, list):
        raise CatsError(f"{path} holds a JSON {type(items).__name__}, not a list of conversations; expected ShareGPT format.")
    conversations = [_conversation(item, position, path) for position, item in enumerate(items)]
    kept = [conversation for conversation in conversations if conversation.turns]
    if not kept:
        raise CatsError(f"{path} holds no conversation with a user turn and an answer; nothing to train on.")
    return kept


def _conversation(item: object, position: int, path: Path) -> Conversation:
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise CatsError(f"item {position} of {path} has no list 'conversations'; expected ShareGPT format.")
    turns = [_turn(entry, position, path) for entry in item["conversations"]]
    while turns and turns[0].role != 0:
        turns = turns[1:]
    if turns and turns[-1].role == 0:
        turns = turns[:-1]
    if any(turn.role != place % 2 for place, turn in enumerate(turns)):
        raise CatsError(f"item {position} of {path} (id {item.get('id')}) has roles out of order; user and assistant must alternate.")
    return Conversation(str(item.get("id", position)), tuple(turns))


def _turn(entry: object, position: int, path: Path) -> Turn:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise CatsError(f"item {position} of {path} has a turn without text in 'value'; expected ShareGPT format.")
    role = ROLES.get(str(entry.get("from")))
    if role is None:
        raise CatsError(f"item {position} of {path} has a turn from {entry.get('from')!r}; known roles are {', '.join(ROLES)}.")
    return Turn(role, entry["value"].strip(), entry.get("finished") is not False)
