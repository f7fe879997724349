"""The embedding table: resident, or its rows read from the checkpoint when their tokens occur."""

import torch
from torch import nn
from torch.nn import functional

from cats.checkpoint import TensorPlace
from cats.dtypes import rounded
from cats.runtime.arena import PAGE_BYTES, Arena
from cats.runtime.direct_file import tensor_in_window, window
from cats.runtime.store import Store

ROW = "a row of the embedding table"


class Embedding(nn.Module):
    """An embedding table with the parameter name of `nn.Embedding`, perhaps narrower than the arithmetic."""

    weight: torch.Tensor

    def __init__(self, weight_VD: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.weight, self._dtype = weight_VD, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [..] -> states [.., D] in the compute dtype."""
        return functional.embedding(ids, self.weight).to(self._dtype)


class EmbeddingRows(nn.Module):
    """A table on the disk, of which memory holds one row at a time.

    Args:
        dtype: that values are rounded to.
        compute: of the states.
    """

    def __init__(self, place: TensorPlace, store: Store, dtype: torch.dtype, compute: torch.dtype):
        super().__init__()
        self._place, self._store, self._dtype, self._compute = place, store, dtype, compute
        self._row_bytes = place.nbytes // place.shape[0]
        self._arena = Arena(self._row_bytes + 2 * PAGE_BYTES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [..] -> states [.., D] in the compute dtype."""
        tokens = ids.reshape(-1).tolist()
        self._store.file(self._place.path).check_unchanged(ROW)
        rows = {token: self._row(token) for token in dict.fromkeys(tokens)}
        return torch.stack([rows[token] for token in tokens]).view(*ids.shape, -1)

    def _row(self, token: int) -> torch.Tensor:
        table = self._place
        row = TensorPlace(table.path, table.offset + token * self._row_bytes, self._row_bytes, table.dtype, table.shape[1:])
        start, length = window(row.offset, row.nbytes)
        needed = row.offset + row.nbytes - start
        self._store.file(row.path).read_into(self._arena.view[:length], start, needed, ROW)
        self._store.row_bytes += length
        return rounded(tensor_in_window(self._arena, 0, row), self._dtype).to(self._compute, copy=True)
