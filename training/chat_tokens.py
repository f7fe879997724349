"""Conversations as token ids with a mask of the answer tokens, for any fast tokenizer. Knows no model.

The mask comes from character offsets, never from searching for separator tokens, so it holds for every tokenizer:
a token belongs to an answer when all its characters lie inside an answer span of the rendered conversation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.text import ModelText, Rendered
from training.conversations import Conversation

BATCH = 512


@dataclass(frozen=True)
class ChatTokens:
    """One tokenized conversation: `ids_N` (int32) and `answer_N` (bool, true where the assistant wrote the token)."""

    ids_N: np.ndarray
    answer_N: np.ndarray


def training_text(model_path: str | Path, template: str | None) -> ModelText:
    """Tokenizer and chat template of a checkpoint; a slow tokenizer, or no template, raises `CatsError`: offsets need a fast one."""
    text = ModelText.from_pretrained(model_path, template)
    if not text.tokenizer.is_fast:
        raise CatsError(f"the tokenizer of {model_path} is not a fast one; the loss mask needs character offsets, so convert it first.")
    _ = text.template  # `CatsError` where there is none
    return text


def encode_chats(text: ModelText, chats: Sequence[Conversation], longest: int) -> list[ChatTokens]:
    """Tokenize conversations, cut at `longest` tokens; conversations left without an answer token are kept (mask all false)."""
    encoded: list[ChatTokens] = []
    for start in live_bar(range(0, len(chats), BATCH), desc="tokenize", unit="batch", leave=False):
        rendered = [_rendered(text, chat) for chat in chats[start : start + BATCH]]
        specials = text.adds_specials(rendered[0].text)
        encodings = text.tokenizer.backend_tokenizer.encode_batch([chat.text for chat in rendered], add_special_tokens=specials)
        encoded.extend(_cut(text.tokenizer, chat, encoding, longest) for chat, encoding in zip(rendered, encodings, strict=True))
    return encoded


def _rendered(text: ModelText, chat: Conversation) -> Rendered:
    try:
        return text.rendered(chat.messages, chat.unfinished)
    except CatsError as error:
        raise CatsError(f"conversation {chat.id}: {error}") from error


def _cut(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, encoding: Encoding, longest: int) -> ChatTokens:
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
