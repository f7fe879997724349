"""Where the lines of a conversation come from: a person, with line editing where prompt_toolkit is installed, or a pipe."""

import sys
from collections.abc import Callable
from functools import partial

MARK = "> "


def line_reader() -> Callable[[], str]:
    """Gives the next line; raises EOFError where there is none, and KeyboardInterrupt where the person gave it up."""
    if not sys.stdin.isatty():
        return piped_line
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        sys.stderr.write("lines are read plainly; for history and editing, pip install 'cats-speculation[chat]'.\n")
        return partial(input, MARK)
    session: PromptSession[str] = PromptSession()
    return partial(session.prompt, MARK)


def piped_line() -> str:
    """The next line of standard input."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
