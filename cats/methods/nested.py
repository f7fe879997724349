"""Nested weights draft (docs/nested.md): the coarse form of the whole model proposes, the exact pass verifies. No training.

    draft       the coarse form, token by token, all of it in memory                         the trunk
    propose     or: prompt lookup, or the draft adapter at its exit of the coarse form,
                proposes several tokens, and the coarse form checks them in one batch
                and says what comes where it differs                                         lookup, corrections
    branch      where its two best logits are closest, the second best enters as well,
                and is continued beside the trunk, in the same passes                        siblings, continuations
    verify      (engine) all of it, exactly, once

A node that the coarse form has run is begun again by the exact pass, whose keys and values take the place of the approximate ones. So
committed text has exact ones alone, and the draft of a long text is as good as that of a short one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from cats.acceptance import Verdict
from cats.config import MethodConfig, require
from cats.methods.base import Method, Needs, Preset
from cats.methods.chain import draft_chain
from cats.methods.drafting import TOTAL_TOKENS
from cats.methods.nested_growth import PROPOSED, Growth
from cats.methods.pacing import CycleCost, Pacing
from cats.methods.prompt_lookup import NgramIndex
from cats.planning.cost import Passes, Work
from cats.planning.plan import COARSE, EXACT

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cats.cats_model import MultiAdapterCATSModel
    from cats.state import Cycle, DecodeState

LONGEST_NGRAM = 3
"""Looked up in the text so far."""
ADDED_BY_BATCH = 2.0
"""Assumed by the planner: tokens that a batch of proposals adds to the trunk, the coarse form's own among them."""
ASSUMED_ACCEPTED = 11.0
"""Assumed by the planner where nothing was measured: tokens a cycle of a chain of 20, drafted with eight coarse bits a weight."""


@dataclass(frozen=True)
class NestedConfig(MethodConfig):
    """The coarse form of the model drafts.

    By default the chain ends where one more draft no longer pays, by what its margins and the cycles so far have shown: a chain of 20
    fits a slow stream, and where little is streamed it costs more than it brings. Without `adaptive` every chain is `steps` long, and
    the same text is made of the same cycles each time.
    """

    steps: int = field(default=20, metadata={"help": "tokens of the trunk, at most", "lowest": 1})
    draft: Literal["coarse", "lookup", "adapter"] = field(
        default="coarse",
        metadata={
            "help": f"what drafts: the coarse form alone; or prompt lookup, or the draft adapter, {PROPOSED} tokens at a time, which the "
            "coarse form checks in one batch"
        },
    )
    adaptive: bool = field(default=True, metadata={"help": "end the trunk where one more draft does not pay"})
    siblings: int = field(
        default=0, metadata={"help": "second best tokens that enter, where the margin is smallest, and are continued", "lowest": 0}
    )
    total_tokens: int = field(default=-1, metadata={"help": TOTAL_TOKENS["help"].replace("steps * tree-topk", "steps * (siblings + 1)")})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.siblings > 0 or self.total_tokens == -1,
            f"total-tokens {self.total_tokens} limits siblings and what follows them, and there are none; give siblings, or leave it out.",
        )
        least = self.steps + 1 + self.siblings
        require(
            self.total_tokens == -1 or self.total_tokens >= least,
            f"total-tokens is {self.total_tokens}; root, steps and siblings alone are {least}. Give as many, or -1 (automatic).",
        )

    @property
    def reach(self) -> int:
        """Nodes of a branch, at most."""
        return self.steps if self.total_tokens == -1 else (self.total_tokens - self.steps - 1) // self.siblings

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        length = f"up to {self.steps} steps" if self.adaptive else f"{self.steps} steps"
        drafts = {"coarse": "", "lookup": ", prompt lookup first", "adapter": f", drafted at exit {', '.join(map(str, exits))}"}[self.draft]
        return f"nested, {length}{drafts}" + (f", {self.siblings} siblings" if self.siblings else "")

    @property
    def priced(self) -> bool:
        """See `MethodConfig`; how long an adaptive trunk becomes depends on the machine and the wire, so what it accepts does, too."""
        return not self.adaptive

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work | None:
        """See `MethodConfig`; one pass of the coarse form for every node of the trunk and its siblings' beside it, or for a batch."""
        if self.adaptive:
            return None
        grown = nodes - 1
        if self.draft == "coarse":
            rounds = min(float(self.steps), grown)
            return passes.target(nodes, layers, rounds * passes.coarse(grown / rounds, layers) if rounds else 0.0)
        rounds = self.steps / ADDED_BY_BATCH
        batch = passes.coarse(1 + PROPOSED + self.siblings, layers)
        if self.draft == "adapter":
            batch += PROPOSED * (passes.coarse_run(1, exits[0]) + passes.exit(1))
        return passes.target(nodes, layers, rounds * batch)


