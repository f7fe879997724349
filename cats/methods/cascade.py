"""CATS (paper sections 4.2 and appendix A): draft at exit d, check and correct at exit s, verify the whole tree once.

    draft       a chain through [0, d) and the draft adapter                    the trunk
    check       all of it through [d, s); where the shallow adapter's best
                token differs from the draft, that token enters as well         corrections
                after the last draft token its best token is free
    branch      the draft's and the verifier's other top-k along the trunk      siblings
                and its top-k after each correction                             continuations
    verify      (engine) every node from exit s through [s, L), once

The shallow verifier sees further than the draft, so scores along the trunk are its log-probabilities, for siblings too;
continuations, which it has not seen, carry the draft's. `sv_passes` rounds of draft and check may run before the target
pass: each further round drafts on from the shallow verifier's first correction, or from its free token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cats.config import MethodConfig, require
from cats.methods.base import Method, Preset
from cats.methods.chain import Chain, draft_chain
from cats.methods.drafting import STEPS, THRESHOLD, TOTAL_TOKENS, TREE_TOPK, check_threshold, check_tree
from cats.planning.cost import Passes, Work
from cats.tree import TokenTree

if TYPE_CHECKING:
    from cats.state import Cycle


@dataclass(frozen=True)
class CascadeConfig(MethodConfig):
    """CATS (paper section 4.2).

    The trunk holds `steps` tokens a round. `tree_topk` of k adds the draft's k - 1 next best tokens as siblings, and k continuations of
    each correction; trunk and corrections enter whatever `total_tokens` says, and -1 gives each round steps * tree_topk + 1 nodes plus
    the corrections. Each of `branch_rounds` beyond the first continues the tree_topk best branches so far, siblings among them, which is
    not in the paper.
    """

    steps: int = field(default=5, metadata=STEPS)
    threshold: float = field(default=0.0, metadata=THRESHOLD)
    tree_topk: int = field(default=1, metadata=TREE_TOPK)
    total_tokens: int = field(default=-1, metadata=TOTAL_TOKENS)
    sv_passes: int = field(
        default=1, metadata={"help": "rounds of drafting and shallow verification before the target pass", "lowest": 1}
    )
    branch_rounds: int = field(
        default=1,
        metadata={"help": "rounds in which the draft continues branches of the tree; the paper's is 1, the corrections alone", "lowest": 1},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        check_tree(self.tree_topk, self.total_tokens)
        require(
            self.tree_topk > 1 or self.branch_rounds == 1,
            f"branch-rounds {self.branch_rounds} has no branches to continue in a chain; use tree-topk above 1.",
        )

    @property
    def draft_passes(self) -> int:
        """See `MethodConfig`."""
        return self.steps * self.sv_passes

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        shape = "chain" if self.tree_topk == 1 else "tree"
        whole = self.sv_passes * self.steps * self.tree_topk + 1 if self.total_tokens == -1 else self.total_tokens
        nodes = f", {whole} nodes" if self.tree_topk > 1 else ""
        rounds = f", {self.sv_passes} rounds" if self.sv_passes > 1 else ""
        branches = f", {self.branch_rounds} branch rounds" if self.branch_rounds > 1 else ""
        return f"CATS {shape}, exits {' and '.join(map(str, exits))}, {self.steps} steps{nodes}{rounds}{branches}"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`; of a tree, with a correction at every other place of the chain."""
        draft_exit, shallow_exit = exits
        rounds, steps, between = self.sv_passes, self.steps, shallow_exit - draft_exit
        drafting = rounds * steps * (passes.run(1, draft_exit) + passes.exit(1))
        checking = rounds * (passes.run(1, draft_exit) + passes.run(steps + 1, between) + passes.exit(steps + 1))
        entering = fresh = max(nodes - rounds * (steps + 1), 0.0)
        corrections = rounds * ((steps + 1) // 2)
        if self.tree_topk > 1 and entering > corrections:
            fresh -= corrections
            checking += passes.run(corrections, draft_exit) + passes.exit(corrections)
            checking += (self.branch_rounds - 1) * (passes.run(self.tree_topk, draft_exit) + passes.exit(self.tree_topk))
        checking += passes.run(fresh, draft_exit) + passes.run(entering, between)
        return passes.target(nodes, layers - shallow_exit, drafting, checking)


@dataclass(frozen=True)
class Checked:
    """What the shallow verifier says along a chain of m + 1 nodes: its top-k tokens after each, with their log-probabilities,
    and its log-probabilities of the draft's top-k tokens after the first m."""

    top_tokens: list[list[int]]
    top_scores: list[list[float]]
    draft_scores: list[list[float]]


class Cascade(Method):
    """CATS: an adapter drafts at one exit, another checks and corrects at a later one, the target verifies the whole tree."""

    name = "cascade"
    Config = CascadeConfig
    presets = {
        "cascade_chain": Preset(CascadeConfig(steps=5), "CATS chain"),
        "cascade_tree": Preset(CascadeConfig(steps=5, tree_topk=10, total_tokens=40), "CATS tree, 40 nodes"),
        "cascade_tree_two_branch_rounds": Preset(
            CascadeConfig(steps=5, tree_topk=10, total_tokens=40, branch_rounds=2), "CATS tree, 40 nodes, 2 branch rounds"
        ),
        "cascade_tree_60_nodes_five_branch_rounds": Preset(
            CascadeConfig(steps=5, tree_topk=10, total_tokens=60, branch_rounds=5), "CATS tree, 60 nodes, 5 branch rounds"
        ),
        "cascade_chain_two_rounds": Preset(CascadeConfig(steps=5, sv_passes=2), "CATS chain, 2 rounds"),
        "cascade_tree_two_rounds": Preset(
            CascadeConfig(steps=5, tree_topk=10, total_tokens=40, sv_passes=2), "CATS tree, 40 nodes, 2 rounds"
        ),
    }
    shapes = {
        "cascade-chain": CascadeConfig(steps=5),
        "cascade-tree": CascadeConfig(steps=5, tree_topk=4, total_tokens=24),
        "cascade-tree-automatic": CascadeConfig(steps=3, tree_topk=3),
        "cascade-threshold": CascadeConfig(steps=5, threshold=0.5, tree_topk=2),
        "cascade-rounds": CascadeConfig(steps=2, tree_topk=2, sv_passes=3),
        "cascade-branches": CascadeConfig(steps=3, tree_topk=3, total_tokens=24, branch_rounds=3),
    }
    adapters = ("draft", "shallow")
    config: CascadeConfig

    @property
    def max_nodes(self) -> int:
        """Trunks and their corrections, or what total_tokens allows if that is more."""
        config = self.config
        entering = config.sv_passes * 2 * (config.steps + 1)
        return entering + max(config.total_tokens, config.sv_passes * config.steps * config.tree_topk + 1)

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        rounds: list[tuple[Chain, Checked]] = []
        corrections: list[int] = []
        agreed = cycle.shallow_accepted = 0
        start: int | None = 0
        while start is not None and len(rounds) < self.config.sv_passes:
            with cycle.stage("draft"):
                chain = draft_chain(cycle, "draft", start, self.config.steps, self.config.threshold, self.config.tree_topk)
            with cycle.stage("shallow"):
                checked = self._check(cycle, chain)
                agreed, found = self._correct(cycle, chain, checked)
            cycle.shallow_accepted += agreed
            corrections += found.values()
            rounds.append((chain, checked))
            start = found.get(agreed)
        with cycle.stage("shallow"):
            if self._room(cycle, corrections, len(rounds)) > 0:
                self._branch(cycle, rounds, corrections)
            nodes = range(len(cycle.tree))
            cycle.advance(nodes, cycle.state.exits["shallow"])
        return nodes

    def _check(self, cycle: "Cycle", chain: Chain) -> Checked:
        """Run the chain through `[d, s)` and the shallow adapter, in one batch; one transfer from the device."""
        cycle.advance(chain.nodes, cycle.state.exits["shallow"])
        scores_TV = torch.log_softmax(cycle.adapter_logits("shallow", chain.nodes).float(), dim=-1)
        best = scores_TV.topk(self.config.tree_topk, dim=-1)
        drafted = torch.tensor(chain.top_tokens, dtype=torch.long, device=scores_TV.device)
        draft_scores = scores_TV[:-1].gather(1, drafted.reshape(-1, self.config.tree_topk))
        return Checked(best.indices.tolist(), best.values.tolist(), draft_scores.tolist())

    def _correct(self, cycle: "Cycle", chain: Chain, checked: Checked) -> tuple[int, dict[int, int]]:
        """Rescore the trunk, add corrections and the free token.

        Returns:
            how many draft tokens the verifier agreed with before it first differed, and the corrections by place in the chain.
        """
        tree, corrections, agreed = cycle.tree, {}, None
        for place, node in enumerate(chain.nodes):
            drafted = chain.nodes[place + 1] if place + 1 < len(chain.nodes) else None
            agrees = drafted is not None and tree.tokens[drafted] == checked.top_tokens[place][0]
            if drafted is not None:
                tree.scores[drafted] = tree.scores[node] + checked.draft_scores[place][0]
                cycle.shallow_verdicts[drafted] = agrees
            if agrees:
                continue
            agreed = place if agreed is None else agreed
            if tree.depths[node] < cycle.depth_limit:
                corrections[place] = tree.add(node, checked.top_tokens[place][0], "correction", checked.top_scores[place][0])
        return len(chain.nodes) - 1 if agreed is None else agreed, corrections

    def _room(self, cycle: "Cycle", corrections: list[int], rounds: int) -> int:
        """Nodes that siblings and continuations may still take."""
        config = self.config
        automatic = rounds * config.steps * config.tree_topk + 1 + len(corrections)
        return (automatic if config.total_tokens == -1 else config.total_tokens) - len(cycle.tree)

    def _branch(self, cycle: "Cycle", rounds: list[tuple[Chain, Checked]], corrections: list[int]) -> None:
        """Let siblings and continuations compete by cumulative log-probability for the room that is left."""
        tree = cycle.tree
        offers = Offers(tree)
        for chain, checked in rounds:
            open_nodes = [node for node in chain.nodes if tree.depths[node] < cycle.depth_limit]
            for node, tokens, scores in zip(open_nodes, checked.top_tokens, checked.top_scores, strict=False):
                offers.add(node, tokens, scores, "sibling")
            for node, tokens, scores in zip(open_nodes, chain.top_tokens, checked.draft_scores, strict=False):
                offers.add(node, tokens, scores, "sibling")
        continued = [node for node in corrections if not tree.children(node)]
        for branch_round in range(self.config.branch_rounds):
            self._continue(cycle, continued, offers)
            room = self._room(cycle, corrections, len(rounds))
            last = branch_round == self.config.branch_rounds - 1
            continued = offers.take(room if last else min(room, self.config.tree_topk))

    def _continue(self, cycle: "Cycle", nodes: list[int], offers: "Offers") -> None:
        """Offer the draft's top-k after each of `nodes`."""
        nodes = [node for node in nodes if cycle.tree.depths[node] < cycle.depth_limit]
        if not nodes:
            return
        cycle.advance(range(len(cycle.tree)), cycle.state.exits["draft"])
        best = torch.log_softmax(cycle.adapter_logits("draft", nodes).float(), dim=-1).topk(self.config.tree_topk, dim=-1)
        for node, tokens, scores in zip(nodes, best.indices.tolist(), best.values.tolist(), strict=True):
            offers.add(node, tokens, scores, "continuation")


class Offers:
    """Candidates for the room that is left, and which of them became nodes."""

    def __init__(self, tree: TokenTree):
        self._tree = tree
        self._kinds: dict[tuple[int, int], str] = {}
        self._open: list[tuple[float, int, int]] = []

    def add(self, parent: int, tokens: list[int], scores: list[float], kind: str) -> None:
        """Offer children of `parent` that it has not yet, with their log-probabilities after it."""
        for token, score in zip(tokens, scores, strict=True):
            if self._tree.child(parent, token) is None and (parent, token) not in self._kinds:
                self._kinds[parent, token] = kind
                self._open.append((self._tree.scores[parent] + score, parent, token))

    def take(self, count: int) -> list[int]:
        """Make the `count` best open offers nodes; returns these."""
        self._open.sort(key=lambda offer: -offer[0])
        chosen, self._open = self._open[:count], self._open[count:]
        return [
            self._tree.add(parent, token, self._kinds[parent, token], score - self._tree.scores[parent]) for score, parent, token in chosen
        ]
