"""EAGLE's drafting (Li et al. 2024) in the self-speculative setting of the paper: over the early exit and its adapter.

Chain: Kangaroo without a threshold. Tree: EAGLE-2's dynamic tree. At every level the k best nodes by cumulative
log-probability are expanded with k children each; in the end all candidates compete, and the best ones are verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cats.config import MethodConfig
from cats.methods.base import Method, Preset
from cats.methods.chain import draft_chain
from cats.methods.drafting import STEPS, TOTAL_TOKENS, TREE_TOPK, check_tree
from cats.planning.cost import Passes, Work
from cats.tree import best_candidates

if TYPE_CHECKING:
    from cats.state import Cycle

Candidate = tuple[float, int, int]


@dataclass(frozen=True)
class EagleSelfConfig(MethodConfig):
    """EAGLE's drafting over the early exit: a chain of `steps`, or (tree_topk above 1) EAGLE-2's dynamic tree of depth `steps`."""

    steps: int = field(default=5, metadata=STEPS)
    tree_topk: int = field(default=1, metadata=TREE_TOPK)
    total_tokens: int = field(default=-1, metadata=TOTAL_TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tree(self.tree_topk, self.total_tokens)

    @property
    def node_budget(self) -> int:
        """Nodes of the tree, root included."""
        return self.steps * self.tree_topk + 1 if self.total_tokens == -1 else self.total_tokens

    @property
    def draft_passes(self) -> int:
        """See `MethodConfig`."""
        return self.steps

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        shape = "chain" if self.tree_topk == 1 else f"tree of {self.node_budget} nodes"
        return f"EAGLE-self {shape}, exit {exits[0]}, {self.steps} steps"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`; the last drafted node, or half of a tree's, enters the exit's layers after drafting."""
        level = passes.run(self.tree_topk, exits[0]) + passes.exit(self.tree_topk)
        drafting = passes.run(1, exits[0]) + passes.exit(1) + (self.steps - 1) * level
        entering = passes.run(1 if self.tree_topk == 1 else nodes / 2, exits[0])
        return passes.target(nodes, layers - exits[0], drafting + entering)


class EagleSelf(Method):
    """EAGLE's chain or EAGLE-2's dynamic tree, drafted by one adapter at an early exit."""

    name = "eagle_self"
    Config = EagleSelfConfig
    presets = {
        "eagle_self_chain": Preset(EagleSelfConfig(steps=5, tree_topk=1), "EAGLE-self chain"),
        "eagle_self_tree": Preset(EagleSelfConfig(steps=5, tree_topk=10, total_tokens=60), "EAGLE-self tree, 60 nodes"),
    }
    shapes = {"eagle-chain": EagleSelfConfig(steps=4), "eagle-tree": EagleSelfConfig(steps=4, tree_topk=4, total_tokens=16)}
    adapters = ("draft",)
    config: EagleSelfConfig

    @property
    def max_nodes(self) -> int:
        """Expanded nodes need not be verified, so both numbers count."""
        expanded = 1 + (self.config.steps - 1) * self.config.tree_topk
        return expanded + self.config.node_budget

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        with cycle.stage("draft"):
            if self.config.tree_topk == 1:
                return draft_chain(cycle, "draft", 0, self.config.steps, 0.0, topk=1).nodes
            candidates = self._grow(cycle)
            chosen = best_candidates(candidates, self.config.node_budget - 1)
            return [0, *sorted(add_candidate(cycle, candidate) for candidate in chosen)]

    def _grow(self, cycle: "Cycle") -> list[Candidate]:
        """Expand level by level; returns every candidate ever offered, parents before children."""
        candidates: list[Candidate] = []
        level = [0]
        for depth in range(1, min(self.config.steps, cycle.depth_limit) + 1):
            offered = self._expand(cycle, level)
            candidates += offered
            if depth < min(self.config.steps, cycle.depth_limit):
                level = [add_candidate(cycle, candidate) for candidate in best_candidates(offered, self.config.tree_topk)]
        return candidates

    def _expand(self, cycle: "Cycle", nodes: list[int]) -> list[Candidate]:
        """The k best continuations of each node, as (cumulative score, parent, token)."""
        cycle.advance(nodes, cycle.state.exits["draft"])
        logits_TV = cycle.adapter_logits("draft", nodes)
        best = torch.log_softmax(logits_TV.float(), dim=-1).topk(self.config.tree_topk, dim=-1)
        offered = []
        for node, tokens, values in zip(nodes, best.indices.tolist(), best.values.tolist(), strict=True):
            offered += [(cycle.tree.scores[node] + value, node, token) for token, value in zip(tokens, values, strict=True)]
        return offered


def add_candidate(cycle: "Cycle", candidate: Candidate) -> int:
    """Make a candidate a node of the tree (or find the node that it became earlier)."""
    score, parent, token = candidate
    return cycle.tree.add(parent, token, "trunk" if parent == 0 else "sibling", score - cycle.tree.scores[parent])
