"""Rows for adapter training behind one small interface: text run through the frozen base now, or states stored before.

A `RowSource` has a length and gives a `Batch` for any list of row numbers; the order of rows is decided elsewhere
(`row_order`), from the seed alone, so that a resumed run sees the rows that the straight run would have seen.
Stored states are in stored_states.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.errors import CatsError
from training.chat_tokens import ChatTokens

SORTED_BATCHES = 32


@dataclass(frozen=True)
class BestTokens:
    """The base's K most likely next tokens `indices` [.., K] and their probabilities [.., K], best first; 0 where nothing is predicted."""

    probabilities: torch.Tensor
    indices: torch.Tensor

    def logits(self, vocabulary: int) -> torch.Tensor:
        """Logits [.., V] of these probabilities, with what is left spread evenly over the other tokens."""
        kept = self.probabilities.float()
        rest = (1 - kept.sum(-1, keepdim=True)).clamp(min=1e-6) / max(1, vocabulary - kept.shape[-1])
        return rest.log().expand(*kept.shape[:-1], vocabulary).scatter(-1, self.indices.long(), kept.log())


@dataclass(frozen=True)
class Batch:
    """B rows of up to N positions: `hidden` per exit layer [B, N, D], and what the base makes of them.

    That is `final`, the states that leave the last layer, before the final norm [B, N, D], or where it is None `best`, its
    most likely tokens [B, N, K]. `counted_BN` is true where the token counts in the loss: answer tokens, or all tokens; never
    padding. `ids_BN` are the tokens themselves, 0 in padding, where the source has them.
    """

    hidden: dict[int, torch.Tensor]
    final: torch.Tensor | None
    counted_BN: torch.Tensor
    best: BestTokens | None = None
    ids_BN: torch.Tensor | None = None


class RowSource(Protocol):
    """Where batches come from."""

    exits: tuple[int, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows, padded on the right to the longest of them."""
        ...


def row_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of `count` rows that depends on seed and epoch only."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_order(lengths: np.ndarray, rows: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of rows, to be cut into batches of `rows`, of which each holds rows of nearly equal length, so that little is padded.

    Rows are shuffled, sorted by length within stretches of `SORTED_BATCHES` batches, and the batches are shuffled again. The last batch,
    perhaps a smaller one, stays the last. Depends on lengths, seed and epoch only.
    """
    order = row_order(len(lengths), epoch, seed)
    stretch = SORTED_BATCHES * rows
    stretches = (order[start : start + stretch] for start in range(0, len(order), stretch))
    order = np.concatenate([rows_of[np.argsort(lengths[rows_of], kind="stable")] for rows_of in stretches])
    whole = len(order) // rows
    shuffled = np.random.default_rng([seed, epoch, rows]).permutation(whole)
    return np.concatenate([order[: whole * rows].reshape(whole, rows)[shuffled].reshape(-1), order[whole * rows :]])


@dataclass(frozen=True)
class TokenRows:
    """Rows cut from one stream of tokens: row r is `ids[starts[r] : starts[r] + lengths[r]]`."""

    ids: np.ndarray
    counted: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def padded(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """`ids_BN` (int64, padded with 0) and `counted_BN` (bool) of the given rows."""
        longest = int(self.lengths[rows].max())
        ids_BN = torch.zeros(len(rows), longest, dtype=torch.int64)
        counted_BN = torch.zeros(len(rows), longest, dtype=torch.bool)
        for place, row in enumerate(rows):
            span = slice(self.starts[row], self.starts[row] + self.lengths[row])
            ids_BN[place, : self.lengths[row]] = torch.from_numpy(self.ids[span].astype(np.int64))
            counted_BN[place, : self.lengths[row]] = torch.from_numpy(self.counted[span])
        return ids_BN, counted_BN


def token_rows(chats: Sequence[ChatTokens], length: int, packed: bool, every_token: bool) -> TokenRows:
    """Cut tokenized conversations into rows of at most `length` tokens; rows in which no token counts are left out.

    Args:
        packed: conversations follow each other in one stream that is cut every `length` tokens (no padding; a row may
            hold parts of several); otherwise each conversation is one row, cut at `length`.
        every_token: count all tokens but the first of each conversation, not only those of answers.
    """
    masks = [np.arange(len(chat.ids_N)) > 0 if every_token else chat.answer_N for chat in chats]
    ids = np.concatenate([chat.ids_N for chat in chats]) if chats else np.zeros(0, dtype=np.int32)
    counted = np.concatenate(masks) if masks else np.zeros(0, dtype=bool)
    sizes = np.asarray([len(chat.ids_N) for chat in chats], dtype=np.int64)
    if packed:
        starts = np.arange(0, len(ids), length)
        lengths = np.minimum(length, len(ids) - starts)
    else:
        starts, lengths = np.cumsum(sizes) - sizes, np.minimum(sizes, length)
    useful = np.asarray([counted[start + 1 : start + size].any() for start, size in zip(starts, lengths, strict=True)], dtype=bool)
    if not useful.any():
        raise CatsError(f"no answer token lies within the first {length} tokens of any row; raise --length or give other conversations.")
    return TokenRows(ids, counted, starts[useful], lengths[useful])


class TextSource:
    """Rows of text; one forward of the frozen base per batch gives the states of all exits and of the last layer."""

    def __init__(self, rows: TokenRows, base: EarlyExitLlamaForCausalLM, exits: Sequence[int]):
        self.rows, self.base, self.exits = rows, base, tuple(exits)

    @property
    def lengths(self) -> np.ndarray:
        """See `RowSource`."""
        return self.rows.lengths

    def __len__(self) -> int:
        return len(self.rows.starts)

    def batch(self, rows: np.ndarray) -> Batch:
        """See `RowSource`. Padding stands on the right, so causal attention never sees it."""
        ids_BN, counted_BN = self.rows.padded(rows)
        last = self.base.layer_count
        ids_BN = ids_BN.to(self.base.device)
        with torch.inference_mode():
            states = self.base.hidden_states(ids_BN, (*self.exits, last))
        # Copies, because autograd refuses to save tensors made under inference mode; `final` needs no gradient.
        hidden = {exit_layer: states[exit_layer].clone() for exit_layer in self.exits}
        return Batch(hidden, states[last], counted_BN.to(self.base.device), ids_BN=ids_BN)
