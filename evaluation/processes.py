"""Sharing questions among the processes of `accelerate launch`. Knows ranks; knows no questions and no model."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from accelerate import PartialState

from cats.errors import CatsError

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=7)  # the first process to finish waits for the last one


class Processes(Protocol):
    """What the harness asks of accelerate's `PartialState`."""

    @property
    def process_index(self) -> int:
        """From 0."""
        ...

    @property
    def num_processes(self) -> int:
        """How many there are."""
        ...

    @property
    def is_main_process(self) -> bool:
        """True in the one that writes what all share."""
        ...

    def wait_for_everyone(self) -> None:
        """Return when every process has called this."""
        ...


class OneProcess:
    """No other process to share with."""

    process_index = 0
    num_processes = 1
    is_main_process = True

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None means CUDA where there is some, else CPU. A name that means nothing here raises `CatsError`."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise CatsError(f"--device {name!r} is no device that torch knows; use cpu, cuda or cuda:1, for example.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CatsError(f"--device {name} is not here, torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu.")
    return device


def start_processes(wanted: torch.device) -> tuple[Processes, torch.device]:
    """Join the processes that `accelerate launch` started (one where it did not), and the device that this one computes on.

    Of several processes on CUDA, each gets a GPU of its own.
    """
    state = PartialState(cpu=wanted.type == "cpu", timeout=LONGEST_WAIT)
    if state.num_processes == 1:
        return OneProcess(), wanted
    return state, state.device


def own_share(items: Sequence[T], processes: Processes) -> list[T]:
    """Every n-th item, so that long and short kinds of questions spread over the processes."""
    return list(items[processes.process_index :: processes.num_processes])
