"""What a model's text needs: its tokenizer, its chat template, and what ends an answer. The one home of all three.

Knows files and a transformers tokenizer, which is imported when one is loaded; knows no model. A message is
`{"role": "system" | "user" | "assistant", "content": text}`.

Which template: the named one; else the checkpoint's own; else Vicuna's where there is none and the checkpoint is a Vicuna.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cats.errors import CatsError
from cats.stopping import StopStrings

if TYPE_CHECKING:
    from fastchat.conversation import Conversation as FastChatConversation
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
OWN = "tokenizer"
"""Name of the checkpoint's own template."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
HINT = "name one: vicuna_v1.1, llama-2, another of FastChat's names, or a .jinja file (template=... in Python, --template in a command)"
VICUNA = (
    "{% set given = messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] if given else 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' }}"
    "{% for message in (messages[1:] if given else messages) %}"
    "{% if message['role'] == 'user' %}{{ (' ' if loop.first else '') + 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
LLAMA_2 = (
    "{% set given = messages[0]['role'] == 'system' %}"
    "{{ '[INST] ' + ('<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if given else '') }}"
    "{% for message in (messages[1:] if given else messages) %}"
    "{% if message['role'] == 'user' %}{{ ('' if loop.first else '[INST] ') + message['content'] + ' ' }}"
    "{% else %}{{ '[/INST] ' + message['content'] + ' ' + eos_token + bos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[/INST]' }}{% endif %}"
)
NAMED = {"vicuna_v1.1": VICUNA, "llama-2": LLAMA_2}
"""Templates by FastChat's names, without the beginning-of-sequence token: the tokenizer puts that in front."""


@dataclass(frozen=True)
class Template:
    """A way to write a conversation down.

    Attributes:
        name: as `ModelText.template` reports it.
        render: messages, and whether to ask for the next answer -> text.
        writes_bos: the text brings its own beginning-of-sequence token; else the tokenizer adds its own.
        stop_strings, stop_token_ids: what ends an answer in this template, beyond the model's own end tokens.
    """

    name: str
    render: Callable[[Sequence[Message], bool], str]
    writes_bos: bool
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character spans `[start, end)` of what the assistant writes in it.

    A span starts right after the prompt that the model is given at inference and ends after the end-of-sequence marker
    (before it where the answer was cut off), so its tokens are exactly the tokens the model must predict.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class ModelText:
    """Text in, token ids out, and back, as one checkpoint wants it.

    Args:
        tokenizer: of the checkpoint.
        template: a name (`vicuna_v1.1`, `llama-2`, one of FastChat's), "tokenizer" for the checkpoint's own, the path of a `.jinja`
            file, or None: the checkpoint's own, else Vicuna's for a Vicuna. None of these: only `ids` and `decode` work.
        listed_end_ids: end tokens that the checkpoint's files list.
        vicuna: whether the checkpoint is a Vicuna.

    Attributes:
        end_token_ids: every token that ends an answer: those listed, the tokenizer's, the template's.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: str | None = None, listed_end_ids: Collection[int] = (), vicuna: bool = False
    ):
        self.tokenizer = tokenizer
        if template is None and not tokenizer.chat_template:
            template = "vicuna_v1.1" if vicuna else None
        elif template is None:
            template = OWN
        self._template = None if template is None else find_template(template, tokenizer)
        ends = {*listed_end_ids, tokenizer.eos_token_id, *self._end_ids_of_template()} - {None}
        self.end_token_ids: tuple[int, ...] = tuple(sorted(ends))

    @classmethod
    def from_pretrained(cls, directory: str | Path, template: str | None = None) -> "ModelText":
        """Of a checkpoint directory; a fault of its files, or an unknown template, raises `CatsError`."""
        return cls(load_tokenizer(directory), template, listed_end_ids(directory), is_vicuna(directory))

    @property
    def template(self) -> str:
        """Name of the chat template; `CatsError` where there is none."""
        return self._chat.name

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every token and its id: what is stored as ids under one vocabulary means nothing under another."""
        listed = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer in a conversation, beyond the end tokens."""
        return self._template.stop_strings if self._template else ()

    @property
    def _chat(self) -> Template:
        if self._template is None:
            raise CatsError(f"the checkpoint has no chat template of its own; {HINT}.")
        return self._template

    def ids(self, text: str) -> list[int]:
        """Ids of plain text, with what the tokenizer puts in front of it."""
        return self._encode(text, add_specials=True)

    def prompt_ids(self, messages: str | Sequence[Message]) -> list[int]:
        """Ids that ask for the answer to the last of `messages` (one question, where it is a string). At most one BOS in front."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.render(messages, ask=True)
        return self._encode(text, self.adds_specials(text))

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ids, with special tokens if asked for."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def answer(self, ids: Sequence[int]) -> str:
        """An answer in a conversation as text: without special tokens, cut at the template's stop string, stripped."""
        text = self.decode(ids)
        for stop in self.stop_strings:
            text = text.split(stop)[0]
        return text.strip()

    def stop(self, strings: Sequence[str] = (), chat: bool = True) -> StopStrings | None:
        """What ends an answer at any of `strings`, and in a chat at those of the template; None where there is none."""
        strings = [*strings, *(self.stop_strings if chat else ())]
        return StopStrings(strings, partial(self.decode, special=True)) if strings else None

    def render(self, messages: Sequence[Message], ask: bool) -> str:
        """The conversation in the chat template; with `ask`, up to where the next answer begins."""
        if not messages:
            raise CatsError("the conversation is empty; give at least one message.")
        return self._chat.render(messages, ask)

    def rendered(self, messages: Sequence[Message], unfinished: Collection[int] = ()) -> Rendered:
        """The whole conversation with the spans of its answers.

        An earlier answer that the template writes otherwise once the conversation goes on (Qwen 3 drops its thoughts) has no span:
        what stands there is what later answers follow on, and not what the model writes.

        Args:
            unfinished: places of answers that were cut off, whose spans end with their text.

        Raises:
            CatsError: the template rewrites earlier turns even up to the last answer, so not even that can be located.
        """
        text, answers = self.render(messages, ask=False), []
        last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked, answered = self.render(messages[:place], ask=True), self.render(messages[: place + 1], ask=False)
            if not (text.startswith(answered) and answered.startswith(asked)):
                if place < last:
                    continue
                raise CatsError(f"the chat template {self.template} rewrites earlier turns, so answers cannot be located; {HINT}.")
            content = message["content"]
            end = text.index(content, len(asked)) + len(content) if place in unfinished else len(answered)
            answers.append((len(asked), end))
        return Rendered(text, tuple(answers))

    def adds_specials(self, rendered: str) -> bool:
        """Whether the tokenizer has to put its special tokens in front of a rendered conversation."""
        bos = self.tokenizer.bos_token
        return not (self._chat.writes_bos or (bos and rendered.startswith(bos)))

    def _encode(self, text: str, add_specials: bool) -> list[int]:
        ids = [int(token) for token in self.tokenizer(text, add_special_tokens=add_specials)["input_ids"]]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        ended = add_specials and ids[-1:] == [self.tokenizer.eos_token_id] and not text.endswith(str(eos))
        return ids[:-1] if ended else ids

    def _end_ids_of_template(self) -> set[int]:
        """What the template lists, and the special token that it writes behind an answer."""
        if self._template is None:
            return set()
        exchange = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            behind = self._template.render(exchange, False).rpartition("answer")[2].lstrip()
        except CatsError:  # a template of one turn, or of other roles: it writes nothing behind an answer
            return set(self._template.stop_token_ids)
        first = self._encode(behind, add_specials=False)[:1] if behind else []
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.bos_token_id}
        special |= {number for number, token in getattr(self.tokenizer, "added_tokens_decoder", {}).items() if token.special}
        return {*self._template.stop_token_ids, *(token for token in first if token in special and token != self.tokenizer.bos_token_id)}


