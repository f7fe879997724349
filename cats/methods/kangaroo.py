"""Kangaroo (Liu et al. 2024): one adapter on an early exit drafts a chain that ends where its confidence does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cats.config import MethodConfig
from cats.methods.base import Method, Preset
from cats.methods.chain import draft_chain
from cats.methods.drafting import STEPS, THRESHOLD, check_threshold
from cats.planning.cost import Passes, Work

if TYPE_CHECKING:
    from cats.state import Cycle


@dataclass(frozen=True)
class KangarooConfig(MethodConfig):
    """Kangaroo: one adapter, a chain that ends where the draft loses confidence."""

    steps: int = field(default=6, metadata=STEPS)
    threshold: float = field(default=0.6, metadata=THRESHOLD)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.threshold)

    @property
    def draft_passes(self) -> int:
        """See `MethodConfig`."""
        return self.steps

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        return f"Kangaroo, exit {exits[0]}, {self.steps} steps"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`."""
        drafting = nodes * passes.run(1, exits[0]) + min(nodes, self.steps) * passes.exit(1)
        return passes.target(nodes, layers - exits[0], drafting)


class Kangaroo(Method):
    """One adapter drafts a chain that ends where its confidence does; the target resumes from the drafted tokens' exit states."""

    name = "kangaroo"
    Config = KangarooConfig
    presets = {"kangaroo": Preset(KangarooConfig(), "Kangaroo")}
    shapes = {"kangaroo": KangarooConfig(steps=6, threshold=0.3)}
    adapters = ("draft",)
    config: KangarooConfig

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.config.steps + 1

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        with cycle.stage("draft"):
            return draft_chain(cycle, "draft", 0, self.config.steps, self.config.threshold, topk=1).nodes
