"""A command under a hard memory limit, and what a process took of memory and disk, by the kernel's own figures.

The limit is a version 1 memory control group: it counts the page cache too, so a file mapped into memory cannot be resident in it for
free. Where such groups cannot be made, runs without a limit say so. Linux only.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cats.errors import CatsError

GROUPS = Path("/sys/fs/cgroup")
PATIENCE = 5.0
"""Seconds in which the kernel gets to let go of an emptied group."""


@dataclass(frozen=True)
class Outcome:
    """How a limited command ended.

    Attributes:
        failure: None, or one sentence.
        group_peak_bytes: most that the group used at any time, page cache included; None where there was no group.
    """

    failure: str | None
    group_peak_bytes: int | None


class Group:
    """A control group of its own, for memory and, where asked for, the disk's read rate."""

    def __init__(self, memory_bytes: int, read_rate: float | None = None, disk_of: Path | None = None):
        name = f"cats-{os.getpid()}-{time.monotonic_ns()}"
        self._folders = [GROUPS / "memory" / name]
        try:
            self._folders[0].mkdir()
            (self._folders[0] / "memory.limit_in_bytes").write_text(str(memory_bytes))
            if read_rate is not None and disk_of is not None:
                self._folders.append(GROUPS / "blkio" / name)
                self._folders[1].mkdir()
                (self._folders[1] / "blkio.throttle.read_bps_device").write_text(f"{disk_number(disk_of)} {int(read_rate)}")
        except OSError as error:
            self.close()
            raise CatsError(
                f"no version 1 control group can be made under {GROUPS} ({error.strerror}); run as root where there are such groups, "
                "or use --no-limit."
            ) from error

    def join(self) -> None:
        """Put the calling process into the group."""
        for folder in self._folders:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int:
        """Most that the group used."""
        return int((self._folders[0] / "memory.max_usage_in_bytes").read_text())

    def close(self) -> None:
        """Remove the group; its processes have ended."""
        for folder in self._folders:
            until = time.monotonic() + PATIENCE
            while folder.is_dir():
                try:
                    folder.rmdir()
                except OSError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.05)


def disk_number(path: Path) -> str:
    """Major and minor number of the whole disk that holds `path` (a partition has no read rate of its own)."""
    device = path.stat().st_dev
    own = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return ((own.parent if (own / "partition").exists() else own) / "dev").read_text().strip()


@contextmanager
def grouped(memory_bytes: int | None, read_rate: float | None, disk_of: Path) -> Iterator[Group | None]:
    """A group for the block, None without a limit."""
    if memory_bytes is None:
        yield None
        return
    group = Group(memory_bytes, read_rate, disk_of)
    try:
        yield group
    finally:
        group.close()


def run_limited(
    command: Sequence[str], memory_bytes: int | None, read_rate: float | None, disk_of: Path, log: Path, timeout: float
) -> Outcome:
    """Run `command` in a fresh group and wait for it; its words go to `log`.

    Args:
        memory_bytes: limit of everything the group holds; None: no group.
        read_rate: bytes per second that the kernel lets the group read from the disk of `disk_of`; None: as fast as it goes.
        timeout: seconds.
    """
    with grouped(memory_bytes, read_rate, disk_of) as group, log.open("wb") as words:
        child = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, preexec_fn=group.join if group else None)
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            return Outcome(f"not finished after {timeout:.0f} s", group.peak_bytes if group else None)
        finally:
            child.kill()
            child.wait()
        peak = group.peak_bytes if group else None
    if status == -signal.SIGKILL:
        return Outcome("killed by the kernel at the memory limit" if group else "killed, perhaps for want of memory", peak)
    last = log.read_text(errors="replace").strip().splitlines()
    return Outcome(None if status == 0 else (last[-1] if last else f"exit status {status}"), peak)


def forget(paths: Iterable[Path]) -> None:
    """Make the page cache drop these files: pages left by an earlier run would be free for the next."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def bytes_read() -> int:
    """Bytes that this process has made the disk deliver, page cache hits not among them."""
    return _field(Path("/proc/self/io"), "read_bytes", 1)


def reset_peak() -> None:
    """Let `peak_bytes` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Most that this process used since `reset_peak`, mapped files included."""
    return _field(Path("/proc/self/status"), "VmHWM", 1024)


def private_bytes() -> int:
    """Private memory that this process has mapped for data, touched or not."""
    return _field(Path("/proc/self/status"), "VmData", 1024)


def _field(path: Path, name: str, unit: int) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", path.read_text(), re.MULTILINE)
    if match is None:
        raise CatsError(f"{path} has no {name}; this needs Linux with that accounting.")
    return int(match[1]) * unit


def python_command(module: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """A fresh interpreter that runs one of our modules."""
    return [python, "-m", module, *arguments]
