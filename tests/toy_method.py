"""A method as a user would add one, in one file: it holds a weight of its own for each model, and has settings of new kinds.

Defining the class registers it, so that with tests/conftest.py importing this file every parametrised test runs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from cats.cats_model import MultiAdapterCATSModel
from cats.config import MethodConfig
from cats.methods.base import Method, Needs, Preset
from cats.state import Cycle


@dataclass(frozen=True)
class SuccessorConfig(MethodConfig):
    """A table of one likely successor for every token."""

    successors: Path | None = field(default=None, metadata={"help": "a .npy file of one token id per token; else the next id follows"})
    twice: bool = field(default=True, metadata={"help": "draft the successor's successor, too"})


class Table:
    """The successors; notes every time that one is made, and every time that one is closed."""

    made: ClassVar[list["Table"]] = []

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.closed = tokens, False
        self.made.append(self)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes

    def close(self) -> None:
        self.closed = True


class Successor(Method):
    """A toy: the token that most often follows, from a table that is read once per model."""

    name = "successor"
    Config = SuccessorConfig
    presets = {"successor": Preset(SuccessorConfig(), "successors")}
    shapes = {"successor": SuccessorConfig(), "successor-once": SuccessorConfig(twice=False)}
    config: SuccessorConfig
    resources: Table

    @classmethod
    def needs(cls, config: SuccessorConfig) -> Needs:
        return Needs(resident_bytes=8 * len(np.load(config.successors, mmap_mode="r")) if config.successors else 0)

    @classmethod
    def open(cls, model: MultiAdapterCATSModel, config: SuccessorConfig) -> Table:
        count = model.base.config.vocab_size
        return Table(torch.from_numpy(np.load(config.successors)) if config.successors else (torch.arange(count) + 1) % count)

    @property
    def max_nodes(self) -> int:
        return 3

    def propose(self, cycle: Cycle) -> Sequence[int]:
        with cycle.stage("table"):
            nodes = [0]
            for _ in range(min(1 + self.config.twice, cycle.depth_limit)):
                nodes.append(cycle.tree.add(nodes[-1], int(self.resources.tokens[cycle.tree.tokens[nodes[-1]]]), "table"))
            return nodes
