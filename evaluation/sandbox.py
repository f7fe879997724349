"""Runs programs that a model wrote, each in a process of its own with little to spend and nothing to reach.

A program gets: `python -I -S` in its own session and temporary folder, without the caller's environment; limits of processor time, address
space, file size, processes and open files; a wall-clock limit, after which its process group is killed; namespaces of its own for network,
processes and users (`unshare`); and, from inside, Landlock (it writes into its folder only and reads only what Python needs) and a filter
of system calls (no process, no socket). What this system lacks is refused unless the caller allows it. Knows no model and no test set.
"""

import functools
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.errors import CatsError

PROGRAM = Path(__file__).with_name("sandboxed_program.py")
NAMESPACES = ("--user", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--")
PASSED, WRONG, ERROR, TIMEOUT = "passed", "wrong", "error", "timeout"
LONGEST_VERDICT = 65536
SAFE_PATH = "/usr/bin:/bin"


@dataclass(frozen=True)
class Sandbox:
    """What a program may spend, and which walls may be missing.

    Attributes:
        seconds: of wall-clock time, the start of its process included.
        memory: bytes of address space.
        file_bytes: of the largest file.
        processes: and threads, all of the user's.
        allow_network: no network namespace, and sockets may be opened.
        allow_writes: go on where this system has no Landlock.
    """

    seconds: float = 10.0
    memory: int = 1 << 29
    file_bytes: int = 1 << 20
    processes: int = 16
    open_files: int = 64
    allow_network: bool = False
    allow_writes: bool = False

    @property
    def limits(self) -> dict[str, int]:
        """By their names in `resource`."""
        return {
            "RLIMIT_CPU": math.ceil(self.seconds) + 1,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": self.open_files,
        }


@dataclass(frozen=True)
class Outcome:
    """How a program ended: PASSED, WRONG (its test found a wrong result), ERROR or TIMEOUT, and what was said of it."""

    kind: str
    detail: str = ""


@functools.cache
def namespaces() -> tuple[str, ...] | None:
    """The command that starts another one in namespaces of its own; None where this system allows none."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    command = (unshare, *NAMESPACES)
    tried = subprocess.run([*command, "true"], capture_output=True, check=False, env={"PATH": SAFE_PATH})
    return command if tried.returncode == 0 else None


def check_sandbox(sandbox: Sandbox) -> dict[str, Any]:
    """Try the sandbox on nothing; returns which walls stand. One that is missing and not allowed to be raises `CatsError`."""
    if not sandbox.allow_network and namespaces() is None:
        raise CatsError(
            "this system gives no network namespace (`unshare --user --net`), so a model's program could reach the network; "
            "run where it does, in a container without a network, or give --allow-network."
        )
    tried = run_program(None, "", "", sandbox)
    if tried.kind == "refused":
        raise CatsError(
            "this system has no Landlock (Linux 5.13 and later), so a model's program could write to your files; "
            "run where it has, or give --allow-writes."
        )
    if tried.kind != PASSED:
        raise CatsError(f"an empty program does not run in the sandbox: {tried.kind} {tried.detail}; give it more --timeout or --memory.")
    walls = json.loads(tried.detail)
    return {"network namespace": not sandbox.allow_network, "files by Landlock": walls["files"], "filter of calls": walls["processes"]}


def run_program(program: str | None, test: str, entry_point: str, sandbox: Sandbox) -> Outcome:
    """Run a program, then its test, which defines `check` and is given the program's function `entry_point`; None runs nothing."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="cats-answer-", ignore_cleanup_errors=True) as folder:
        request: dict[str, Any] = {"secret": secret, "program": program, "test": test, "entry_point": entry_point, "folder": folder}
        request |= {"limits": sandbox.limits, "allow_network": sandbox.allow_network, "allow_writes": sandbox.allow_writes}
        reading, writing = os.pipe()
        try:
            try:
                process = started(sandbox, folder, writing)
            finally:
                os.close(writing)
            ended = finished(process, json.dumps(request).encode(), sandbox.seconds)
            return verdict_of(reading, secret) or (
                Outcome(ERROR, f"ended without a verdict, with status {ended}")
                if ended is not None
                else Outcome(TIMEOUT, f"took more than {sandbox.seconds:g} s")
            )
        finally:
            os.close(reading)


def started(sandbox: Sandbox, folder: str, writing: int) -> "subprocess.Popen[bytes]":
    """The sandbox's process, in a session of its own."""
    walls = () if sandbox.allow_network else namespaces() or ()
    command = [*walls, sys.executable, "-I", "-S", str(PROGRAM), str(writing)]
    environment = {"PATH": SAFE_PATH, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    silent = subprocess.DEVNULL
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=silent,
        stderr=silent,
        cwd=folder,
        env=environment,
        pass_fds=(writing,),
        start_new_session=True,
    )


def finished(process: "subprocess.Popen[bytes]", request: bytes, seconds: float) -> int | None:
    """Exit status of the process, None where its time was over; whatever is left of its group is killed."""
    try:
        process.communicate(request, timeout=seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def verdict_of(reading: int, secret: str) -> Outcome | None:
    """What was said in the pipe with the secret; None where nothing was."""
    os.set_blocking(reading, False)
    try:
        said = os.read(reading, LONGEST_VERDICT)
    except BlockingIOError:
        return None
    for line in said.decode("utf-8", "replace").split("\n"):
        try:
            verdict = json.loads(line)
        except ValueError:
            continue
        if isinstance(verdict, dict) and verdict.get("secret") == secret:
            return Outcome(str(verdict["outcome"]), str(verdict["detail"]))
    return None
