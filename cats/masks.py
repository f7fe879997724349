"""Who may see whom: additive attention biases for rows that continue a cached prefix."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch


class Paths(NamedTuple):
    """What each of T rows sees, as slots of its cache: [0, seen_T[t]), then others[ends[t] : ends[t + 1]], in the order of positions."""

    seen_T: np.ndarray
    others: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Sight:
    """What the rows of a group see, made when it is asked for: as a bias to be added, or as paths to be followed.

    Attributes:
        bias: [1, 1, T, S + T]; None means causal (no cache) or everything visible (one query).
        paths: None where only the bias is known.
    """

    bias: Callable[[], torch.Tensor | None]
    paths: Callable[[], Paths] | None = None


def tree_sight(visible_QT: np.ndarray, prefix: int, dtype: torch.dtype, device: torch.device, before: int = 0) -> Sight:
    """Of tree rows, see `tree_bias`."""
    return Sight(cache(partial(tree_bias, visible_QT, prefix, dtype, device, before)), partial(tree_paths, visible_QT, prefix, before))


def causal_sights(count: int, rows: int, dtype: torch.dtype, device: torch.device, prefix: int = 0) -> list[Sight]:
    """Of `count` consecutive positions after `prefix` cached ones, in groups of `rows`."""
    biases = cache(partial(causal_biases, count, rows, dtype, device, prefix))

    def sight(number: int) -> Sight:
        start = number * rows
        return Sight(lambda: biases()[number], partial(causal_paths, min(rows, count - start), prefix + start))

    return [sight(number) for number in range(-(-count // rows))]


def causal_sight(rows: int, prefix: int, dtype: torch.dtype, device: torch.device) -> Sight:
    """Of `rows` consecutive positions after `prefix` cached ones."""
    return Sight(cache(partial(causal_bias, rows, prefix, dtype, device)), partial(causal_paths, rows, prefix))


def causal_paths(rows: int, prefix: int) -> Paths:
    """Of consecutive positions: every slot up to their own."""
    return Paths(np.arange(prefix + 1, prefix + rows + 1), np.empty(0, np.int64), np.zeros(rows + 1, np.int64))


def tree_paths(visible_QT: np.ndarray, prefix: int, before: int = 0) -> Paths:
    """Of tree rows: the prefix and the columns marked, which stand in the order of positions; see `tree_bias`."""
    columns = [np.flatnonzero(visible_T) for visible_T in visible_QT]
    leading = [int((own == np.arange(len(own))).sum()) for own in columns]
    seen = [*range(prefix - before + 1, prefix + 1), *(prefix + count for count in leading)]
    rest = [np.empty(0, np.int64)] * before + [prefix + own[count:] for own, count in zip(columns, leading, strict=True)]
    ends = np.cumsum([0, *map(len, rest)])
    return Paths(np.array(seen), np.concatenate(rest) if rest else np.empty(0, np.int64), ends)


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


def causal_biases(count: int, rows: int, dtype: torch.dtype, device: torch.device, prefix: int = 0) -> list[torch.Tensor | None]:
    """Biases as of `causal_bias` for `count` consecutive positions after `prefix` cached ones, in groups of `rows`: views of the last
    group's."""
    end = prefix + count
    starts = range(prefix, end, rows)
    last = starts[-1]
    stairs = causal_bias(min(rows, count), last, dtype, device)
    biases: list[torch.Tensor | None] = []
    for start in starts:
        height = min(rows, end - start)
        alone = start == 0 or height == 1
        biases.append(None if alone or stairs is None else stairs[:, :, :height, last - start : last + height])
    return biases
