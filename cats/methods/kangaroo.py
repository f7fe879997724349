"""Kangaroo (Liu et al. 2024): one adapter on an early exit drafts a chain that ends where its confidence does."""

from collections.abc import Sequence

from cats.config import KangarooConfig
from cats.methods.base import Method
from cats.methods.chain import draft_chain
from cats.state import Cycle


class Kangaroo(Method):
    """The target resumes from the exit states of the drafted tokens."""

    adapters = ("draft",)

    def __init__(self, config: KangarooConfig):
        self.config = config

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.config.steps + 1

    def propose(self, cycle: Cycle) -> Sequence[int]:
        """See `Method`."""
        with cycle.stage("draft"):
            return draft_chain(cycle, "draft", 0, self.config.steps, self.config.threshold, topk=1).nodes
