"""Conversations as token ids with a mask of the answer tokens, for any fast tokenizer. Knows no model.

The mask comes from character offsets, never from searching for separator tokens, so it holds for every tokenizer:
a token belongs to an answer when all its characters lie inside an answer span of the rendered conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cats.cli.progress import live_bar
from cats.errors import CatsError
from training.conversations import Conversation, Rendered, Renderer, fastchat_renderer, jinja_renderer

FASTCHAT_BY_NAME = (("vicuna", "vicuna_v1.1"), ("llama-2", "llama-2"), ("llama2", "llama-2"))
BATCH = 512


@dataclass(frozen=True)
class ChatTokens:
    """One tokenized conversation: `ids_N` (int32) and `answer_N` (bool, true where the assistant wrote the token)."""

    ids_N: np.ndarray
    answer_N: np.ndarray


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerFast:
    """The model's fast tokenizer; a missing or slow one raises `CatsError`, since offsets need a fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise CatsError(f"no tokenizer can be loaded from {model_path}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CatsError(f"the tokenizer of {model_path} is not a fast one; the loss mask needs character offsets, so convert it first.")
    return tokenizer


def renderer_for(tokenizer: PreTrainedTokenizerFast, model_path: str | Path, template: str | None) -> Renderer:
    """The named FastChat template; else the tokenizer's own ("tokenizer" asks for it); else the one known for the model's name."""
    if template and template != "tokenizer":
        return fastchat_renderer(template)
    if tokenizer.chat_template:
        return jinja_renderer(lambda messages, ask: str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)))
    for part, name in FASTCHAT_BY_NAME if template is None else ():
        if part in str(model_path).lower():
            return fastchat_renderer(name)
    raise CatsError(f"{model_path} has no chat template of its own; name a FastChat one with --template (for example vicuna_v1.1).")


def encode_chats(tokenizer: PreTrainedTokenizerFast, renderer: Renderer, chats: Sequence[Conversation], longest: int) -> list[ChatTokens]:
    """Tokenize conversations, cut at `longest` tokens; conversations left without an answer token are kept (mask all false)."""
    encoded: list[ChatTokens] = []
    for start in live_bar(range(0, len(chats), BATCH), desc="tokenize", unit="batch", leave=False, disable=len(chats) < BATCH):
        rendered = [without_bos(renderer(chat), tokenizer.bos_token) for chat in chats[start : start + BATCH]]
        encodings = tokenizer.backend_tokenizer.encode_batch([chat.text for chat in rendered])
        encoded.extend(_cut(tokenizer, chat, encoding, longest) for chat, encoding in zip(rendered, encodings, strict=True))
    return encoded


def without_bos(rendered: Rendered, bos: str | None) -> Rendered:
    """Drop a beginning-of-sequence marker that the template wrote, since the tokenizer adds its own."""
    if not bos or not rendered.text.startswith(bos):
        return rendered
    size = len(bos)
    return Rendered(rendered.text[size:], tuple((start - size, end - size) for start, end in rendered.answers))


def _cut(tokenizer: PreTrainedTokenizerFast, rendered: Rendered, encoding: Encoding, longest: int) -> ChatTokens:
    ids = np.asarray(encoding.ids[:longest], dtype=np.int32)
    offsets = np.asarray(encoding.offsets[:longest], dtype=np.int64).reshape(-1, 2)
    answer = inside(offsets, rendered.answers)
    markers = [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id]
    return ChatTokens(ids, answer & ~np.isin(ids, markers))


def inside(offsets_N2: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, given as character ranges, lie entirely inside one of the ordered disjoint spans. Shape [N], bool."""
    if not spans:
        return np.zeros(len(offsets_N2), dtype=bool)
    starts, ends = np.asarray(spans, dtype=np.int64).T
    place = np.searchsorted(starts, offsets_N2[:, 0], side="right") - 1
    end = ends[np.maximum(place, 0)]
    return (place >= 0) & (offsets_N2[:, 0] < end) & (offsets_N2[:, 1] <= end)