class GrowingText:
    """The text of tokens that come one by one, never half a character.

    Decodes what came since the last text but one, since some tokenizers write a token otherwise at the beginning of a text.

    Args:
        decode: token ids -> text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._told, self._told_text = 0, ""

    def add(self, token: int) -> str:
        """The text that the token completes; empty where it ends within a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        return "" if text.endswith("\ufffd") else self._tell(text)

    def end(self) -> str:
        """What half a character at the end of the answer is written as."""
        return self._tell(self._decode(self._ids))

    def _tell(self, text: str) -> str:
        fresh = text[len(self._told_text) :]
        if fresh:
            self._ids = self._ids[self._told :]
            self._told, self._told_text = len(self._ids), self._decode(self._ids)
        return fresh


def find_template(name: str, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """A template by name: ours, the tokenizer's own, a file, or one of FastChat's; an unknown one raises `CatsError`."""
    if name == OWN:
        if not tokenizer.chat_template:
            raise CatsError(f"the tokenizer has no chat template of its own; {HINT}.")
        return Template(OWN, partial(_render_by_tokenizer, tokenizer, None), writes_bos=True)
    if name in NAMED:
        marks = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
        return Template(name, lambda messages, ask: render(NAMED[name], messages, ask, **marks), writes_bos=False)
    if name.endswith(".jinja"):
        return Template(name, partial(_render_by_tokenizer, tokenizer, _read(Path(name))), writes_bos=True)
    return _fastchat_template(name)


def render(source: str, messages: Sequence[Message], ask: bool = False, bos_token: str = "", eos_token: str = "</s>") -> str:
    """Messages in a Jinja template that needs nothing of a tokenizer but its two marks."""
    from jinja2 import Environment

    template = Environment(autoescape=False).from_string(source)
    return template.render(messages=list(messages), add_generation_prompt=ask, bos_token=bos_token, eos_token=eos_token)


def _render_by_tokenizer(tokenizer: "PreTrainedTokenizerBase", source: str | None, messages: Sequence[Message], ask: bool) -> str:
    from jinja2 import TemplateError

    try:
        given: Any = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(given, chat_template=source, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise CatsError(f"the chat template refuses the conversation: {str(error).splitlines()[0]}; {HINT}.") from error


def _fastchat_template(name: str) -> Template:
    try:
        from fastchat.conversation import conv_templates
    except ImportError as error:
        raise CatsError(f"the chat template {name!r} is FastChat's, which is not installed; `pip install fschat`, or {HINT}.") from error
    if name not in conv_templates:
        raise CatsError(f"unknown chat template {name!r}; {HINT}.")
    known = conv_templates[name]
    stops = known.stop_str or ()
    strings = (stops,) if isinstance(stops, str) else tuple(stops)
    return Template(name, partial(_render_by_fastchat, known), False, strings, tuple(known.stop_token_ids or ()))


def _render_by_fastchat(known: "FastChatConversation", messages: Sequence[Message], ask: bool) -> str:
    chat = known.copy()
    for message in messages:
        if message["role"] == "system":
            chat.set_system_message(message["content"])
        else:
            chat.append_message(chat.roles[message["role"] == "assistant"], message["content"])
    if ask:
        chat.append_message(chat.roles[1], None)
    return str(chat.get_prompt())


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint directory; anything missing or unreadable raises `CatsError`."""
    if not Path(directory).is_dir():
        raise CatsError(f"there is no directory {directory}; give the path of a checkpoint directory.")
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CatsError(f"cannot load the tokenizer in {directory}: {str(error).strip().splitlines()[0]}") from error
    return tokenizer


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a checkpoint directory holds the files of a tokenizer."""
    return any((Path(directory) / name).exists() for name in TOKENIZER_FILES)


def listed_end_ids(directory: str | Path) -> tuple[int, ...]:
    """The end tokens that generation_config.json and config.json list, those of both."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        said = _fields(Path(directory) / name).get("eos_token_id")
        listed = said if isinstance(said, list) else [] if said is None else [said]
        if not all(isinstance(token, int) for token in listed):
            raise CatsError(f"{Path(directory) / name} has the eos_token_id {said!r}, which is no token id; mend or fetch the file again.")
        ids.update(listed)
    return tuple(sorted(ids))


def is_vicuna(directory: str | Path) -> bool:
    """Whether a checkpoint is a Vicuna: a Llama whose directory, hub id or configuration is called so."""
    config = _fields(Path(directory) / "config.json")
    names = (checkpoint_name(directory), str(config.get("_name_or_path", "")).rpartition("/")[2])
    return config.get("model_type") == "llama" and any("vicuna" in name.lower() for name in names)


def checkpoint_name(directory: str | Path) -> str:
    """The last part of a directory's path; in a cache of the hub, the hub's name of the model."""
    path = Path(os.path.abspath(directory))
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def _fields(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise CatsError(f"cannot read {path}: {error}; fetch the checkpoint again.") from error
    if not isinstance(fields, dict):
        raise CatsError(f"cannot read {path}: it holds a JSON {type(fields).__name__}, not an object; fetch the checkpoint again.")
    return fields


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}: {error}; fetch or name it again.") from error
