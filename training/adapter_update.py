"""The optimizer of one adapter or Medusa head: mean gradient over the step, clipping, and a guard that keeps NaN out of the weights."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from cats.errors import CatsError
from training.adapter_run import AdapterRun
from training.muon import Muon

SKIPPED_IN_A_ROW = 25
BETAS = (0.9, 0.95)


class AdapterUpdate:
    """Everything between summed gradients and new weights of one module; modules never influence each other.

    Args:
        what: the module's name in messages.
    """

    def __init__(self, adapter: nn.Module, run: AdapterRun, accelerator: Accelerator, what: str):
        self.adapter, self.run, self.accelerator, self.what = adapter, run, accelerator, what
        self.parameters = list(adapter.parameters())
        self.optimizers = build_optimizers(adapter, run)
        self.skipped = 0

    def step(self, positions: float, scale: float) -> float:
        """Update the weights with learning rate `scale` times its peak and return the gradient's norm.

        Args:
            positions: counted positions of the whole step, over all micro-batches and processes; losses were summed.
        """
        self._sum_over_processes()
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.div_(max(1.0, positions))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.run.clip or float("inf"))
        finite = bool(torch.isfinite(norm))
        self._count_skipped(finite)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _count_skipped(self, finite: bool) -> None:
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= SKIPPED_IN_A_ROW:
            raise CatsError(
                f"the gradient of {self.what} was not finite for {SKIPPED_IN_A_ROW} steps in a row; lower --lr or use --precision fp32."
            )

    def _sum_over_processes(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:  # this process had no rows
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None])
            summed = self.accelerator.reduce(flat, "sum")
            for parameter, piece in zip(self.parameters, summed.split([each.numel() for each in self.parameters]), strict=True):
                parameter.grad = piece.view_as(parameter).clone()

    def state(self) -> dict[str, Any]:
        """What the next step depends on."""
        optimizers = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        return {"adapter": self.adapter.state_dict(), "optimizers": optimizers, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        self.adapter.load_state_dict(state["adapter"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.skipped = state["skipped"]


def build_optimizers(adapter: nn.Module, run: AdapterRun) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers of one module with their peak learning rates: AdamW for all, or Muon for matrices and AdamW for norms."""
    matrices = [parameter for parameter in adapter.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in adapter.parameters() if parameter.ndim != 2]
    norms = {"params": others, "weight_decay": 0.0}
    if run.optimizer == "muon":
        half = torch.bfloat16 if run.precision == "bf16" else None
        muon = Muon(matrices, lr=run.muon_lr, weight_decay=run.weight_decay, iterate_in=half)
        return [(muon, run.muon_lr), (torch.optim.AdamW([norms], lr=run.lr, betas=BETAS), run.lr)]
    groups = [{"params": matrices, "weight_decay": run.weight_decay}, norms]
    return [(torch.optim.AdamW(groups, lr=run.lr, betas=BETAS), run.lr)]
