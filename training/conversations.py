"""ShareGPT conversations: reading, checking and rendering them in a chat template. Knows text; knows no model.

A rendered conversation carries the character spans of its answers, from which the loss mask of any tokenizer follows.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastchat.conversation import Conversation as ChatTemplate
from fastchat.conversation import conv_templates

from cats.errors import CatsError

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


def read_sharegpt(path: str | Path) -> list[Conversation]:
    """Read a ShareGPT file (JSON list, `.json` or `.json.gz`).

    Leading assistant turns and a trailing user turn are dropped, as every published ShareGPT pipeline does; a
    conversation that is left empty is skipped. Roles that do not alternate, unknown roles or broken JSON raise
    `CatsError` naming the item.
    """
    path = Path(path)
    try:
        opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
        with opened as file:
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


def chat_template(name: str) -> ChatTemplate:
    """A fresh FastChat conversation template (`vicuna_v1.1`, `llama-2`, ...); unknown names raise `CatsError`."""
    if name not in conv_templates:
        raise CatsError(f"unknown chat template {name!r}; see fastchat.conversation.conv_templates for the known names.")
    return conv_templates[name].copy()


def render(conversation: Conversation, template: str = "vicuna_v1.1") -> str:
    """The conversation as the one string that the model is trained on, end-of-sequence markers included as text."""
    chat = chat_template(template)
    for turn in conversation.turns:
        chat.append_message(chat.roles[turn.role], turn.text)
    return chat.get_prompt()


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation and the character spans `[start, end)` of what the assistant writes in it.

    A span starts right after the prompt that the model is given at inference and ends after the end-of-sequence marker
    (before it where the answer was cut off), so its tokens are exactly the tokens the model must predict.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


Renderer = Callable[[Conversation], Rendered]
"""How to turn a conversation into one string with answer spans; made by `fastchat_renderer` or `jinja_renderer`."""


def fastchat_renderer(template: str) -> Renderer:
    """Renderer of a FastChat template by name; unknown names raise `CatsError` here, not at the first conversation."""
    chat_template(template)

    def prompt(turns: tuple[Turn, ...], ask: bool) -> str:
        chat = chat_template(template)
        for turn in turns:
            chat.append_message(chat.roles[turn.role], turn.text)
        if ask:
            chat.append_message(chat.roles[1], None)
        return chat.get_prompt()

    return lambda conversation: _with_spans(conversation, prompt)


def jinja_renderer(apply_template: Callable[[list[dict[str, str]], bool], str]) -> Renderer:
    """Renderer of a tokenizer's own chat template.

    Args:
        apply_template: messages (`role`, `content`) and whether to ask for the next answer -> text.
    """

    def prompt(turns: tuple[Turn, ...], ask: bool) -> str:
        messages = [{"role": ("user", "assistant")[turn.role], "content": turn.text} for turn in turns]
        return apply_template(messages, ask)

    return lambda conversation: _with_spans(conversation, prompt)


def _with_spans(conversation: Conversation, prompt: Callable[[tuple[Turn, ...], bool], str]) -> Rendered:
    """Render every prefix of the conversation: an answer reaches from its generation prompt to its rendered end."""
    text, answers = prompt(conversation.turns, False), []
    for place in range(1, len(conversation.turns), 2):
        asked = prompt(conversation.turns[:place], True)
        answered = prompt(conversation.turns[: place + 1], False)
        if not (text.startswith(answered) and answered.startswith(asked)):
            raise CatsError(
                f"the chat template rewrites earlier turns of conversation {conversation.id}, so its answers cannot be located; "
                "choose another one with --template."
            )
        turn = conversation.turns[place]
        end = len(answered) if turn.finished else text.index(turn.text, len(asked)) + len(turn.text)
        answers.append((len(asked), end))
    return Rendered(text, tuple(answers))
