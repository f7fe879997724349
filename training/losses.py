"""What an adapter learns: the base model's next-token distribution at the same position. Pure tensor arithmetic.

Alignment, as inference uses it: the hidden state at position i has seen tokens 0..i; from it the adapter predicts
token i+1; its target is the base model's distribution at position i; it counts when token i+1 is an answer token.
States and targets therefore share one index, and only the mask is shifted.
"""

from dataclasses import dataclass

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
