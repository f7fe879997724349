"""Plain decoding: a tree of one node. The baseline of every speed-up."""

from collections.abc import Sequence

from cats.config import AutoregressiveConfig
from cats.methods.base import Method
from cats.state import Cycle


class Autoregressive(Method):
    """Verifies the root, so that each target pass commits exactly one token."""

    def __init__(self, config: AutoregressiveConfig):
        self.config = config

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return 1

    def propose(self, cycle: Cycle) -> Sequence[int]:
        """See `Method`."""
        return [0]
