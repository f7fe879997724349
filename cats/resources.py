"""What methods keep with a model for its whole life: made once, charged to the model's ledger, closed with it."""

import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cats.errors import ContractError


class Resources:
    """Things by the configuration that they were made for; `charge` is told their bytes."""

    def __init__(self, charge: Callable[[int], None]):
        self._charge = charge
        self._things: dict[Hashable, Any] = {}
        self._closing = ExitStack()
        self._making = threading.RLock()

    def get(self, key: Hashable, make: Callable[[], Any], promised: int = 0) -> Any:
        """What `key` stands for, made now if it has not been.

        Args:
            promised: bytes that are charged before it is made, so that a budget refuses first; what it truly takes replaces them.
        """
        with self._making:
            if key not in self._things:
                self._things[key] = self._made(make, promised)
            return self._things[key]

    def _made(self, make: Callable[[], Any], promised: int) -> Any:
        with ExitStack() as undoing:
            self._take(promised, undoing)
            thing = make()
            if hasattr(thing, "close"):
                undoing.callback(thing.close)
            self._take(bytes_of(thing) - promised, undoing)
            self._closing.push(undoing.pop_all())
        return thing

    def _take(self, nbytes: int, undoing: ExitStack) -> None:
        self._charge(nbytes)
        undoing.callback(self._charge, -nbytes)

    def close(self) -> None:
        """Close everything and give its bytes back; a thing that is asked for again is made again."""
        with self._making:
            self._things.clear()
            self._closing.close()


def bytes_of(thing: Any) -> int:
    """Bytes that a module, a tensor, a container of these, or anything that says its own `nbytes` takes."""
    if thing is None:
        return 0
    if isinstance(thing, nn.Module):
        return sum(bytes_of(tensor) for tensor in (*thing.parameters(), *thing.buffers()))
    if isinstance(thing, torch.Tensor) or hasattr(thing, "nbytes"):
        return int(thing.nbytes)
    if isinstance(thing, Mapping):
        return bytes_of(list(thing.values()))
    if isinstance(thing, list | tuple | set | frozenset):
        return sum(map(bytes_of, thing))
    raise ContractError(f"a method holds a {type(thing).__name__} with the model, which does not say its size; give it `nbytes`.")
