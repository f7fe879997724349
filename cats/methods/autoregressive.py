"""Plain decoding: a tree of one node. The baseline of every speed-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cats.config import MethodConfig
from cats.methods.base import Method, Preset
from cats.planning.cost import Passes, Work

if TYPE_CHECKING:
    from cats.state import Cycle


@dataclass(frozen=True)
class AutoregressiveConfig(MethodConfig):
    """Plain decoding has no settings."""

    def label(self, exits: tuple[int, ...]) -> str:
        """See `MethodConfig`."""
        return "plain decoding"

    def work(self, passes: Passes, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
        """See `MethodConfig`."""
        return passes.target(nodes, layers)


class Autoregressive(Method):
    """Verifies the root, so that each target pass commits exactly one token."""

    name = "autoregressive"
    Config = AutoregressiveConfig
    presets = {"autoregressive": Preset(AutoregressiveConfig(), "plain decoding")}
    config: AutoregressiveConfig

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return 1

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        return [0]
