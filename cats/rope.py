"""Rotary position embeddings as a table: computed once by transformers' own module, then looked up by position."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PretrainedConfig

from cats.families import check_rope


class RopeTable:
    """cos and sin of every position below `context`, in the dtype and on the device last asked for.

    Args:
        charge: told of the bytes that a new table holds more than the last one.
    """

    def __init__(self, rotary: nn.Module, config: PretrainedConfig, context: int, charge: Callable[[int], object] = int):
        check_rope(config)
        self._rotary, self._context, self.charge = rotary, context, charge
        self._cos_ND: torch.Tensor | None = None
        self._sin_ND: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._cos_ND is None or self._sin_ND is None else self._cos_ND.nbytes + self._sin_ND.nbytes

    def rows(self, positions_T: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) at the given positions, each of shape [1, T, head_dim]."""
        if self._cos_ND is None or self._sin_ND is None or self._cos_ND.dtype != dtype or self._cos_ND.device != positions_T.device:
            everything = torch.arange(self._context, device=positions_T.device)[None]
            like = torch.empty(0, dtype=dtype, device=positions_T.device)
            cos, sin = self._rotary.to(positions_T.device)(like, position_ids=everything)
            self.charge(cos.nbytes + sin.nbytes - self.nbytes)
            self._cos_ND, self._sin_ND = cos[0], sin[0]
        return self._cos_ND[positions_T][None], self._sin_ND[positions_T][None]
