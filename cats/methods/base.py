"""The contract of a method: it grows a tree. The engine verifies, accepts and commits."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from cats.acceptance import Verdict
from cats.state import Cycle, DecodeState


class Method(ABC):
    """Proposes; never loops over tokens, never touches a cache.

    What a method can ask for, all through `Cycle`: run nodes to an exit (`advance`) and read an adapter there
    (`adapter_logits`), draft with another view of the model (`target_logits` with a `View`), add query rows that cannot be accepted
    (`tree.add_probe`). What it gets back: `observe`.
    """

    adapters: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def max_nodes(self) -> int:
        """Upper bound of tree nodes in a step, root included; caches are sized by it."""

    def start(self, state: DecodeState) -> None:  # noqa: B027 - most methods remember nothing
        """A new answer begins; the prompt is in the caches. Forget everything about the last one."""

    @abstractmethod
    def propose(self, cycle: Cycle) -> Sequence[int]:
        """Grow `cycle.tree`; return the nodes to verify.

        The nodes are distinct and in ascending order (so a parent comes before its children), begin with the root and hold the parent of
        each of them; probes among them come back in `observe` but are never accepted. No node, probes included, lies deeper than
        `cycle.depth_limit`. What breaks this raises `ContractError`, as a bug of the method. Time may be charged to stages of any name
        by `cycle.stage`.
        """

    def observe(self, cycle: Cycle, nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:  # noqa: B027 - nor learn
        """After verification, before the commit: the target's logits at `nodes`, the tree, the verdict."""
