"""CATS (paper sections 4.2 and appendix A): draft at exit d, check and correct at exit s, verify the whole tree once.

    draft       a chain through [0, d) and the draft adapter                    the trunk
    check       all of it through [d, s); where the shallow adapter's best
                token differs from the draft, that token enters as well         corrections
                after the last draft token its best token is free
    verify      (engine) every node from exit s through [s, L), once

`sv_passes` rounds of draft and check may run before the target pass: each further round drafts on from the shallow verifier's first
correction, or from its free token. With `tree_topk` above 1 there are EAGLE's branches beside the trunk: cats/methods/cascade_tree.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from cats.acceptance import Verdict
from cats.config import MethodConfig, require
from cats.methods.base import Method, Preset
from cats.methods.cascade_tree import Growth
from cats.methods.chain import draft_chain
from cats.methods.drafting import STEPS, THRESHOLD, TOTAL_TOKENS, TREE_TOPK, check_threshold, check_tree
from cats.methods.hidden_nodes import MOST, HiddenNodes
from cats.planning.cost import Passes, Work

if TYPE_CHECKING:
    from cats.state import Cycle, DecodeState

HIDDEN = 0
"""The value of `total_tokens` that stands for as many nodes as the stream hides."""


@dataclass(frozen=True)
class CascadeConfig(MethodConfig):
    """CATS (paper section 4.2).

    The trunk holds `steps` tokens. `tree_topk` of k adds EAGLE's branches: in every level of the draft the k best nodes are run, and k
    tokens may follow each. Trunk and corrections enter whatever `total_tokens` says; -1 gives each round steps * tree_topk + 1 nodes plus
    the corrections. `sv_passes` rounds of drafting and shallow verification make the tree deeper where the verifier believes in it.
    """

    steps: int = field(default=5, metadata=STEPS)
    threshold: float = field(default=0.0, metadata=THRESHOLD)
    tree_topk: int = field(default=1, metadata=TREE_TOPK)
    total_tokens: int = field(
        default=-1, metadata={"help": f"{TOTAL_TOKENS['help']}; 0 (cascade) to as many as the stream of weights hides"}
    )
    sv_passes: int = field(default=1, metadata={"help": "rounds of drafting and shallow verification before the target pass", "lowest": 1})
    verifier: Literal["all", "corrections", "siblings", "none"] = field(
        default="all",
        metadata={
            "help": "what the shallow verifier is for: all; its corrections of the trunk alone; scoring and adding siblings alone, its "
            "corrections like any of them; or nothing"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)
        check_tree(self.tree_topk, -1 if self.total_tokens == HIDDEN and self.tree_topk > 1 else self.total_tokens)
        chain = self.tree_topk == 1
        require(
            not (chain and self.verifier == "siblings"), "verifier siblings has no siblings to score in a chain; use tree-topk above 1."
        )
        require(
            not (chain and self.verifier == "none" and self.sv_passes > 1),
            f"sv-passes {self.sv_passes} has no correction to go on from in a chain with verifier none; use sv-passes 1.",
        )

    @property
    def draft_passes(self) -> int:
        """See `MethodConfig`."""
        return self.steps * self.sv_passes

    @property
    def automatic(self) -> int:
        """Nodes of the tree for `total_tokens` of -1, corrections left out."""
        return self.sv_passes * self.steps * self.tree_topk + 1

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        shape = "chain" if self.tree_topk == 1 else "tree"
        whole = {-1: f"{self.automatic} nodes", HIDDEN: "as many nodes as the stream hides"}.get(
            self.total_tokens, f"{self.total_tokens} nodes"
        )
        nodes = f", {whole}" if self.tree_topk > 1 else ""
        rounds = f", {self.sv_passes} rounds" if self.sv_passes > 1 else ""
        verifier = f", verifier {self.verifier}" if self.verifier != "all" else ""
        return f"CATS {shape}, exits {' and '.join(map(str, exits))}, {self.steps} steps{nodes}{rounds}{verifier}"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`; of a chain, with a correction at every other place; of a tree, half of which was run while it grew."""
        draft_exit, shallow_exit = exits
        rounds, steps, between = self.sv_passes, self.steps, shallow_exit - draft_exit
        if self.tree_topk == 1:
            drafting = rounds * steps * (passes.run(1, draft_exit) + passes.exit(1)) + rounds * passes.run(1, draft_exit)
            checking = rounds * (passes.run(steps + 1, between) + passes.exit(steps + 1)) if self.verifier != "none" else 0.0
            fresh = entering = max(nodes - rounds * (steps + 1), 0.0)
        else:
            level = passes.run(self.tree_topk, draft_exit) + passes.exit(self.tree_topk)
            drafting = passes.run(1, draft_exit) + passes.exit(1) + (rounds * (steps + 1)) * level
            ran = {"none": 0, "corrections": steps + 1}.get(self.verifier, 1 + steps * self.tree_topk)
            checking = rounds * (passes.run(ran, between) + passes.exit(ran)) if ran else 0.0
            fresh, entering = nodes / 2, (nodes / 2 if ran else nodes)
        checking += passes.run(fresh, draft_exit) + passes.run(entering, between)
        return passes.target(nodes, layers - shallow_exit, drafting, checking)


