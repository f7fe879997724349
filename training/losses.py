"""What an adapter learns: the base model's next-token distribution at the same position. Pure tensor arithmetic.

Alignment, as inference uses it: the hidden state at position i has seen tokens 0..i; from it the adapter predicts
token i+1; its target is the base model's distribution at position i; it counts when token i+1 is an answer token.
States and targets therefore share one index, and only the mask is shifted.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """The distribution to learn at P positions: `probabilities` [P, k] of the tokens `indices` [P, k] (None: the whole vocabulary)."""

    probabilities: torch.Tensor
    indices: torch.Tensor | None


def predicting_positions(counted_BN: torch.Tensor) -> torch.Tensor:
    """Positions whose next token counts: entry i of the result is entry i+1 of the mask; the last is false. Shape [B, N], bool."""
    shifted = torch.zeros_like(counted_BN)
    shifted[:, :-1] = counted_BN[:, 1:]
    return shifted


def reduced_target(logits_PV: torch.Tensor, topk: int) -> Target:
    """The target's `topk` most likely tokens, renormalised over themselves (paper, equations 5 to 7); 0 or >= V keeps all."""
    logits_PV = logits_PV.float()
    if topk <= 0 or topk >= logits_PV.shape[-1]:
        return Target(logits_PV.softmax(-1), None)
    values_Pk, indices_Pk = logits_PV.topk(topk, dim=-1)
    return Target(values_Pk.softmax(-1), indices_Pk)


def reduced_kl(logits_PV: torch.Tensor, target: Target) -> torch.Tensor:
    """Sum over positions of the cross-entropy in nats between the target and the adapter's softmax over all V (equation 8).

    It differs from the KL divergence by the target's entropy, which does not depend on the adapter. The sum, not the
    mean, is returned so that micro-batches of unequal size add up to the loss of the whole batch.
    """
    logits_PV = logits_PV.float()
    picked_Pk = logits_PV if target.indices is None else logits_PV.gather(-1, target.indices)
    return (logits_PV.logsumexp(-1) - (target.probabilities * picked_Pk).sum(-1)).sum()


class HeadLoss(torch.autograd.Function):
    """`reduced_kl` of `y_PD @ head_VD.T`, a block of positions at a time: neither the logits [P, V] nor their gradient are ever whole.

    The gradient of a sum over positions is known as soon as a block's logits are, so the forward makes it and the
    backward only scales it. The head is frozen and gets none. On a CPU a block's logits stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, head_VD: torch.Tensor, target: Target, block: int) -> torch.Tensor:
        """The summed loss, a float32 scalar; arithmetic of the matrix products in the head's dtype."""
        gradient_PD, total = torch.empty_like(y_PD, dtype=head_VD.dtype), torch.zeros((), device=y_PD.device)
        for start in range(0, len(y_PD), block):
            piece = slice(start, start + block)
            log_probabilities = torch.log_softmax((y_PD[piece].to(head_VD.dtype) @ head_VD.T).float(), dim=-1)
            wanted = target.probabilities[piece]
            if target.indices is None:
                total -= (wanted * log_probabilities).sum()
                slope = log_probabilities.exp_().sub_(wanted)
            else:
                total -= (wanted * log_probabilities.gather(-1, target.indices[piece])).sum()
                slope = log_probabilities.exp_().scatter_add_(-1, target.indices[piece], -wanted)
            torch.mm(slope.to(head_VD.dtype), head_VD, out=gradient_PD[piece])
        ctx.save_for_backward(gradient_PD.to(y_PD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient with respect to `y_PD` only."""
        (gradient_PD,) = ctx.saved_tensors
        return gradient_PD * scale.to(gradient_PD.dtype), None, None, None
