"""Medusa (Cai et al. 2024): heads on the base's last hidden state guess the tokens after next, and their guesses fill a static tree.

The state at the last committed token but one has predicted the root, the last committed token; head k predicts the token k places after
the root. Which of the heads' best guesses are combined is fixed: the tree of `nodes` nodes that, by the accuracy of each rank of each
head on held-out text, has most tokens accepted (cats/static_tree.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cats.config import MethodConfig
from cats.errors import CatsError
from cats.methods.base import Method, Needs, Preset
from cats.planning.cost import Passes, Work
from cats.static_tree import Path as Ranks
from cats.static_tree import best_tree

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cats.cats_model import MultiAdapterCATSModel
    from cats.medusa_heads import MedusaHeads
    from cats.state import Cycle

SHIPPED = Path(__file__).resolve().parent.parent.parent / "data" / "smollm2-135m" / "heads"
"""Heads of the default model; an installation from a wheel has none."""
RANKS = 10
"""Guesses of a head that a tree may hold, where nothing was measured."""
FIRST_GUESS, FURTHER_AHEAD, NEXT_GUESS = 0.5, 0.8, 0.4
"""Assumed where heads bring no accuracies: of head 1's first guess, and its share for the next head and for the next rank."""


@dataclass(frozen=True)
class MedusaConfig(MethodConfig):
    """Medusa: heads of the directory `heads`, of which the first `depth` are used, and a static tree of `nodes` nodes beside the root.

    The public implementation counts its 63 nodes without the root as well, so that 64 rows are verified.
    """

    heads: Path | None = field(
        default=None,
        metadata={"help": "directory of Medusa heads, as training/train_heads.py writes it; those shipped for the default model"},
    )
    nodes: int = field(default=63, metadata={"help": "drafted nodes of the static tree, root left out", "lowest": 1, "highest": 1000})
    depth: int = field(default=4, metadata={"help": "Medusa heads used, which is the depth of the static tree", "lowest": 1})

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        return f"Medusa, {self.nodes} nodes"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`; a head is a row of the base's lm_head, its own matrix is not priced."""
        return passes.target(nodes, layers, passes.head(self.depth))

    @property
    def directory(self) -> Path | None:
        """Where the heads lie; None where none are given and none are shipped."""
        return self.heads or (SHIPPED if SHIPPED.is_dir() else None)


@dataclass(frozen=True)
class MedusaResources:
    """Heads on the model's device, and the tree that is filled with their guesses, as paths of ranks."""

    heads: "MedusaHeads"
    tree: list[Ranks]

    @property
    def nbytes(self) -> int:
        """Of the weights."""
        return self.heads.nbytes


class Medusa(Method):
    """Heads on the last hidden state guess several tokens ahead; their guesses fill a static tree."""

    name = "medusa"
    Config = MedusaConfig
    presets = {"medusa": Preset(MedusaConfig(), "Medusa")}
    config: MedusaConfig
    resources: MedusaResources

    @classmethod
    def needs(cls, config: MedusaConfig) -> Needs:
        """The heads' bytes; none where there are no heads, which `open` says."""
        from cats.medusa_heads import stored_bytes  # which loads more than flags should wait for

        return Needs(resident_bytes=stored_bytes(config.directory) if config.directory else 0, own=("heads",))

    @classmethod
    def lacks(cls, config: MedusaConfig, base: "PretrainedConfig", coarse: str | None = None) -> str | None:
        """Heads for this base model."""
        from cats.medusa_heads import read_shape

        if config.directory is None:
            return "the method medusa needs heads; give --heads DIRECTORY (training/train_heads.py makes one)."
        shape = read_shape(config.directory)
        for what, theirs, its in (("width", shape.hidden_size, base.hidden_size), ("vocabulary", shape.vocab_size, base.vocab_size)):
            if theirs not in (None, its):
                return f"the heads in {config.directory} have {what} {theirs} and the base model has {its}; give its own by --heads."
        if shape.heads < config.depth:
            return f"{config.directory} holds {shape.heads} heads, fewer than depth {config.depth}; give --depth {shape.heads}."
        return None

    @classmethod
    def open(cls, model: "MultiAdapterCATSModel", config: MedusaConfig) -> MedusaResources:
        """Load the heads and find their tree; missing ones, and those of another model, raise `CatsError`."""
        from cats.medusa_heads import MedusaHeads, read_accuracy

        base, directory = model.base, config.directory
        lacking = cls.lacks(config, base.config)
        if lacking is not None:
            raise CatsError(lacking)
        assert directory is not None
        heads = MedusaHeads.from_pretrained(directory)
        heads.compute_in(base.dtype, base.device, base.work)
        accuracy = read_accuracy(directory, heads.shape.heads) or assumed_accuracy(config.depth)
        return MedusaResources(heads, best_tree([row[: base.config.vocab_size] for row in accuracy[: config.depth]], config.nodes))

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.config.nodes + 1

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        with cycle.stage("draft"):
            paths = [path for path in self.resources.tree if len(path) <= cycle.depth_limit]
            nodes: dict[Ranks, int] = {(): 0}
            if paths:
                tokens, scores = self._guesses(cycle, len(paths[-1]), 1 + max(path[-1] for path in paths))
                for path in paths:
                    head, rank = len(path) - 1, path[-1]
                    kind = "sibling" if any(path) else "trunk"
                    nodes[path] = cycle.tree.add(nodes[path[:-1]], tokens[head][rank], kind, scores[head][rank])
            return list(nodes.values())

    def _guesses(self, cycle: "Cycle", heads: int, ranks: int) -> tuple[list[list[int]], list[list[float]]]:
        """The best tokens of the first `heads` heads after the last committed state, and their log-probabilities."""
        base = cycle.state.base
        with cycle.computing(), torch.inference_mode():
            logits_KV = self.resources.heads.logits(base.norm(cycle.state.final_hidden_1D), heads, base.lm_head)
            best = torch.log_softmax(logits_KV.float(), dim=-1).topk(ranks, dim=-1)
        return best.indices.tolist(), best.values.tolist()


def assumed_accuracy(heads: int) -> list[list[float]]:
    """A table for heads that bring none."""
    return [[FIRST_GUESS * FURTHER_AHEAD**head * NEXT_GUESS**rank for rank in range(RANKS)] for head in range(heads)]
