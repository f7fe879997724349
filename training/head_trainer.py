"""The training loop of Medusa's heads: that of the adapters, with a head in the place of an exit.

The base is frozen and heads share no weights, so training them together gives the weights that training each alone would
give. The weight `decay ** k` of head k's loss scales its gradient before clipping; AdamW's step does not depend on it otherwise.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from cats.errors import CatsError
from training.adapter_run import AdapterRun
from training.dataset import Batch, RowSource
from training.head_objective import HeadObjective
from training.trainer import Trainer


@dataclass(frozen=True)
class HeadRun(AdapterRun):
    """Settings of a run over heads; `exits` counts them: 1, .. K. They read no exit, and the token of the data is their only target.

    Attributes:
        decay: the loss of head k weighs decay ** k.
        own_head: every head has an lm_head of its own.
    """

    topk: int = 1
    epochs: int = 1
    lr: float = 1e-3
    init: str = "fresh"
    decay: float = 0.8
    own_head: bool = False

    def __post_init__(self) -> None:
        if not self.exits:
            raise CatsError("--heads must be at least 1.")
        if not 0 < self.decay <= 1:
            raise CatsError(f"--decay must lie above 0 and at most at 1, not {self.decay}.")
        super().__post_init__()

    @property
    def read_exits(self) -> tuple[int, ...]:
        """See `AdapterRun`."""
        return ()


class HeadTrainer(Trainer):
    """See the module and `Trainer`."""

    unit = "head"

    def __init__(
        self,
        run: HeadRun,
        objective: HeadObjective,
        source: RowSource,
        validation: RowSource,
        accelerator: Accelerator,
        outdir: Path,
        data: str = "",
    ):
        self.head_run, self.head_objective = run, objective
        parts = {k: trained_part(objective, k) for k in objective.places}
        super().__init__(run, parts, source, validation, accelerator, outdir, data)

    @property
    def kind(self) -> str:
        """See `Trainer`."""
        return "Medusa heads with their own lm_heads" if self.head_run.own_head else "Medusa heads"

    def backward(self, rows: np.ndarray, sums: dict[int, torch.Tensor]) -> int:
        """See `Trainer`; losses are means over the positions of the base's own next token, of which head k lacks k an answer."""
        lesson = self.head_objective.lesson(self.source.batch(rows), self.head_run.samples)
        for k in self.head_objective.places:
            loss = self.head_objective.learning_loss(k, lesson)
            (self.head_run.decay**k * loss).backward()
            sums[k] += loss.detach()
        return len(lesson.x_PD)

    def figures(self, batches: Iterable[Batch]) -> dict[int, dict[str, Any]]:
        """See `Trainer`."""
        return self.head_objective.measure(batches)


def trained_part(objective: HeadObjective, k: int) -> nn.Module:
    """The modules of head k."""
    heads = objective.heads
    own = [heads.lm_heads[k - 1]] if heads.shape.own_head else []
    return nn.ModuleList([heads.heads[k - 1], *own])
