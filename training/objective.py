"""The loss of one adapter on one batch: aligned positions, the base's own distribution as target, the chosen arithmetic."""

from dataclasses import dataclass

import torch

from cats.adapter import AdapterModel
from cats.errors import CatsError
from training.dataset import Batch, BestTokens
from training.frozen_head import FrozenHead
from training.losses import Columns, HeadLoss, Target, predicting_positions, reduced_kl, reduced_target, sampled_columns

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLOCKS = {"cpu": 128}  # positions whose logits are made at a time in training
BLOCK = 2048  # the same on accelerators


def stored_best(batch: Batch) -> BestTokens:
    """The best tokens of a batch that has no final states."""
    if batch.best is None:
        raise ValueError("a batch needs final states or best tokens")
    return batch.best


@dataclass(frozen=True)
class Lesson:
    """The P positions of a batch that count (a mask [B, N]), the columns of the head that take part, and the target there."""

    counted_BN: torch.Tensor
    columns: Columns
    target: Target


class Objective:
    """Reduced KL of adapters against the base model.

    In bf16 and fp16 the adapter's arithmetic is in that type and its weights stay float32. fp16 needs no loss scale here:
    losses are summed, so gradients of single positions stay far above fp16's smallest number.

    Args:
        topk: target tokens in the loss; 0 keeps the whole vocabulary.
        precision: "fp32", "bf16" or "fp16".
        samples: tokens drawn for the normaliser of the learning loss, beside all targets of the batch; 0 sums over the vocabulary.
    """

    def __init__(self, head: FrozenHead, topk: int, precision: str, samples: int = 0):
        self.head, self.topk, self.half, self.samples = head, topk, HALVES.get(precision), samples
        self.block = BLOCKS.get(head.lm_head_VD.device.type, BLOCK)

    def learning_target(self, batch: Batch) -> Lesson:
        """What the adapters learn from a batch; shared by all exits."""
        counted_BN = predicting_positions(batch.counted_BN)
        target = self.from_states(batch.final[counted_BN]) if batch.final is not None else self.from_best(batch, counted_BN)
        seed = 0 if target.indices is None else int(target.indices.sum())  # from the batch alone: a resumed run draws the same
        return Lesson(counted_BN, *sampled_columns(self.head.lm_head_VD, target, self.samples, seed))

    def from_states(self, final_PD: torch.Tensor) -> Target:
        """The distribution to learn at P positions; their logits are made a block at a time."""
        pieces = [self.reduced(self.head.target_logits(piece_PD)) for piece_PD in final_PD.split(self.block)]
        indices = [piece.indices for piece in pieces if piece.indices is not None]
        return Target(torch.cat([piece.probabilities for piece in pieces]), torch.cat(indices) if indices else None)

    def from_best(self, batch: Batch, counted_BN: torch.Tensor) -> Target:
        """The same from stored probabilities of the best tokens; no head is needed."""
        best = stored_best(batch)
        if not 0 < self.topk <= best.indices.shape[-1]:
            raise CatsError(
                f"the stored states hold the {best.indices.shape[-1]} best tokens of each position, and --topk {self.topk} asks for "
                f"{self.topk or 'all'}; lower --topk, or run ge_data with more --targets."
            )
        kept = best.probabilities[counted_BN][:, : self.topk].float()
        return Target(kept / kept.sum(-1, keepdim=True), best.indices[counted_BN][:, : self.topk].long())

    def learning_loss(self, adapter: AdapterModel, hidden_BND: torch.Tensor, lesson: Lesson) -> torch.Tensor:
        """Summed loss (a scalar) that carries gradients to the adapter; `loss`, in less time and memory."""
        states_PD = self.states(adapter, hidden_BND)[lesson.counted_BN]
        total: torch.Tensor = HeadLoss.apply(states_PD, lesson.columns, lesson.target, self.block)
        return total

    def gain_loss(self, unit_PD: torch.Tensor, gain_D: torch.Tensor, lesson: Lesson, pull: float) -> torch.Tensor:
        """Mean loss of `gain_D * unit_PD` in the place of an adapter's outputs at the counted positions, gradient of the gain included.

        `pull` / 2 times the square of the gain is added to it.
        """
        gain_D.grad = None
        loss: torch.Tensor = HeadLoss.apply(unit_PD * gain_D, lesson.columns, lesson.target, self.block) / max(1, len(unit_PD))
        loss = loss + pull / 2 * gain_D.square().sum()
        loss.backward()
        return loss.detach()

    def target(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The P positions that count (as a mask [B, N]) and the base's logits there [P, V], for validation."""
        counted_BN = predicting_positions(batch.counted_BN)
        if batch.final is not None:
            return counted_BN, self.head.target_logits(batch.final[counted_BN])
        best = stored_best(batch)
        chosen = BestTokens(best.probabilities[counted_BN], best.indices[counted_BN])
        return counted_BN, chosen.logits(len(self.head.lm_head_VD))

    def reduced(self, target_logits_PV: torch.Tensor) -> Target:
        """The distribution that the adapters learn."""
        return reduced_target(target_logits_PV, self.topk)

    def loss(
        self, adapter: AdapterModel, hidden_BND: torch.Tensor, counted_BN: torch.Tensor, target: Target
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss (a scalar) and the adapter's logits [P, V] at the counted positions; the head sees no other position."""
        logits_PV = self.head.logits(self.states(adapter, hidden_BND)[counted_BN])
        return reduced_kl(logits_PV, target), logits_PV

    def states(self, adapter: AdapterModel, hidden_BND: torch.Tensor) -> torch.Tensor:
        """The adapter's outputs [B, N, D], in the chosen arithmetic."""
        hidden_BND = hidden_BND.to(self.half or torch.float32)
        with torch.autocast(hidden_BND.device.type, dtype=self.half, enabled=self.half is not None):
            return adapter(hidden_BND)
