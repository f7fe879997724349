"""How a command ends: one sentence on stderr and an exit status, never a traceback for what the user can mend.

Command lines wrap their `main` in `exit_with_sentence`.
"""

import errno
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

from cats.errors import CatsError

P = ParamSpec("P")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Turn a `CatsError`, a fault of disk or path, Ctrl-C or SIGTERM inside `main` into one line on stderr and an exit status.

    Exit status: 2 for errors, 130 for Ctrl-C, 143 for SIGTERM. Finished work is already on disk by then (writers are atomic).
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with sigterm_as_interrupt():
                main(*args, **kwargs)
        except CatsError as error:
            leave(f"error: {error}", 2)
        except OSError as error:
            if error.errno is None:  # made by a library, not by the operating system
                raise
            leave(f"error: {sentence_of(error)}", 2)
        except KeyboardInterrupt as interrupt:
            said, status = ("terminated", 143) if isinstance(interrupt, Terminated) else ("interrupted", 130)
            leave(f"{said}: finished work is kept; run the same command again to go on.", status)

    return wrapped


def leave(sentence: str, status: int) -> None:
    """Say it on stderr and exit."""
    sys.stderr.write(f"{sentence}\n")
    sys.exit(status)


def sentence_of(error: OSError) -> str:
    """What the operating system found, where, and what would mend it."""
    where = f" at {error.filename}" if error.filename else ""
    advice = "free some space or choose another place" if error.errno in NO_SPACE else "mend that or choose another place"
    return f"{error.strerror}{where}; {advice}, then run again."
