"""CAS-Spec (Ning et al. 2025): several drafts of different cost, all of them the model itself, and a router that says which drafts next.

    levels      the model without 40 or 60 % of its attentions and MLPs, its coarse form, an adapter's exit, prompt lookup at the bottom
    dynamic     the open leaf with the best chance to be reached is continued by the level, and as far, as gains most tokens a second;
                near rivals go along in the same passes; where nothing gains more than verifying now, that is done
    vertical    each level checks in one batch what the one below it proposes                     the plain cascade
    horizontal  the first tokens by the first level, later ones by the cheaper ones

Draft passes leave approximate keys and values behind; the target pass begins every node again and replaces them. docs/cas_spec.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from cats.acceptance import Verdict
from cats.config import MethodConfig, require
from cats.errors import CatsError
from cats.methods.base import Method, Needs, Preset
from cats.methods.cas_spec_tree import EXIT, LOOKUP, Bounds, Growth, Level
from cats.methods.prompt_lookup import NgramIndex
from cats.methods.router import TARGET, Router
from cats.planning.plan import COARSE, EXACT, View
from cats.planning.sparsity import Sparse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cats.cats_model import MultiAdapterCATSModel
    from cats.state import Cycle, DecodeState

SPARSITIES = {"sparse40": 0.4, "sparse60": 0.6}
LONGEST_NGRAM = 3
"""Looked up in the text so far."""


@dataclass(frozen=True)
class CasSpecConfig(MethodConfig):
    """Drafts from the model itself, chosen step by step."""

    draft_levels: tuple[Literal["sparse40", "sparse60", "coarse", "exit", "lookup"], ...] = field(
        default=("sparse40", "sparse60", "lookup"), metadata={"help": "what drafts, the best first; lookup stands last"}
    )
    policy: Literal["dynamic", "vertical", "horizontal"] = field(default="dynamic", metadata={"help": "how the levels are combined"})
    longest_draft: int = field(default=10, metadata={"help": "tokens that a level drafts at a time, at most", "lowest": 1})
    tree_nodes: int = field(default=64, metadata={"help": "nodes of the tree, root included; 256 suits a slow stream", "lowest": 2})
    draft_top_p: float = field(
        default=0.9, metadata={"help": "rivals of a leaf are those that hold this share of all chances", "lowest": 0.0, "highest": 1.0}
    )
    layer_sets: Path | None = field(
        default=None, metadata={"help": "file of training.search_layer_sets; the default model's own, for others sublayers by turns"}
    )
    state: Path | None = field(default=None, metadata={"help": "file that what was learnt is read from, if it exists, and written to"})

    def __post_init__(self) -> None:
        super().__post_init__()
        known = len(set(self.draft_levels)) == len(self.draft_levels) > 0
        require(known, f"draft-levels are {', '.join(self.draft_levels) or 'none'}; name at least one, and none twice.")
        require(LOOKUP not in self.draft_levels[:-1], "lookup costs nothing and stands at the bottom; name it last among the levels.")
        sparse = [SPARSITIES[level] for level in self.draft_levels if level in SPARSITIES]
        require(sparse == sorted(sparse), "sparse40 is the better and stands before sparse60; exchange them.")

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        return f"CAS-Spec, {self.policy}: {', '.join(self.draft_levels)}"

    @property
    def views(self) -> tuple[View, ...]:
        """That the levels draft with, of a model that need not be known yet."""
        return tuple(view for level in self.draft_levels if (view := self.view(level)) != EXACT)

    def view(self, level: str) -> View:
        """That a level runs."""
        return COARSE if level == "coarse" else Sparse(sparsity=SPARSITIES[level], sets=self.layer_sets) if level in SPARSITIES else EXACT


class Opened(NamedTuple):
    """What the method keeps with the model."""

    router: Router
    levels: tuple[Level, ...]
    nbytes: int = 0

    def close(self) -> None:
        """The model closes."""
        self.router.close()


class CasSpec(Method):
    """Drafts of the model itself at several costs (sublayers left out, lookup), chosen step by step by what they gain."""

    name = "cas_spec"
    Config = CasSpecConfig
    presets = {
        "cas_spec": Preset(CasSpecConfig(), "CAS-Spec"),
        "cas_spec_vertical": Preset(CasSpecConfig(policy="vertical"), "CAS-Spec, vertical cascade"),
        "cas_spec_horizontal": Preset(CasSpecConfig(policy="horizontal"), "CAS-Spec, horizontal cascade"),
        "cas_spec_exit": Preset(CasSpecConfig(draft_levels=("sparse60", EXIT, LOOKUP)), "CAS-Spec, sparse 0.6, exit, lookup"),
        "cas_spec_coarse": Preset(CasSpecConfig(draft_levels=("coarse", LOOKUP)), "CAS-Spec, coarse copy, lookup"),
        **{
            f"cas_spec_{level}": Preset(CasSpecConfig(draft_levels=(level,)), f"CAS-Spec, {level} alone")
            for level in ("sparse40", "sparse60", LOOKUP)
        },
    }
    shapes = {
        "cas-spec": CasSpecConfig(longest_draft=4, tree_nodes=12),
        "cas-spec-vertical": CasSpecConfig(policy="vertical", longest_draft=4, tree_nodes=12),
        "cas-spec-horizontal": CasSpecConfig(("coarse", "sparse60", LOOKUP), "horizontal", longest_draft=3, tree_nodes=10),
        "cas-spec-exit": CasSpecConfig(draft_levels=("sparse60", EXIT, LOOKUP), longest_draft=3, tree_nodes=10),
    }
    config: CasSpecConfig
    resources: Opened

    @classmethod
    def needs(cls, config: CasSpecConfig) -> Needs:
        """See `Method`: what the levels run, in memory."""
        return Needs(("draft",) if EXIT in config.draft_levels else (), config.views)

    @classmethod
    def lacks(cls, config: CasSpecConfig, base: "PretrainedConfig", coarse: str | None = None) -> str | None:
        """See `Method`: weights with a coarse form, layer sets of this model."""
        from cats.weight import has_coarse  # which loads what products need

        if "coarse" in config.draft_levels and not has_coarse(base, coarse):
            return (
                f"the level coarse of the method {cls.name} drafts with a coarse form of the weights, and this checkpoint has none; give "
                "other --draft-levels, or convert it by python -m cats.cli.nest, or make a copy by --coarse int8 (MemoryOptions.coarse)."
            )
        try:
            _ = [view.in_model(base.num_hidden_layers, base.hidden_size) for view in config.views]
        except CatsError as error:
            return str(error)
        return None

    @classmethod
    def open(cls, model: "MultiAdapterCATSModel", config: CasSpecConfig) -> Opened:
        """See `Method`; levels that are not in memory, and a saved state of another model, raise `CatsError`."""
        base, levels = model.base, []
        for name in config.draft_levels[: None if config.draft_levels[-1] != LOOKUP else -1]:
            view = config.view(name).in_model(base.layer_count, base.config.hidden_size)
            if view != EXACT:
                base.source.check(view)
            stop = model.exits(("draft",))["draft"] if name == EXIT else base.layer_count
            levels.append(Level(name, view, stop, view.layers_run(0, stop) + (name == EXIT)))
        about = {"layers": base.layer_count, "width": base.config.hidden_size, "vocabulary": base.config.vocab_size}
        return Opened(Router(about, config.draft_levels, config.state), tuple(levels))

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.config.tree_nodes

    def start(self, state: "DecodeState") -> None:
        """See `Method`."""
        self._index = NgramIndex(LONGEST_NGRAM)

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        config = self.config
        bounds = Bounds(config.draft_levels, config.longest_draft, config.tree_nodes, config.draft_top_p)
        self._growth = growth = Growth(cycle, self.resources.router, self.resources.levels, self._index, bounds)
        if self.config.policy == "dynamic":
            nodes = growth.dynamic()
        else:
            with cycle.stage("draft"):
                nodes = growth.vertical() if self.config.policy == "vertical" else growth.horizontal()
        self._passes = len(cycle.passes)
        return nodes

    def observe(self, cycle: "Cycle", nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        """See `Method`."""
        router, path, parents = self.resources.router, set(verdict.path), cycle.tree.parents
        standing = [node for node in self._growth.said if node in verdict.accepted and parents[node] in path]
        router.judge([(level, said, verdict.accepted[node]) for node in standing for level, said in self._growth.said[node]])
        costs = [cost for cost in cycle.passes[self._passes :] if cost.adapter is None]
        layers, nbytes = sum(cost.layers for cost in costs), sum(cost.bytes_streamed for cost in costs)
        context = max((cost.context for cost in costs), default=0)
        router.ran(TARGET, len(nodes), context, layers, nbytes, cycle.reading()[0]["target"])
