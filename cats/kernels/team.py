"""Threads that run one compiled function together; the interpreter lock is released while they do."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cats.kernels.code import Crew

APART = 16
"""64-bit numbers between the barrier and the counters: another cache line."""


class Team:
    """`size` threads; one function at a time."""

    def __init__(self, size: int):
        self.size, self._turn = size, threading.Lock()
        self._pool = ThreadPoolExecutor(size, "compiled-pass")

    def run(self, function: Callable[..., None], counters: int, *arguments: Any) -> None:
        """Call `function(crew, *arguments)` in every thread, the caller's among them; `counters` is how many counters of work it shares."""
        with self._turn:
            shared = np.zeros(APART + counters, np.int64)
            first, *others = self._crews(shared)
            pending = [self._pool.submit(function, crew, *arguments) for crew in others]
            function(first, *arguments)
            for done in pending:
                done.result()

    def alone(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function(crew, *arguments)` in the calling thread only, for what is over sooner than another wakes; it counts no work."""
        nothing = np.zeros(1, np.int64)
        function(Crew(0, 1, nothing.ctypes.data, nothing.ctypes.data), *arguments)

    @contextmanager
    def flight(self, function: Callable[..., None], counters: int, *arguments: Any) -> Iterator[None]:
        """As `run`, beside the block; what the function waits for the block gives, also when it ends by an exception."""
        with self._turn:
            shared = np.zeros(APART + counters, np.int64)
            pending = [self._pool.submit(function, crew, *arguments) for crew in self._crews(shared)]
            try:
                yield
            finally:
                land(pending)
            for done in pending:
                done.result()

    def _crews(self, shared: np.ndarray) -> list[Crew]:
        return [Crew(me, self.size, shared.ctypes.data, shared.ctypes.data + 8 * APART) for me in range(self.size)]


def land(pending: list[Future[None]]) -> None:
    """Wait for threads that are about to end; an interruption waits with them, since they still write to memory that others use next."""
    interrupted = None
    while not all(done.done() for done in pending):
        try:
            wait(pending)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


_teams: dict[int, Team] = {}
_making = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_teams.clear)


_leading = threading.local()


@contextmanager
def leading() -> Iterator[None]:
    """Inside the block, the calling thread's operations of torch run in it alone, and as many threads as torch was given compute here.

    What is left to torch is small then, and its idle threads, which look out for work, would take processors from those at work.
    """
    size = torch.get_num_threads()
    torch.set_num_threads(1)
    _leading.size = size
    try:
        yield
    finally:
        _leading.size = None
        torch.set_num_threads(size)


def team() -> Team:
    """The team of as many threads as torch was given."""
    size = getattr(_leading, "size", None) or torch.get_num_threads()
    with _making:
        if size not in _teams:
            _teams[size] = Team(size)
        return _teams[size]