class Nested(Method):
    """The coarse form of nested weights, or an int8 copy (--coarse int8), drafts in memory; the exact model verifies."""

    name = "nested"
    Config = NestedConfig
    presets = {
        "nested": Preset(NestedConfig(adaptive=False), "nested, chain of 20"),
        "nested_adaptive": Preset(NestedConfig(), "nested, adaptive"),
        "nested_siblings": Preset(NestedConfig(adaptive=False, siblings=3, total_tokens=63), "nested, 3 siblings, 63 nodes"),
        "nested_lookup": Preset(NestedConfig(adaptive=False, draft="lookup"), "nested, prompt lookup"),
    }
    shapes = {
        "nested-chain": NestedConfig(steps=5, adaptive=False),
        "nested-adaptive": NestedConfig(steps=6),
        "nested-siblings": NestedConfig(steps=5, adaptive=False, siblings=2),
        "nested-everything": NestedConfig(steps=6, draft="lookup", siblings=2, total_tokens=14),
        "nested-lookup": NestedConfig(steps=8, adaptive=False, draft="lookup"),
        "nested-adapter": NestedConfig(steps=6, adaptive=False, draft="adapter"),
    }
    config: NestedConfig
    resources: Pacing

    @classmethod
    def needs(cls, config: NestedConfig) -> Needs:
        """See `Method`: the coarse form of every matrix, in memory."""
        return Needs(("draft",) if config.draft == "adapter" else (), (COARSE,))

    @classmethod
    def lacks(cls, config: NestedConfig, base: "PretrainedConfig", coarse: str | None = None) -> str | None:
        """See `Method`: weights that have a coarse form."""
        from cats.weight import has_coarse  # which loads what products need

        if has_coarse(base, coarse):
            return None
        return (
            f"the method {cls.name} drafts with a coarse form of the weights, and this checkpoint has none; convert it by "
            "python -m cats.cli.nest, or give --coarse int8 (MemoryOptions.coarse), which makes a copy."
        )

    @classmethod
    def open(cls, model: "MultiAdapterCATSModel", config: NestedConfig) -> Pacing:
        """See `Method`; a model without a coarse form, or one whose coarse form is not in memory, raises `CatsError`."""
        model.base.source.check(COARSE)
        return Pacing()

    @property
    def max_nodes(self) -> int:
        """See `Method`: the trunk, every branch that may have been begun, and what was proposed and not taken."""
        config = self.config
        return 1 + config.steps * (1 + config.siblings) + (config.steps if config.draft != "coarse" else 0)

    def start(self, state: "DecodeState") -> None:
        """See `Method`."""
        self._index = NgramIndex(LONGEST_NGRAM)

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        config, self._growth = self.config, None
        depth = min(config.steps, cycle.depth_limit)
        with cycle.stage("draft"):
            if config.draft == "coarse" and not (config.adaptive or config.siblings):
                return coarse_chain(cycle, depth)
            proposer = {"coarse": None, "lookup": self._looked_up, "adapter": self._adapted}[config.draft]
            self._growth = growth = Growth(cycle, depth, config.siblings, config.reach, config.steps, proposer)
            while growth.grows and (not growth.rounds or not config.adaptive or self.resources.pays(growth.chance(self.resources))):
                growth.grow()
        return growth.nodes

    def observe(self, cycle: "Cycle", nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        """See `Method`."""
        growth = self._growth
        if not self.config.adaptive or growth is None:
            return
        for node, margin in growth.trunk_margins:
            self.resources.judge(margin, verdict.accepted[node])
        seconds = cycle.reading()[0]
        exact = sum(cost.seconds for cost in cycle.passes if cost.view == EXACT and cost.adapter is None)
        self.resources.learn(CycleCost(growth.rounds, seconds["draft"], len(nodes), exact, seconds.total, len(verdict.path)))

    def _looked_up(self, cycle: "Cycle", path: Sequence[int], count: int) -> list[int]:
        """Nodes of what followed the last tokens of the text and the trunk `path` earlier in the text."""
        ahead = [cycle.tree.tokens[node] for node in path[1:]]
        nodes = [path[-1]]
        for token in self._index.continuation(cycle.state.tokens, count, ahead):
            nodes.append(cycle.tree.add(nodes[-1], token, "lookup"))
        return nodes[1:]

    def _adapted(self, cycle: "Cycle", path: Sequence[int], count: int) -> list[int]:
        """Nodes of a chain that the adapter drafts at its exit of the coarse form."""
        return draft_chain(cycle, "draft", path[-1], count, 0.0, topk=1, view=COARSE).nodes[1:]


def coarse_chain(cycle: "Cycle", depth: int) -> list[int]:
    """A chain of so many tokens that the coarse form likes best; they stay on the device until it is complete."""
    nodes, tokens = [0], list[torch.Tensor]()
    for _ in range(depth):
        tokens.append(cycle.target_logits(nodes[-1:], COARSE)[0].argmax())
        nodes.append(cycle.tree.add_unknown(nodes[-1], "trunk"))
        cycle.name_token(nodes[-1], tokens[-1])
    for node, token in zip(nodes[1:], torch.stack(tokens).tolist() if tokens else [], strict=True):
        cycle.tree.resolve(node, token, 0.0)
    return nodes
