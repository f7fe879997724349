"""How well an adapter stands in for the base model on held-out text: the figures printed after each epoch.

Every figure is taken with the true text as context. The accepted length is therefore exact for text that the base
model wrote greedily itself, and an estimate for any other text.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from cats.adapter import AdapterModel
from training.dataset import Batch
from training.objective import Objective

TOPS = (1, 2, 3, 5)


@dataclass
class Agreement:
    """Running sums over counted positions; `summary` turns them into means.

    Attributes:
        drafts: length n of the greedy chain whose accepted length is simulated.
    """

    drafts: int
    positions: int = 0
    loss: float = 0.0
    overlap: float = 0.0
    top: list[int] = field(default_factory=lambda: [0] * len(TOPS))
    passes: int = 0
    committed: int = 0

    def add(self, loss_sum: float, logits_PV: torch.Tensor, target_logits_PV: torch.Tensor, counted_BN: torch.Tensor) -> None:
        """Add one batch; the P positions are the true entries of `counted_BN` in row-major order."""
        logits_PV, target_logits_PV = logits_PV.float(), target_logits_PV.float()
        self.positions += len(logits_PV)
        self.loss += loss_sum
        self.overlap += float(torch.minimum(logits_PV.softmax(-1), target_logits_PV.softmax(-1)).sum())
        best_P1 = target_logits_PV.argmax(-1, keepdim=True)
        hits_Pk = logits_PV.topk(min(TOPS[-1], logits_PV.shape[-1]), dim=-1).indices == best_P1
        for place, count in enumerate(TOPS):
            self.top[place] += int(hits_Pk[:, :count].any(-1).sum())
        self._walk(hits_Pk[:, 0], counted_BN)

    def _walk(self, agrees_P: torch.Tensor, counted_BN: torch.Tensor) -> None:
        agrees_BN = torch.zeros_like(counted_BN)
        agrees_BN[counted_BN] = agrees_P
        for agrees, counted in zip(agrees_BN.tolist(), counted_BN.tolist(), strict=True):
            for span in counted_spans(agrees, counted):
                accepted = chain_steps(span, self.drafts)
                self.passes += len(accepted)
                self.committed += sum(accepted)

    def summary(self) -> dict[str, float]:
        """Means: loss (nats), acceptance probability sum(min(p, q)), top-1/2/3/5 agreement, accepted length (1 = plain decoding)."""
        count = max(1, self.positions)
        return {
            "loss": self.loss / count,
            "acceptance": self.overlap / count,
            **{f"top{places}": hits / count for places, hits in zip(TOPS, self.top, strict=True)},
            "accepted_length": self.committed / max(1, self.passes),
            "positions": self.positions,
        }


def counted_spans(agrees: list[bool], counted: list[bool]) -> list[list[bool]]:
    """Runs of consecutive counted positions, as lists of whether the adapter agrees there."""
    spans: list[list[bool]] = []
    inside = False
    for agree, count in zip(agrees, counted, strict=True):
        if count and not inside:
            spans.append([])
        if count:
            spans[-1].append(agree)
        inside = count
    return spans


def chain_steps(agrees: list[bool], drafts: int) -> list[int]:
    """Tokens committed by each target pass over a span, with greedy chains of `drafts`: the agreeing run plus the target's own token.

    A pass that runs into the end of the span is left out, since its length says nothing about the adapter.
    """
    steps, place = [], 0
    while place < len(agrees):
        accepted = 0
        while accepted < drafts and place + accepted < len(agrees) and agrees[place + accepted]:
            accepted += 1
        if place + accepted >= len(agrees) and accepted < drafts:
            break
        steps.append(accepted + 1)
        place += accepted + 1
    return steps


@torch.no_grad()
def measure(objective: Objective, adapters: dict[int, AdapterModel], batches: Iterable[Batch], drafts: int) -> dict[int, dict[str, float]]:
    """The figures of every adapter over the given batches."""
    sums = {exit_layer: Agreement(drafts) for exit_layer in adapters}
    for batch in batches:
        counted_BN, target_logits_PV = objective.target(batch)
        target = objective.reduced(target_logits_PV)
        for exit_layer, adapter in adapters.items():
            loss, logits_PV = objective.loss(adapter, batch.hidden[exit_layer], counted_BN, target)
            sums[exit_layer].add(float(loss), logits_PV, target_logits_PV, counted_BN)
    return {exit_layer: agreement.summary() for exit_layer, agreement in sums.items()}
