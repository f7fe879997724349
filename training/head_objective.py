"""What Medusa's heads learn: tokens further ahead than the next, from the base's last hidden state. Tensor arithmetic, no model.

Alignment: the state at position i has seen tokens 0..i and predicts token i+1 by the base's own head; head k predicts token
i+1+k. It counts where all of tokens i+1..i+1+k are answer tokens, so that no head looks past the end of an answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from cats.errors import CatsError
from cats.medusa_heads import MedusaHeads
from training.dataset import Batch
from training.frozen_head import FrozenHead
from training.losses import Columns, HeadLoss, Target, predicting_positions, sampled_columns
from training.objective import BLOCK, BLOCKS, HALVES

RANKS = 10
"""Guesses of a head whose accuracies are measured."""


@dataclass(frozen=True)
class HeadLesson:
    """A batch as all heads see it.

    Attributes:
        x_PD: states that enter the lm_head at the P positions whose next token counts.
        counted: head k -> which of the P positions count for it, bool [P].
        targets: head k -> the tokens there, as places in `columns`, int64 [its positions].
    """

    x_PD: torch.Tensor
    counted: dict[int, torch.Tensor]
    targets: dict[int, torch.Tensor]
    columns: Columns


def reaching_positions(counted_BN: torch.Tensor, heads: Iterable[int]) -> dict[int, torch.Tensor]:
    """Head k -> positions i with tokens i+1..i+1+k all counted, bool [B, N]; 0 is the base's own next token."""
    first = predicting_positions(counted_BN)
    reach = {0: first}
    for k in range(1, max(heads) + 1):
        reach[k] = first & predicting_positions(reach[k - 1])
    return reach


class HeadObjective:
    """Cross-entropy of the heads against the tokens of the data.

    Args:
        frozen: the base's final norm and head.
        samples: see `sampled_columns`; heads with an lm_head of their own sum over the vocabulary in any case.
        precision: "fp32", "bf16" or "fp16": of the arithmetic; weights stay float32.
    """

    def __init__(self, heads: MedusaHeads, frozen: FrozenHead, precision: str, samples: int):
        self.heads, self.frozen, self.half, self.samples = heads, frozen, HALVES.get(precision), samples
        self.block = BLOCKS.get(frozen.lm_head_VD.device.type, BLOCK)
        self.places = range(1, heads.shape.heads + 1)

    def lesson(self, batch: Batch, samples: int) -> HeadLesson:
        """What a batch teaches; the normaliser's columns are drawn from the batch alone, so that a resumed run draws the same."""
        if batch.final is None or batch.ids_BN is None:
            raise CatsError(
                "the stored states keep the base's best tokens in the place of its final states; run ge_data without --targets."
            )
        reach = reaching_positions(batch.counted_BN, self.places)
        ids_BN, device = batch.ids_BN, batch.final.device
        tokens = Target(torch.ones(int(batch.counted_BN.sum()), 1, device=device), ids_BN[batch.counted_BN][:, None])
        seed = int(ids_BN.sum())
        columns, placed = sampled_columns(self.frozen.lm_head_VD, tokens, 0 if self.heads.shape.own_head else samples, seed)
        assert placed.indices is not None
        place_BN = torch.zeros_like(ids_BN)
        place_BN[batch.counted_BN] = placed.indices[:, 0]
        x_PD = self.frozen.normed(batch.final[reach[0]]).to(self.half or torch.float32)
        counted = {k: reach[k][reach[0]] for k in self.places}
        targets = {k: place_BN.roll(-1 - k, dims=1)[reach[k]] for k in self.places}
        return HeadLesson(x_PD, counted, targets, columns)

    def states(self, k: int, lesson: HeadLesson) -> torch.Tensor:
        """What head k gives to the lm_head where it counts, in the chosen arithmetic."""
        with torch.autocast(lesson.x_PD.device.type, dtype=self.half, enabled=self.half is not None):
            return self.heads.states(k - 1, lesson.x_PD[lesson.counted[k]])

    def learning_loss(self, k: int, lesson: HeadLesson) -> torch.Tensor:
        """Summed loss of head k in nats (a scalar) that carries gradients to its weights."""
        y_PD, target_P = self.states(k, lesson), lesson.targets[k]
        if self.heads.shape.own_head:
            return functional.cross_entropy(self.logits(k, y_PD).float(), target_P, reduction="sum")
        target = Target(torch.ones(len(target_P), 1, device=target_P.device), target_P[:, None])
        total: torch.Tensor = HeadLoss.apply(y_PD, lesson.columns, target, self.block)
        return total

    def logits(self, k: int, y_PD: torch.Tensor) -> torch.Tensor:
        """Logits [P, V] over the whole vocabulary."""
        if not self.heads.shape.own_head:
            return self.frozen.logits(y_PD)
        with torch.autocast(y_PD.device.type, dtype=self.half, enabled=self.half is not None):
            logits_PV: torch.Tensor = self.heads.lm_heads[k - 1](y_PD)
            return logits_PV

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[int, dict[str, float]]:
        """Per head over the given batches: loss (nats, whole vocabulary), share of tokens among its 1, 2, .. 10 best guesses, positions."""
        sums = {k: HeadFigures() for k in self.places}
        for batch in batches:
            lesson = self.lesson(batch, samples=0)
            for k, figures in sums.items():
                figures.add(self.logits(k, self.states(k, lesson)).float(), lesson.targets[k])
        return {k: figures.summary() for k, figures in sums.items()}


class HeadFigures:
    """Running sums of one head over positions."""

    def __init__(self) -> None:
        self.positions, self.loss, self.hits = 0, 0.0, torch.zeros(RANKS, dtype=torch.int64)

    def add(self, logits_PV: torch.Tensor, target_P: torch.Tensor) -> None:
        """Add P positions."""
        self.positions += len(target_P)
        self.loss += float(functional.cross_entropy(logits_PV, target_P, reduction="sum"))
        ranks = min(RANKS, logits_PV.shape[-1])
        hits_Pk = logits_PV.topk(ranks, dim=-1).indices == target_P[:, None]
        self.hits[:ranks] += hits_Pk.sum(0).cpu()

    def summary(self) -> dict[str, Any]:
        """Means; see `HeadObjective.measure`."""
        count = max(1, self.positions)
        within = (self.hits.cumsum(0) / count).tolist()
        return {"loss": self.loss / count} | {f"top{rank}": share for rank, share in enumerate(within, 1)} | {"positions": self.positions}


def by_rank(figures: dict[str, float]) -> list[float]:
    """How often the guess of rank 1, 2, .. was the token, from the shares of `HeadFigures.summary`."""
    within = [0.0, *(figures[f"top{rank}"] for rank in range(1, RANKS + 1))]
    return [max(0.0, after - before) for before, after in pairwise(within)]
