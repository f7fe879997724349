"""Muon (Jordan et al. 2024): momentum, orthogonalised by a Newton-Schulz iteration, as the update of a matrix.

torch.optim.Muon always runs the iteration in bfloat16, which CPUs without bfloat16 units do about a hundred times slower than
float32; this one stays in the parameters' precision unless told otherwise, and iterates all matrices of one shape in one batch.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices_NRC: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices, approximately: singular values end between 0.7 and 1.2. Shape [N, rows, columns]."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D parameters: Nesterov momentum, decoupled weight decay, step scaled by sqrt(max(1, rows / columns)).

    Args:
        iterate_in: dtype of the Newton-Schulz iteration; None: that of the parameters.
    """

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterate_in: torch.dtype | None = None,
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.iterate_in = iterate_in

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there. `closure` is accepted for the interface and must be None."""
        assert closure is None
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                self._update(parameters, group, max(1.0, rows / columns) ** 0.5)

    def _update(self, parameters: list[torch.nn.Parameter], group: dict[str, Any], scale: float) -> None:
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(momentum, group["momentum"]))
        stacked = torch.stack(directions)
        turned = orthogonalise(stacked.to(self.iterate_in or stacked.dtype)).to(stacked.dtype)
        for parameter, direction in zip(parameters, turned, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * scale)
