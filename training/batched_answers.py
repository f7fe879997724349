"""Answers to many prompts at once, by plain decoding of the base model: prompts padded on the left, one forward per new token.

All supported kinds of rotary embedding see only differences of positions, so a padded row computes what it would
compute alone, up to rounding. Rows are sampled with random numbers of their own, whatever else is in the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import Cache

from cats.earlyexit import EarlyExitLlamaForCausalLM

CROWDED = 0.75  # rows that have ended are taken out of the batch when no more than this share is left


@dataclass
class Request:
    """One prompt and, later, its answer.

    Attributes:
        prompt: token ids.
        seed: of the random numbers with which this answer is sampled.
        answer: new token ids, the end token included.
        ended: whether an end token was written; else the answer was cut off at its length or at the end of the context.
    """

    prompt: list[int]
    seed: Sequence[int]
    answer: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. Temperature 0 is greedy; `top_p` keeps the smallest set of tokens with that probability."""

    temperature: float
    top_p: float

    def tokens(self, logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        """Token ids [B]; `uniform_B` holds one random number in [0, 1) per row, unused when greedy."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        chances_BV = (logits_BV.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            sorted_BV, order_BV = chances_BV.sort(-1, descending=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p
            chances_BV = chances_BV.scatter(-1, order_BV, sorted_BV.masked_fill(beyond_BV, 0.0))
        total_BV = chances_BV.double().cumsum(-1)
        below_B1 = (uniform_B.to(total_BV) * total_BV[:, -1])[:, None]
        return torch.searchsorted(total_BV, below_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)[:, 0]


class RowsCache(Cache):
    """Keys and values of B rows that advance together; slot t holds position t of every row."""

    def __init__(self, layers: int, capacity: int):
        super().__init__(layers=[])
        self.capacity, self.length = capacity, 0
        self.blocks: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new entries [B, heads, T, width] of a layer behind the `length` there are; return all of them."""
        end = self.length + key_states.shape[2]
        block = self.blocks[layer_idx]
        if block is None:
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[3])
            block = self.blocks[layer_idx] = (key_states.new_zeros(shape), value_states.new_zeros(shape))
        for stored, new in zip(block, (key_states, value_states), strict=True):
            stored[:, :, self.length : end] = new
        return block[0][:, :, :end], block[1][:, :, :end]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all rows but these."""
        self.blocks = [None if block is None else (block[0][rows], block[1][rows]) for block in self.blocks]


class Batch:
    """Some requests being answered together."""

    def __init__(self, base: EarlyExitLlamaForCausalLM, requests: Sequence[Request], max_new_tokens: int, ends: Sequence[int]):
        self.base, self.requests, self.limit, self.ends = base, list(requests), max_new_tokens, frozenset(ends)
        longest = max(len(request.prompt) for request in requests)
        self.cache = RowsCache(base.layer_count, longest + max_new_tokens)
        self.padding_B = torch.tensor([longest - len(request.prompt) for request in requests], device=base.device)
        self.uniform_BN = torch.from_numpy(np.stack([np.random.default_rng(each.seed).random(max_new_tokens) for each in requests]))

    def run(self, choice: Choice, on_tokens: Callable[[int], object]) -> None:
        """Answer every request."""
        ids_BT = torch.tensor([[0] * int(pad) + each.prompt for pad, each in zip(self.padding_B, self.requests, strict=True)])
        for place in range(self.limit):
            logits_BV = self.forward(ids_BT.to(self.base.device))
            tokens = choice.tokens(logits_BV, self.uniform_BN[:, place]).tolist()
            on_tokens(sum(not request.ended for request in self.requests))
            for request, token in zip(self.requests, tokens, strict=True):
                if not request.ended:
                    request.answer.append(token)
                    request.ended = token in self.ends
            tokens = self.drop_ended(tokens)
            if all(request.ended for request in self.requests):
                return
            ids_BT = torch.tensor(tokens)[:, None]

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after the given tokens, which are the next T positions of every row."""
        start, end = self.cache.length, self.cache.length + ids_BT.shape[1]
        slots_S = torch.arange(end, device=self.base.device)
        positions_T = slots_S[start:]
        # A padding query sees itself, since a row that sees nothing would turn into NaN; no real query sees padding.
        hidden_BTS = (slots_S > positions_T[:, None]) | ((slots_S < self.padding_B[:, None, None]) & (slots_S != positions_T[:, None]))
        bias = torch.zeros(hidden_BTS.shape, dtype=self.base.dtype, device=self.base.device).masked_fill_(hidden_BTS, float("-inf"))
        states = self.base.forward_draft_or_large_model(
            input_ids=ids_BT,
            past_key_values=self.cache,  # type: ignore[arg-type]
            attention_mask=bias[:, None],
            positions_T=positions_T,
        )
        self.cache.length = end
        return self.base.target_logits(states[:, -1])

    def drop_ended(self, tokens: list[int]) -> list[int]:
        """Take out the rows that have ended, once they crowd the batch; returns the tokens of the rows that stay."""
        rows = [row for row, request in enumerate(self.requests) if not request.ended]
        if not rows or len(rows) > CROWDED * len(self.requests):
            return tokens
        index = torch.tensor(rows, device=self.base.device)
        self.cache.keep_rows(index)
        self.padding_B, self.uniform_BN = self.padding_B[index], self.uniform_BN[rows]
        self.requests = [self.requests[row] for row in rows]
        return [tokens[row] for row in rows]


@torch.inference_mode()
def answer_all(
    base: EarlyExitLlamaForCausalLM,
    requests: Sequence[Request],
    choice: Choice,
    max_new_tokens: int,
    ends: Sequence[int],
    rows: int,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> None:
    """Fill in the answers of all requests, `rows` at a time, those of similar length together.

    A prompt that may reach the end of the context is answered alone, since padding would take positions from it. Prompts
    must be shorter than the context. `on_tokens` is called after every forward with the number of tokens it gave.
    """
    by_length = sorted(requests, key=lambda request: len(request.prompt))
    roomy = [request for request in by_length if len(request.prompt) + max_new_tokens <= base.context]
    for start in range(0, len(roomy), rows):
        Batch(base, roomy[start : start + rows], max_new_tokens, ends).run(choice, on_tokens)
    for request in by_length[len(roomy) :]:
        Batch(base, [request], base.context - len(request.prompt), ends).run(choice, on_tokens)
