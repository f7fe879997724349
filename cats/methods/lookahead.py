"""Lookahead decoding (Fu et al. 2024): the model guesses several positions ahead in the pass that verifies, and its guesses become n-grams.

The Jacobi window holds W columns and N - 1 levels of guessed tokens. Level 0 is a chain behind the root, which is its first column; a cell
of a higher level stands below the one above it in its column, one position further on:

    level 0    root  a1  a2  a3        a2 sees root, a1; positions +0 +1 +2 +3
    level 1     b0   b1  b2  b3        b2 sees root, a1, a2; position +3
    level 2     c0   c1  c2  c3        c2 sees root, a1, a2, b2; position +4
    new         d0   d1  d2  d3        what the target says at level 2

In every pass all cells run as probes: each is a better guess of its own place the next time. A column read downwards is an n-gram (a2, b2,
c2, d2) that the model itself wrote; the pool keeps the G latest of every first token, and those of the root are verified as branches. Then
the oldest level leaves, and the window moves on by one position, however many tokens were accepted (as the published code does).
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cats.acceptance import Verdict
from cats.config import MethodConfig
from cats.methods.base import Method, Preset
from cats.planning.cost import Passes, Work
from cats.tree import TokenTree

if TYPE_CHECKING:
    from cats.state import Cycle, DecodeState


@dataclass(frozen=True)
class LookaheadConfig(MethodConfig):
    """Lookahead: W, N and G of the paper, which uses 7, 5 and 7 for a 7B model."""

    window: int = field(default=7, metadata={"help": "columns of the Jacobi window (W)", "lowest": 1})
    levels: int = field(default=5, metadata={"help": "length of an n-gram (N); the window has one level less", "lowest": 3})
    guesses: int = field(
        default=7, metadata={"help": "n-grams kept of every first token, and verified in a pass, at most (G)", "lowest": 1}
    )
    pool_from_prompt: bool = field(
        default=False, metadata={"help": "enter the n-grams of prompt and answer into the pool as well, as prompt lookup would find them"}
    )

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`; the window's cells are among the nodes."""
        return passes.target(nodes, layers)


class NgramPool:
    """What may follow a token: the `per_key` n-grams entered last, for every first token."""

    def __init__(self, per_key: int):
        self._per_key = per_key
        self._rests: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, first: int, rest: tuple[int, ...]) -> None:
        """Enter an n-gram; one that is there already becomes the newest."""
        rests = self._rests.setdefault(first, {})
        rests.pop(rest, None)
        rests[rest] = None
        if len(rests) > self._per_key:
            del rests[next(iter(rests))]

    def after(self, first: int) -> list[tuple[int, ...]]:
        """What was entered behind `first`, the oldest in front."""
        return list(self._rests.get(first, ()))


class JacobiWindow:
    """Guessed tokens by level and column; see the module.

    It begins as one long chain of picked tokens and gains a level a pass while it moves on, until there are `levels` - 1.

    Attributes:
        rows: level 0 without the root, then the levels below it, each as long as level 0 with the root. Empty: nothing fits any more.
        last: nodes of the lowest level in the tree of this step, column by column; empty where none were placed.
    """

    def __init__(self, width: int, levels: int, pick: Callable[[], int]):
        self._levels = levels
        self.rows = [[pick() for _ in range(width + levels - 3)]]
        self.last: list[int] = []

    @staticmethod
    def most_cells(width: int, levels: int) -> int:
        """Cells that it ever has at once."""
        chains = [(width + levels - 3 - filled, filled) for filled in range(levels - 1)]
        return max(chain + below * (chain + 1) for chain, below in chains)

    def place(self, tree: TokenTree, depth_limit: int) -> None:
        """Add the cells to the tree as probes; columns that would reach below `depth_limit` are dropped for good."""
        self.last = []
        chain = min(len(self.rows[0]), depth_limit - len(self.rows) + 1) if self.rows else -1
        if chain < 0:
            self.rows = []
            return
        self.rows = [self.rows[0][:chain], *(row[: chain + 1] for row in self.rows[1:])]
        above = [0]
        for token in self.rows[0]:
            above.append(tree.add_probe(above[-1], token))
        for row in self.rows[1:]:
            above = [tree.add_probe(parent, token) for parent, token in zip(above, row, strict=True)]
        self.last = above

    def advance(self, root: int, new: list[int]) -> Iterable[tuple[int, tuple[int, ...]]]:
        """Take in what the target says after the lowest level, and move on; the n-grams (first token, the others) that are complete."""
        if len(self.rows) < self._levels - 1:
            self.rows = [row[1:] for row in (*self.rows, new)]
            return []
        below = [*self.rows[1:], new]
        ngrams = list(zip([root, *self.rows[0]], zip(*below, strict=True), strict=True))
        self.rows = [self.rows[1][1:], *self.rows[2:], new]
        return ngrams


class Lookahead(Method):
    """The model's own guesses at the positions ahead, made in the pass that verifies, become n-grams to verify."""

    name = "lookahead"
    Config = LookaheadConfig
    presets = {
        "lookahead": Preset(LookaheadConfig(), "Lookahead"),
        "lookahead_prompt": Preset(LookaheadConfig(pool_from_prompt=True), "Lookahead, pool from the prompt"),
    }
    shapes = {
        "lookahead": LookaheadConfig(window=3, levels=4, guesses=2),
        "lookahead-prompt": LookaheadConfig(window=2, levels=3, guesses=3, pool_from_prompt=True),
    }
    config: LookaheadConfig

    @property
    def max_nodes(self) -> int:
        """Root, window and guesses."""
        config = self.config
        return 1 + JacobiWindow.most_cells(config.window, config.levels) + config.guesses * (config.levels - 1)

    def start(self, state: "DecodeState") -> None:
        """See `Method`. The window begins with tokens of the prompt, drawn with a fixed seed."""
        self._prompt, self._pick, self._entered = list(state.tokens), random.Random(0), 0
        self._ends = frozenset(state.model.end_token_ids or ())
        self.pool = NgramPool(self.config.guesses)
        self.window = JacobiWindow(self.config.window, self.config.levels, self._picked)

    def _picked(self) -> int:
        return self._pick.choice(self._prompt)

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        with cycle.stage("draft"):
            if self.config.pool_from_prompt:
                self._enter(cycle.state.tokens)
            for ngram in self.pool.after(cycle.tree.tokens[0]):
                parent = 0
                for token in ngram[: cycle.depth_limit]:
                    parent = cycle.tree.add(parent, token, "lookup")
            self.window.place(cycle.tree, cycle.depth_limit)
            return range(len(cycle.tree))

    def _enter(self, text: list[int]) -> None:
        """The n-grams of the text that are new."""
        length = self.config.levels
        for begin in range(self._entered, len(text) - length + 1):
            self.pool.add(text[begin], tuple(text[begin + 1 : begin + length]))
        self._entered = max(self._entered, len(text) - length + 1)

    def observe(self, cycle: "Cycle", nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        """See `Method`. End tokens do not stay in the window: what follows on them is nothing that the model writes."""
        if not self.window.last:
            return
        row_of = {node: row for row, node in enumerate(nodes)}
        rows = torch.tensor([row_of[node] for node in self.window.last], device=logits_TV.device)
        said = logits_TV[rows].argmax(dim=-1).tolist()
        for first, rest in self.window.advance(cycle.tree.tokens[0], said):
            self.pool.add(first, rest)
        self.window.rows[-1] = [self._picked() if token in self._ends else token for token in self.window.rows[-1]]
