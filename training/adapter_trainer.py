"""Training adapters of several exits: what the loop of `training.trainer` asks of them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cats.adapter import BLOCK_FIELD, BLOCKS, AdapterModel
from training.adapter_run import AdapterRun
from training.agreement import measure
from training.dataset import Batch, RowSource
from training.objective import Objective
from training.trainer import Trainer


class AdapterTrainer(Trainer):
    """See `Trainer`; one part is one adapter.

    Args:
        adapters: exit layer -> float32 adapter, on the accelerator's device.
    """

    unit = "exit"

    def __init__(
        self,
        run: AdapterRun,
        adapters: dict[int, AdapterModel],
        objective: Objective,
        source: RowSource,
        validation: RowSource,
        accelerator: Accelerator,
        outdir: Path,
        data: str = "",
    ):
        self.adapters, self.objective = adapters, objective
        super().__init__(run, adapters, source, validation, accelerator, outdir, data)

    @property
    def kind(self) -> str:
        """See `Trainer`."""
        return "+".join(sorted({getattr(adapter.config, BLOCK_FIELD, BLOCKS[0]) for adapter in self.adapters.values()}))

    def backward(self, rows: np.ndarray, sums: dict[int, torch.Tensor]) -> int:
        """See `Trainer`."""
        batch = self.source.batch(rows)
        lesson = self.objective.learning_target(batch)
        for exit_layer, adapter in self.adapters.items():
            loss = self.objective.learning_loss(adapter, batch.hidden[exit_layer], lesson)
            loss.backward()
            sums[exit_layer] += loss.detach()
        return len(lesson.target.probabilities)

    def figures(self, batches: Iterable[Batch]) -> dict[int, dict[str, float]]:
        """See `Trainer`, and `Agreement.summary`."""
        return measure(self.objective, self.adapters, batches, self.run.drafts)
