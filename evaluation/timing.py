"""Measuring time side by side, and the record of what it was measured on. Knows clocks and hardware; knows no metrics of answers."""

import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

REPOSITORY = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Hardware, versions, thread count, commit, command and time: what a result file says of how it was made."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "commit": git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of this checkout, with "+changes" where files differ from it; None outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


@dataclass(frozen=True)
class PairedTiming:
    """Seconds of two callables that took turns."""

    first_seconds: tuple[float, ...]
    second_seconds: tuple[float, ...]

    @property
    def first_median(self) -> float:
        """Median seconds of the first."""
        return statistics.median(self.first_seconds)

    @property
    def second_median(self) -> float:
        """Median seconds of the second."""
        return statistics.median(self.second_seconds)

    @property
    def ratio(self) -> float:
        """Median of the pairs' quotients, first by second: noise that lasts longer than a pair cancels."""
        return statistics.median(first / second for first, second in zip(self.first_seconds, self.second_seconds, strict=True))

    def as_record(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "first_seconds": list(self.first_seconds),
            "second_seconds": list(self.second_seconds),
            "first_median": self.first_median,
            "second_median": self.second_median,
            "ratio": self.ratio,
        }


def paired(first: Callable[[], object], second: Callable[[], object], repeats: int = 5, warm_up: int = 1) -> PairedTiming:
    """Time two callables in turns, the order changing from pair to pair, after `warm_up` untimed calls of each."""
    for _ in range(warm_up):
        first()
        second()
    pairs = []
    for place in range(repeats):
        if place % 2 == 0:
            pairs.append((seconds_of(first), seconds_of(second)))
        else:
            later = seconds_of(second)
            pairs.append((seconds_of(first), later))
    return PairedTiming(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def seconds_of(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, work still queued on a GPU included."""
    _finish_queued_work()
    begin = time.perf_counter()
    action()
    _finish_queued_work()
    return time.perf_counter() - begin


def _finish_queued_work() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
