"""Weights on their way from host memory to a CUDA device: two places there, one being filled while the other is multiplied by.

The host waits for nothing: copies run on a stream of their own and wait for the product that used their place last; products wait
for the copy. A place in the ring is free again when its copy has arrived, which the reader asks the event.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cats.errors import CatsError
from cats.planning.plan import STAGING_PLACES
from cats.runtime.arena import Arena


class Staging:
    """See the module.

    Attributes:
        nbytes: of device memory, for all places.
    """

    def __init__(self, device: torch.device, largest: int):
        """Reserve the places, each of `largest` bytes."""
        self.device, self.nbytes = device, STAGING_PLACES * largest
        self._places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(STAGING_PLACES)]
        self._used = [torch.cuda.Event() for _ in range(STAGING_PLACES)]
        self._stream, self._next = torch.cuda.Stream(device), 0
    @contextmanager
    def copied(self, weight: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.cuda.Event]]:
        """A copy on the device for the products queued inside the block, and the event of its arrival."""
        place, self._next = self._next, (self._next + 1) % STAGING_PLACES
        copy = self._places[place][: weight.nbytes].view(weight.dtype).view(weight.shape)
        arrived = torch.cuda.Event()
        products = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[place])
            copy.copy_(weight, non_blocking=True)
            arrived.record(self._stream)
        products.wait_event(arrived)
        try:
            yield copy, arrived
        finally:
            self._used[place].record(products)


def register(arena: Arena) -> None:
    """Page-lock host memory that is copied from."""
    address = arena.tensor(0, torch.uint8, (1,)).data_ptr()
    status = torch.cuda.cudart().cudaHostRegister(address, arena.nbytes, 0)
    if int(status) != 0:
        raise CatsError(f"CUDA could not register {arena.nbytes} bytes of host memory (error {int(status)}); use a smaller ring.")
    weakref.finalize(arena, torch.cuda.cudart().cudaHostUnregister, address)
