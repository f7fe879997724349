"""The one exception for anything the user can mend, and the one way a command line reports it.

Every check on user input (files, flags, weights, budgets) raises `CatsError` with a sentence that names the thing and
what would fix it. Command lines wrap their `main` in `exit_with_sentence`, so that the sentence, not a traceback, is
what the user sees, with exit status 2.
"""

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class CatsError(Exception):
    """Bad input or an unmet requirement; the message is one sentence for the user."""


def exit_with_sentence(main: Callable[P, None]) -> Callable[P, None]:
    """Turn a `CatsError`, a full disk, an unwritable path or Ctrl-C inside `main` into one line on stderr and an exit status.

    Exit status: 2 for errors, 130 for an interrupt. Finished work is already on disk by then (writers are atomic).
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except CatsError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            where = f" at {error.filename}" if error.filename else ""
            sys.stderr.write(f"error: {error.strerror}{where}; free some space or choose another place, then run again.\n")
            sys.exit(2)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted: finished work is kept; run the same command again to go on.\n")
            sys.exit(130)

    return wrapped
