"""What an adapter learns: the base model's next-token distribution at the same position. Pure tensor arithmetic.

Alignment, as inference uses it: the hidden state at position i has seen tokens 0..i; from it the adapter predicts
token i+1; its target is the base model's distribution at position i; it counts when token i+1 is an answer token.
States and targets therefore share one index, and only the mask is shifted.
"""

import math
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


@dataclass(frozen=True)
class Columns:
    """The tokens over which a normaliser is summed: `head_CD` are their rows of the head, `log_weight_C` how many tokens each stands for.

    Without `log_weight_C` every token of the vocabulary is there and stands for itself.
    """

    head_CD: torch.Tensor
    log_weight_C: torch.Tensor | None = None


def sampled_columns(head_VD: torch.Tensor, target: Target, samples: int, seed: int) -> tuple[Columns, Target]:
    """All target tokens of a batch, and `samples` of the other tokens, each of which stands for (V - targets) / samples tokens.

    The normaliser that they give is right on average (its logarithm is slightly low, by half its relative variance). Where this
    would not halve the columns, or the targets are whole distributions, everything stays as it is.

    Returns:
        the columns, and the target with indices into them.
    """
    vocabulary = len(head_VD)
    if target.indices is None or samples <= 0:
        return Columns(head_VD), target
    wanted, places = torch.unique(target.indices, return_inverse=True)
    if len(wanted) + samples > vocabulary // 2:
        return Columns(head_VD), target
    others = torch.ones(vocabulary, dtype=torch.bool)
    others[wanted.cpu()] = False
    generator = torch.Generator().manual_seed(seed)
    drawn = others.nonzero()[:, 0][torch.randperm(vocabulary - len(wanted), generator=generator)[:samples]].to(wanted.device)
    weight = torch.zeros(len(wanted) + samples, device=wanted.device)
    weight[len(wanted) :] = math.log((vocabulary - len(wanted)) / samples)
    return Columns(head_VD[torch.cat([wanted, drawn])], weight), Target(target.probabilities, places)


class HeadLoss(torch.autograd.Function):
    """`reduced_kl` of `y_PD @ head.T`, a block of positions at a time: neither the logits [P, V] nor their gradient are ever whole.

    The gradient of a sum over positions is known as soon as a block's logits are, so the forward makes it and the
    backward only scales it. The head is frozen and gets none. On a CPU a block's logits stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, y_PD: torch.Tensor, columns: Columns, target: Target, block: int) -> torch.Tensor:
        """The summed loss, a float32 scalar; arithmetic of the matrix products in the head's dtype."""
        head_CD = columns.head_CD
        gradient_PD, total = torch.empty_like(y_PD, dtype=head_CD.dtype), torch.zeros((), device=y_PD.device)
        for start in range(0, len(y_PD), block):
            piece = slice(start, start + block)
            logits_PC = (y_PD[piece].to(head_CD.dtype) @ head_CD.T).float()
            wanted = target.probabilities[piece]
            total -= (wanted * (logits_PC if target.indices is None else logits_PC.gather(-1, target.indices[piece]))).sum()
            if columns.log_weight_C is not None:
                logits_PC += columns.log_weight_C
            normaliser_P1 = logits_PC.logsumexp(-1, keepdim=True)
            total += normaliser_P1.sum()
            slope = logits_PC.sub_(normaliser_P1).exp_()
            slope = slope.sub_(wanted) if target.indices is None else slope.scatter_add_(-1, target.indices[piece], -wanted)
            torch.mm(slope.to(head_CD.dtype), head_CD, out=gradient_PD[piece])
        ctx.save_for_backward(gradient_PD.to(y_PD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Gradient with respect to `y_PD` only."""
        (gradient_PD,) = ctx.saved_tensors
        return gradient_PD * scale.to(gradient_PD.dtype), None, None, None