class Cascade(Method):
    """CATS: an adapter drafts at one exit, another checks and corrects at a later one, the target verifies the whole tree."""

    name = "cascade"
    Config = CascadeConfig
    presets = {
        "cascade_chain": Preset(CascadeConfig(steps=5), "CATS chain"),
        "cascade_chain_two_rounds": Preset(CascadeConfig(steps=5, sv_passes=2), "CATS chain, 2 rounds"),
        "cascade_tree": Preset(CascadeConfig(steps=5, tree_topk=10, total_tokens=40), "CATS tree, 40 nodes"),
        "cascade_tree_60_nodes": Preset(CascadeConfig(steps=5, tree_topk=10, total_tokens=60), "CATS tree, 60 nodes"),
        "cascade_tree_two_rounds": Preset(
            CascadeConfig(steps=2, tree_topk=10, total_tokens=40, sv_passes=2), "CATS tree, 40 nodes, 2 rounds of 2 steps"
        ),
        "cascade_tree_60_nodes_two_rounds": Preset(
            CascadeConfig(steps=2, tree_topk=10, total_tokens=60, sv_passes=2), "CATS tree, 60 nodes, 2 rounds of 2 steps"
        ),
    }
    shapes = {
        "cascade-chain": CascadeConfig(steps=5),
        "cascade-tree": CascadeConfig(steps=5, tree_topk=4, total_tokens=24),
        "cascade-tree-automatic": CascadeConfig(steps=3, tree_topk=3),
        "cascade-threshold": CascadeConfig(steps=5, threshold=0.5, tree_topk=2),
        "cascade-rounds": CascadeConfig(steps=2, tree_topk=2, sv_passes=3),
        "cascade-corrections": CascadeConfig(steps=3, tree_topk=3, total_tokens=24, verifier="corrections"),
        "cascade-hidden": CascadeConfig(steps=2, tree_topk=3, total_tokens=HIDDEN),
    }
    adapters = ("draft", "shallow")
    config: CascadeConfig

    @property
    def max_nodes(self) -> int:
        """What is run while the tree grows, and what is chosen beside it: all of the budget but the trunk, or its corrections."""
        config, places = self.config, self.config.steps + 1
        if config.tree_topk == 1:
            return 1 + config.sv_passes * 2 * places
        run = 1 + config.sv_passes * places * config.tree_topk
        budget = {-1: config.automatic + places, HIDDEN: MOST}.get(config.total_tokens, config.total_tokens)
        return run + max(budget - places, places)

    def start(self, state: "DecodeState") -> None:
        """See `Method`."""
        self._hidden = HiddenNodes()

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        nodes = self._chain(cycle) if self.config.tree_topk == 1 else self._tree(cycle)
        with cycle.stage("shallow"):
            cycle.advance(nodes, cycle.state.exits["shallow"])
        if self.config.total_tokens == HIDDEN:
            self._hidden.proposed(cycle)
        return nodes

    def observe(self, cycle: "Cycle", nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        """See `Method`."""
        if self.config.total_tokens == HIDDEN:
            self._hidden.verified(cycle, len(nodes))

    def _chain(self, cycle: "Cycle") -> Sequence[int]:
        """Rounds of a drafted chain and its corrections; each further one begins at the first correction of the last."""
        config, start = self.config, 0
        cycle.shallow_accepted = None if config.verifier == "none" else 0
        for _ in range(config.sv_passes):
            with cycle.stage("draft"):
                trunk = draft_chain(cycle, "draft", start, config.steps, config.threshold, topk=1).nodes
            if config.verifier == "none":
                break
            with cycle.stage("shallow"):
                cycle.advance(trunk, cycle.state.exits["shallow"])
                said = cycle.adapter_logits("shallow", trunk).argmax(dim=-1).tolist()
                differing = self._compare(cycle, trunk, said)
                open_places = [place for place in differing if cycle.tree.depths[trunk[place]] < cycle.depth_limit]
                corrections = {place: cycle.tree.add(trunk[place], differing[place], "correction") for place in open_places}
            first = min(differing, default=-1)
            if first not in corrections:
                break
            start = corrections[first]
        return range(len(cycle.tree))

    def _compare(self, cycle: "Cycle", trunk: Sequence[int], said: Sequence[int]) -> dict[int, int]:
        """The verifier's tokens that are not the trunk's, by place; after the trunk's last node any is one. Notes its verdicts.

        Args:
            said: its best token after each of the first nodes of the trunk.
        """
        drafted = [cycle.tree.tokens[node] for node in trunk[1:]]
        differing = {place: token for place, token in enumerate(said) if drafted[place : place + 1] != [token]}
        self._note(cycle, trunk, len(said), differing)
        return differing

    @staticmethod
    def _note(cycle: "Cycle", trunk: Sequence[int], checked: int, differing: dict[int, int]) -> None:
        """Verdicts on the trunk, and how much of it was agreed with before the first that differs."""
        for place, node in enumerate(trunk[1 : checked + 1]):
            cycle.shallow_verdicts[node] = place not in differing
        cycle.shallow_accepted = (cycle.shallow_accepted or 0) + min([*differing, len(trunk) - 1])

    def _tree(self, cycle: "Cycle") -> Sequence[int]:
        """Rounds of drafting and checking, then the choice of nodes; see cascade_tree.py."""
        config, state = self.config, cycle.state
        if cycle.depth_limit == 0:
            return [0]
        calibration = state.model.adapters["shallow"].calibration.for_draft(state.exits["draft"])
        growth = Growth(cycle, config.tree_topk, calibration)
        for past in range(config.sv_passes):
            with cycle.stage("draft"):
                if past:
                    growth.draft_branches(config.steps)
                else:
                    growth.draft_trunk(config.steps, config.threshold)
            with cycle.stage("shallow"):
                self._check(cycle, growth, correct=past == 0)
        with cycle.stage("draft"):
            growth.draft_branches(0)
        return growth.choose(self._budget(growth))

    def _check(self, cycle: "Cycle", growth: Growth, correct: bool) -> None:
        """The shallow verifier's part of a round; in the first one it is compared with the trunk."""
        verifier = self.config.verifier
        if verifier == "none":
            return
        if verifier == "corrections":
            growth.check_trunk()
        else:
            growth.check()
        if correct:
            said = [growth.verdicts[node] for node in growth.trunk if node in growth.verdicts]
            differing = self._compare(cycle, growth.trunk, said)
            if verifier != "siblings":
                growth.correct(differing)

    def _budget(self, growth: Growth) -> int:
        """Nodes to choose, as far as trunk and corrections leave a choice."""
        if self.config.total_tokens == HIDDEN:
            return self._hidden.nodes
        return self.config.automatic + len(growth.corrections) if self.config.total_tokens == -1 else self.config.total_tokens
