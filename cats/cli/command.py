"""How a command ends: one sentence on stderr and an exit status; a traceback only where it was asked for.

Command lines build a `CommandParser` and wrap their `main` in `exit_with_sentence`.
"""

import argparse
import errno
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec

from cats.errors import CatsError

P = ParamSpec("P")
TRACEBACK_FLAG, TRACEBACK_VARIABLE = "--traceback", "CATS_TRACEBACK"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Seen(argparse.Action):
    """A flag that leaves nothing in the namespace: it is looked for among the arguments themselves, since parsing may fail."""

    def __call__(self, *given: Any) -> None:
        pass


class CommandParser(argparse.ArgumentParser):
    """A parser with the flags of every command."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        meaning = f"show where an error was found (as {TRACEBACK_VARIABLE}=1 in the environment does)"
        self.add_argument(TRACEBACK_FLAG, action=_Seen, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=meaning)


@contextmanager
def showing_tracebacks(given: Sequence[str]) -> Iterator[None]:
    """Set the environment variable inside the block if the flag was given, so that commands started from this one show theirs too."""
    before = os.environ.get(TRACEBACK_VARIABLE)
    if TRACEBACK_FLAG in given:
        os.environ[TRACEBACK_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(TRACEBACK_VARIABLE, None)
        else:
            os.environ[TRACEBACK_VARIABLE] = before


class Terminated(KeyboardInterrupt):
    """SIGTERM came; treated like Ctrl-C, but for the exit status."""


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside the block, once; a second one ends the process at once.

    Does nothing off the main thread, or where somebody else handles SIGTERM.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_with_sentence(main: Callable[P, None]) -> Callable[P, None]:
    """Turn whatever ends `main` early into one line on stderr and an exit status, below the traceback where that was asked for.

    Exit status: 2 for what the user can mend (a `CatsError`, a fault of disk or path, too little memory), 130 for Ctrl-C, 143 for
    SIGTERM, 1 for anything else, which is a bug. Finished work is already on disk by then (writers are atomic). Tracebacks are asked for
    by --traceback among the arguments of `main` (a sequence of strings, or none for those of the process) or by CATS_TRACEBACK.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        given = next((argument for argument in args if isinstance(argument, list | tuple)), sys.argv[1:])
        with showing_tracebacks([word for word in given if isinstance(word, str)]):
            try:
                with sigterm_as_interrupt():
                    main(*args, **kwargs)
            except (Exception, KeyboardInterrupt) as error:
                if os.environ.get(TRACEBACK_VARIABLE):
                    traceback.print_exc()
                sentence, status = ending_of(error)
                sys.stderr.write(f"{sentence}\n")
                sys.exit(status)

    return wrapped


def ending_of(error: BaseException) -> tuple[str, int]:
    """The sentence and the exit status with which a command ends."""
    if isinstance(error, CatsError):
        return f"error: {error}", 2
    if isinstance(error, OSError) and error.errno is not None:  # else it was made by a library, not by the operating system
        return f"error: {sentence_of(error)}", 2
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which not every command has loaded
        return f"error: out of memory{in_brackets(error)}; give --memory-budget where there is one, or ask for less at once.", 2
    if isinstance(error, KeyboardInterrupt):
        said, status = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        return f"{said}: finished work is kept; run the same command again to go on.", status
    return f"internal error: {type(error).__name__}{in_brackets(error)}; run again with {TRACEBACK_FLAG} to see where, and report it.", 1


def in_brackets(error: BaseException) -> str:
    """The first line of what an exception says, and the notes on it."""
    said = [line for line in (first_line(error), *getattr(error, "__notes__", ())) if line]
    return f" ({'; '.join(said)})" if said else ""


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; empty where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0]


def sentence_of(error: OSError) -> str:
    """What the operating system found, where, and what would mend it."""
    where = f" at {error.filename}" if error.filename else ""
    advice = "free some space or choose another place" if error.errno in NO_SPACE else "mend that or choose another place"
    return f"{error.strerror}{where}; {advice}, then run again."
