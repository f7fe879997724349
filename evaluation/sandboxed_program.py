"""Inside the sandbox: takes its own rights away, runs a program and its test, and says how that ended. Standard library only.

Started by evaluation/sandbox.py as a file (`python -I -S`), with a request as JSON on standard input and the descriptor of a pipe for the
verdict as its argument. A verdict counts only with the secret of the request, which is read before any foreign code runs.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from types import TracebackType
from typing import Any, NoReturn

NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER_MODE = 38, 22, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
CLONE_THREAD = 0x10000
ALLOW, DENY, ABSENT = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
"""What a filter answers: go on, EPERM, ENOSYS (so that the C library falls back on what can be looked into)."""
KERNEL_NUMBERS = {
    "x86_64": {"arch": 0xC000003E, "clone": 56, "socket": 41, "others": (57, 58, 59, 62, 101, 200, 234, 272, 308, 322, 424, 425)},
    "aarch64": {"arch": 0xC00000B7, "clone": 220, "socket": 198, "others": (97, 117, 129, 130, 131, 221, 268, 281, 424, 425)},
}
"""Of clone, socket, and what is denied too: fork, vfork, execve, kill and its kin, ptrace, unshare, setns, execveat, io_uring_setup."""
CLONE3, OTHER_ABI = 435, 0x40000000


class Verdict:
    """Around a stage: whatever ends it early is said, and ends the process."""

    def __init__(self, pipe: int, secret: str):
        self.pipe, self.secret, self.checking = pipe, secret, False

    def say(self, outcome: str, detail: str = "") -> NoReturn:
        """The last word."""
        os.write(self.pipe, (json.dumps({"secret": self.secret, "outcome": outcome, "detail": detail[:300]}) + "\n").encode())
        os._exit(0)

    def __enter__(self) -> "Verdict":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.say("wrong" if self.checking and issubclass(kind, AssertionError) else "error", f"{kind.__name__}: {error}")


def limit(limits: dict[str, int]) -> None:
    """Processor seconds, address space, size of files, processes and threads, open files; no core dumps."""
    for name, wanted in {**limits, "RLIMIT_CORE": 0}.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def system_calls() -> Any:
    """The C library, with the number of the last error; None where it has no `prctl`, which means another system than Linux."""
    library = ctypes.CDLL(None, use_errno=True)
    return library if hasattr(library, "prctl") else None


def give_up_files(library: Any, folder: str) -> bool:
    """From now on write below `folder` only, and read there and where Python lies, by Landlock; False where there is none."""
    if library is None:
        return False
    version = library.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = library.syscall(CREATE_RULESET, struct.pack("Q", rights), 8, 0)
    read = READ_FILE | READ_FOLDER
    libraries = (os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo")
    allowed = {**dict.fromkeys(libraries, read), folder: rights, "/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE}
    for place, granted in allowed.items():
        if os.path.exists(place):
            descriptor = os.open(place, os.O_PATH)
            failed = library.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", granted, descriptor), 0)
            os.close(descriptor)
            if failed:
                return False
    confined = rules >= 0 and library.syscall(RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return bool(confined)


def give_up_calls(library: Any, sockets: bool) -> bool:
    """From now on start and signal no process, and open no socket unless `sockets`, by a filter of calls; False where there is none."""
    numbers = KERNEL_NUMBERS.get(platform.machine())
    if library is None or numbers is None or sys.maxsize < 2**32:
        return False
    denied = [*numbers["others"], *([] if sockets else [numbers["socket"]])]  # type: ignore[misc]
    load, equal, at_least, flags, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    lines = [(load, 0, 0, 4), (equal, 1, 0, numbers["arch"]), (answer, 0, 0, DENY), (load, 0, 0, 0)]
    lines += [(at_least, 0, 1, OTHER_ABI), (answer, 0, 0, DENY), (equal, 0, 1, CLONE3), (answer, 0, 0, ABSENT)]
    for number in denied:
        lines += [(equal, 0, 1, number), (answer, 0, 0, DENY)]
    lines += [(equal, 0, 3, numbers["clone"]), (load, 0, 0, 16), (flags, 1, 0, CLONE_THREAD), (answer, 0, 0, DENY), (answer, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(code))
    return bool(library.prctl(SET_SECCOMP, FILTER_MODE, program, 0, 0) == 0)


def main() -> None:
    """Read the request, give up rights, run."""
    request = json.load(sys.stdin)
    verdict = Verdict(int(sys.argv[1]), request["secret"])
    with verdict:
        library = system_calls()
        limit(request["limits"])
        if library is not None:
            library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        confined = give_up_files(library, request["folder"])
        if not confined and not request["allow_writes"]:
            verdict.say("refused", "files")
        filtered = give_up_calls(library, request["allow_network"])
        if request["program"] is None:
            verdict.say("passed", json.dumps({"files": confined, "processes": filtered}))
        names: dict[str, Any] = {"__name__": "candidate"}
        exec(compile(request["program"], "answer", "exec"), names)
        exec(compile(request["test"], "test", "exec"), names)
        candidate = names[request["entry_point"]]
        verdict.checking = True
        names["check"](candidate)
    verdict.say("passed")


if __name__ == "__main__":
    main()
