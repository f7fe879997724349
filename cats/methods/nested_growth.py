"""The tree that the coarse form of a model grows: a trunk, and branches where it doubts, all in the same passes.

Each round is one pass of the coarse form over the trunk's last node, over what somebody proposed to follow it, and over the last node of
every branch. Branches leave the trunk at the `siblings` places of smallest margin so far. A branch whose place is no longer one of them is
given up, so that in the end those of the smallest margins of all are there, as long as if they had been known from the start.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from cats.planning.plan import COARSE

if TYPE_CHECKING:
    from cats.methods.pacing import Pacing
    from cats.state import Cycle

PROPOSED = 8
"""Tokens that are proposed to the coarse form at a time."""
Proposer = Callable[["Cycle", Sequence[int], int], list[int]]
"""Adds a chain of up to so many nodes behind the last node of a path."""
Best = tuple[int, int, float]
"""The coarse form's best token after a node, its second best, and by how much it prefers the former."""


class Growth:
    """The tree of one cycle while it grows.

    Args:
        depth: of the deepest node.
        siblings: branches at a time.
        reach: nodes of a branch, at most.
        spare: proposed nodes that may be dropped; after so many the coarse form drafts alone.
        proposer: None: the coarse form drafts alone.

    Attributes:
        trunk: from the root on.
        branches: nodes by the trunk node that they leave.
        rounds: passes so far.
    """

    def __init__(self, cycle: "Cycle", depth: int, siblings: int, reach: int, spare: int, proposer: Proposer | None):
        self.cycle, self.tree = cycle, cycle.tree
        self.depth, self.siblings, self.reach, self.spare, self.proposer = depth, siblings, reach, spare, proposer
        self.trunk = [0]
        self.branches: dict[int, list[int]] = {}
        self.rounds = 0
        self._best: dict[int, Best] = {}

    @property
    def grows(self) -> bool:
        """Whether the trunk is not yet as long as it may be."""
        return len(self.trunk) <= self.depth

    @property
    def nodes(self) -> list[int]:
        """Trunk and branches, in ascending order."""
        return sorted([*self.trunk, *(node for branch in self.branches.values() for node in branch)])

    @property
    def trunk_margins(self) -> list[tuple[int, float]]:
        """Every node of the trunk but the root, and by how much the coarse form preferred its token."""
        return [(node, self._best[before][2]) for before, node in pairwise(self.trunk)]

    def chance(self, pacing: "Pacing") -> float:
        """Chance that the exact model takes the whole trunk, or the whole of a branch that still grows."""
        above = 1.0
        total, places = 0.0, {}
        for node in self.trunk:
            places[node] = above
            if node in self._best:
                above *= pacing.agreement(self._best[node][2])
        total = above
        for node, branch in self.branches.items():
            if self._open(branch):
                followed = math.prod(pacing.agreement(self._best[place][2]) for place in branch[:-1])
                total += places[node] * pacing.second(self._best[node][2]) * followed
        return total

    def grow(self) -> None:
        """One pass of the coarse form, and what it adds."""
        rows = [self.trunk[-1], *self._proposed()]
        tips = [branch[-1] for branch in self.branches.values() if self._open(branch)]
        self._look(rows + tips)
        self._follow(rows)
        self._branch(set(tips))
        self.rounds += 1

    def _open(self, branch: Sequence[int]) -> bool:
        return len(branch) < self.reach and self.tree.depths[branch[-1]] < self.depth

    def _proposed(self) -> list[int]:
        """Nodes proposed behind the trunk; the last place is left to what the coarse form says behind them."""
        count = min(PROPOSED, self.depth - len(self.trunk), self.spare)
        return self.proposer(self.cycle, self.trunk, count) if self.proposer is not None and count > 0 else []

    def _look(self, nodes: list[int]) -> None:
        """Ask the coarse form what follows on these nodes."""
        best = self.cycle.target_logits(nodes, COARSE).float().topk(2)
        for node, (first, second), (high, low) in zip(nodes, best.indices.tolist(), best.values.tolist(), strict=True):
            self._best[node] = (first, second, high - low)

    def _follow(self, rows: Sequence[int]) -> None:
        """Take what was proposed as far as the coarse form says the same, and then its own token."""
        for place, node in enumerate(rows):
            token, proposed = self._best[node][0], rows[place + 1 : place + 2]
            if proposed and self.tree.tokens[proposed[0]] == token:
                self.trunk.append(proposed[0])
                continue
            self.trunk.append(self.tree.add(node, token, "correction" if proposed else "trunk"))
            self.spare -= len(rows) - 1 - place
            return

    def _branch(self, tips: set[int]) -> None:
        """Continue the branches at the smallest margins, begin those that are new, and give up the others."""
        places = sorted(self.trunk[:-1], key=lambda node: self._best[node][2])[: self.siblings]
        self.branches = {node: branch for node, branch in self.branches.items() if node in places}
        for branch in self.branches.values():
            if branch[-1] in tips:
                branch.append(self.tree.add(branch[-1], self._best[branch[-1]][0], "continuation"))
        for node in places:
            if node not in self.branches:
                self.branches[node] = [self.tree.add(node, self._best[node][1], "sibling")]
