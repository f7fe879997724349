"""Chat templates: a conversation so far as the prompt ids that ask for the next answer, and answer ids as text.

Knows FastChat's templates and a transformers tokenizer; knows no model. The template is named by FastChat's name, or is
the tokenizer's own (`TOKENIZER_TEMPLATE`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cats.errors import CatsError
from training.conversations import chat_template

TOKENIZER_TEMPLATE = "tokenizer"
RECOGNISED = ("vicuna_v1.1", "llama-2")
NAMES_IN_PATHS = {"vicuna": "vicuna_v1.1", "llama-2": "llama-2", "llama2": "llama-2"}
PROBE = (("first question", "second question"), ("first answer",))


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory; anything missing or unreadable raises `CatsError`."""
    if not Path(model_path).is_dir():
        raise CatsError(f"there is no directory {model_path}; give the path of a checkpoint directory.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model_path))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CatsError(f"cannot load the tokenizer in {model_path}: {str(error).strip().splitlines()[0]}") from error
    return tokenizer


class Chat:
    """Turns questions and answers into prompts in one template.

    Attributes:
        template: FastChat's name, or "tokenizer".
        stop_strings: texts that end an answer in this template, beyond the model's own end token.
        stop_token_ids: tokens that do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        if template == TOKENIZER_TEMPLATE and not tokenizer.chat_template:
            raise CatsError("the tokenizer has no chat template of its own; name one of FastChat's by --template, vicuna_v1.1 for example.")
        self.tokenizer = tokenizer
        self.template = template
        named = None if template == TOKENIZER_TEMPLATE else chat_template(template)
        stops = (named.stop_str or ()) if named else ()
        self.stop_strings: tuple[str, ...] = (stops,) if isinstance(stops, str) else tuple(stops)
        self.stop_token_ids: tuple[int, ...] = tuple((named.stop_token_ids or ()) if named else ())

    def prompt_ids(self, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
        """Ids that ask for the answer to the last of `turns`; `answers` are those to the turns before it. At most one BOS in front."""
        text = render(self.tokenizer, self.template, turns, answers)
        bos = self.tokenizer.bos_token
        own_specials = self.template == TOKENIZER_TEMPLATE or bool(bos and text.startswith(bos))
        ids = [int(token) for token in self.tokenizer(text, add_special_tokens=not own_specials)["input_ids"]]
        while bos and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The answer as text: without special tokens, cut at the template's stop string, stripped."""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        for stop in self.stop_strings:
            text = text.split(stop)[0]
        return text.strip()


def render(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[str], answers: Sequence[str]) -> str:
    """The conversation as the text that precedes the next answer, in a FastChat template or the tokenizer's own."""
    if template == TOKENIZER_TEMPLATE:
        return _render_by_tokenizer(tokenizer, turns, answers)
    chat = chat_template(template)
    for place, turn in enumerate(turns):
        chat.append_message(chat.roles[0], turn)
        chat.append_message(chat.roles[1], answers[place] if place < len(answers) else None)
    return str(chat.get_prompt())


def _render_by_tokenizer(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], answers: Sequence[str]) -> str:
    messages: list[dict[str, Any]] = []
    for place, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn})
        if place < len(answers):
            messages.append({"role": "assistant", "content": answers[place]})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def default_template(tokenizer: PreTrainedTokenizerBase, model_path: str | Path) -> str:
    """The template that a checkpoint is meant for.

    What the checkpoint says of itself comes first: where the tokenizer's chat template writes exactly what a known FastChat
    template writes, that name, else "tokenizer". Checkpoints that say nothing, as Vicuna's do, are known by their path.
    """
    if tokenizer.chat_template:
        own = _without_bos(tokenizer, _render_by_tokenizer(tokenizer, *PROBE))
        same = [name for name in RECOGNISED if _without_bos(tokenizer, render(tokenizer, name, *PROBE)) == own]
        return same[0] if same else TOKENIZER_TEMPLATE
    named = [template for part, template in NAMES_IN_PATHS.items() if part in Path(model_path).resolve().as_posix().lower()]
    if not named:
        raise CatsError(f"the checkpoint {model_path} does not say its chat template; name one by --template, vicuna_v1.1 for example.")
    return named[0]


def _without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return text.removeprefix(tokenizer.bos_token or "").strip()
