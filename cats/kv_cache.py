"""Keys and values of everything seen so far, in one preallocated block; tree nodes sit behind the committed tokens.

Slot `i < length` belongs to committed position `i`. Node `j` of the current tree owns slot `length + j`, in every
layer, whether or not the layer has computed it yet: what has not been computed is never visible through the mask.
Committing a path moves its few rows to the front; nothing else is ever copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PretrainedConfig

from cats.masks import sent


class KVCache(Cache):
    """A transformers `Cache` for one sequence. `storage` has shape [layers, 2, 1, kv_heads, capacity, head_dim].

    Args:
        touched: have the memory from now on, as a budget counts it; else pages are had when they are first written.
    """

    def __init__(
        self, config: PretrainedConfig, layers: int, capacity: int, dtype: torch.dtype, device: torch.device, touched: bool = False
    ):
        super().__init__(layers=[])
        shape = (layers, 2, 1, config.num_key_value_heads, capacity, head_dim(config))
        self._hold(torch.empty(shape, dtype=dtype, device=device).zero_() if touched else torch.zeros(shape, dtype=dtype, device=device))
        self._slots: slice | torch.Tensor = slice(0, 0)
        self._end = 0
        self.length = 0

    def _hold(self, storage: torch.Tensor) -> None:
        self.storage = storage
        self._keys = [storage[layer, 0] for layer in range(len(storage))]
        self._values = [storage[layer, 1] for layer in range(len(storage))]

    @property
    def capacity(self) -> int:
        """Slots in all, committed and tree together."""
        return self.storage.shape[4]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whether used or not."""
        return self.storage.nbytes

    def grow(self, capacity: int) -> None:
        """Have so many slots; committed positions stay."""
        before = self.storage
        self._hold(before.new_zeros((*before.shape[:4], capacity, before.shape[5])))
        self.storage[:, :, :, :, : self.length] = before[:, :, :, :, : self.length]

    def free(self) -> None:
        """Give the memory back; the cache is of no use then."""
        self._keys, self._values = [], []
        self.storage = self.storage.new_empty(0)

    @contextmanager
    def writing(self, slots: slice | torch.Tensor, end: int) -> Iterator[None]:
        """Within this block `update` writes at `slots` (a slice, or indices [T]) and returns the slots below `end`."""
        self.aim(slots, end)
        try:
            yield
        finally:
            self._slots, self._end = slice(0, 0), 0

    def aim(self, slots: slice | torch.Tensor, end: int) -> None:
        """Let `update` write at `slots` and return the slots below `end`, from now on."""
        if end > self.capacity:
            raise RuntimeError(f"slot {end - 1} is beyond the cache's {self.capacity} slots: a method grew more nodes than its max_nodes")
        self._slots, self._end = slots, end

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new entries [1, kv_heads, T, head_dim] of one layer; return all keys and values up to the current end."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[:, :, self._slots] = key_states
        values[:, :, self._slots] = value_states
        return keys[:, :, : self._end], values[:, :, : self._end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed positions."""
        return self.length

    def keep(self, path: Sequence[int]) -> None:
        """Commit the tree nodes `path`: their rows become the next committed positions, all other nodes are forgotten."""
        path = list(path)
        if path != list(range(len(path))):
            rows = sent(self.length + torch.tensor(path), self.storage.device)
            self.storage[:, :, :, :, self.length : self.length + len(path)] = self.storage[:, :, :, :, rows]
        self.length += len(path)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.length = min(self.length, length)


def cache_bytes(config: PretrainedConfig, slots: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one layer."""
    return 2 * config.num_key_value_heads * head_dim(config) * slots * dtype.itemsize


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head, given or derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
