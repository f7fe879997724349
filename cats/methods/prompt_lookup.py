"""Prompt lookup (Saxena 2023): the text so far proposes what followed its last n-gram the last time. No model, no cost."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cats.config import MethodConfig
from cats.methods.base import Method, Preset
from cats.planning.cost import Passes, Work

if TYPE_CHECKING:
    from cats.state import Cycle, DecodeState


@dataclass(frozen=True)
class PromptLookupConfig(MethodConfig):
    """Prompt lookup: the last n-gram of up to `max_ngram` tokens, found earlier in the text, continued by `continuation` tokens."""

    max_ngram: int = field(default=3, metadata={"help": "longest n-gram looked up in the text so far", "lowest": 1})
    continuation: int = field(default=10, metadata={"help": "tokens taken from behind the match", "lowest": 1})

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        return f"prompt lookup, {self.continuation} tokens"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`."""
        return passes.target(nodes, layers)


class NgramIndex:
    """Where every n-gram of up to `longest` tokens last ended, grown as text is appended; the newest end is held back.

    An n-gram is only found where something follows it, so the one that ends the text is entered with the next token.
    """

    def __init__(self, longest: int):
        self._longest, self._indexed = longest, 0
        self._ends: dict[tuple[int, ...], int] = {}

    def continuation(self, tokens: list[int], count: int, ahead: list[int] | None = None) -> list[int]:
        """The tokens of `matched`."""
        return self.matched(tokens, count, ahead)[0]

    def matched(self, tokens: list[int], count: int, ahead: list[int] | None = None) -> tuple[list[int], int]:
        """Up to `count` tokens that followed the latest earlier occurrence of the longest known last n-gram, and the n-gram's length.

        Args:
            ahead: drafted tokens that the n-gram ends with; they are not entered.
        """
        for end in range(self._indexed + 1, len(tokens)):
            for size in range(1, min(self._longest, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        last = tokens[-self._longest :] + (ahead or [])
        for size in range(min(self._longest, len(last)), 0, -1):
            start = self._ends.get(tuple(last[-size:]))
            if start is not None:
                return [*tokens[start : start + count], *(ahead or [])][:count], size
        return [], 0


class PromptLookup(Method):
    """A chain copied from what followed the text's last n-gram earlier."""

    name = "prompt_lookup"
    Config = PromptLookupConfig
    presets = {"prompt_lookup": Preset(PromptLookupConfig(), "prompt lookup")}
    shapes = {"prompt-lookup": PromptLookupConfig(max_ngram=2, continuation=5)}
    config: PromptLookupConfig

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.config.continuation + 1

    def start(self, state: "DecodeState") -> None:
        """See `Method`."""
        self._index = NgramIndex(self.config.max_ngram)

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        with cycle.stage("draft"):
            nodes = [0]
            for token in self._index.continuation(cycle.state.tokens, min(self.config.continuation, cycle.depth_limit)):
                nodes.append(cycle.tree.add(nodes[-1], token, "lookup"))
            return nodes
