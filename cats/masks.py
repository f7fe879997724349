"""Who may see whom: additive attention biases for rows that continue a cached prefix."""

import numpy as np
import torch


def tree_bias(visible_QT: np.ndarray, prefix: int, dtype: torch.dtype, device: torch.device, before: int = 0) -> torch.Tensor | None:
    """Bias [1, 1, before + Q, prefix + T]: every row sees the prefix as below, tree rows see the marked tree columns.

    Args:
        visible_QT: bool; row q may see tree column t.
        prefix: committed positions, the last `before` of which are themselves query rows of this pass.
        before: rows ahead of the tree rows, for committed positions not yet cached; causal among themselves.

    Returns:
        None where nothing is hidden from a single row (the kernel then needs no mask).
    """
    rows, columns = visible_QT.shape
    if before == 0 and rows == 1 and visible_QT.all():
        return None
    hidden = torch.zeros(before + rows, prefix + columns, dtype=torch.bool)
    hidden[before:, prefix:] = torch.from_numpy(~visible_QT)
    if before:
        hidden[:before, prefix - before :] = torch.ones(before, before + columns, dtype=torch.bool).triu(1)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(sent(hidden, device), float("-inf"))
    return bias[None, None]


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on the device; neither side waits for the other."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def causal_bias(rows: int, prefix: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """Bias [1, 1, rows, prefix + rows] for `rows` consecutive positions after `prefix` cached ones; None where kernels do it alone."""
    if prefix == 0 or rows == 1:
        return None
    hidden = torch.ones(rows, prefix + rows, dtype=torch.bool, device=device).triu(prefix + 1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[None, None]


def causal_biases(count: int, rows: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor | None]:
    """Biases as of `causal_bias` for `count` consecutive positions from 0 on, in groups of `rows`: views of the last group's."""
    starts = range(0, count, rows)
    last = starts[-1]
    stairs = causal_bias(rows, last, dtype, device)
    biases: list[torch.Tensor | None] = []
    for start in starts:
        height = min(rows, count - start)
        alone = start == 0 or height == 1
        biases.append(None if alone or stairs is None else stairs[:, :, :height, last - start : last + height])
    return biases
