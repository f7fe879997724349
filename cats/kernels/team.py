"""Threads that run one compiled function together, the calling thread among them; the interpreter lock is released while they do."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from cats.kernels.code import Crew

APART = 16
"""64-bit numbers between the barrier and the counters: another cache line."""


class Team:
    """`size` threads, the caller's included; one function at a time."""

    def __init__(self, size: int):
        self.size, self._turn = size, threading.Lock()
        self._others = ThreadPoolExecutor(size - 1, "compiled-pass") if size > 1 else None

    def run(self, function: Callable[..., None], counters: int, *arguments: Any) -> None:
        """Call `function(crew, *arguments)` in every thread; `counters` is how many counters of work it shares."""
        with self._turn:
            shared = np.zeros(APART + counters, np.int64)
            first, *others = (Crew(me, self.size, shared.ctypes.data, shared.ctypes.data + 8 * APART) for me in range(self.size))
            pending = [self._others.submit(function, crew, *arguments) for crew in others] if self._others is not None else []
            function(first, *arguments)
            for done in pending:
                done.result()


_teams: dict[int, Team] = {}
_making = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_teams.clear)


def team() -> Team:
    """The team of as many threads as torch uses."""
    size = torch.get_num_threads()
    with _making:
        if size not in _teams:
            _teams[size] = Team(size)
        return _teams[size]
