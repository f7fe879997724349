"""Text that appears as it is made."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cats.text import ModelText

GREEN, PLAIN = "\033[32m", "\033[0m"


class LiveText:
    """Writes tokens as text, never half a character; drafted ones in green where the terminal has it."""

    def __init__(self, text: "ModelText"):
        self._text, self._shown = text, 0
        self._ids: list[int] = []
        self._colour = sys.stdout.isatty()

    def show(self, token: int, drafted: bool) -> None:
        """Append one token."""
        self._ids.append(token)
        text = self._text.decode(self._ids)
        if not text.endswith("\ufffd"):
            fresh, self._shown = text[self._shown :], len(text)
            sys.stdout.write(f"{GREEN}{fresh}{PLAIN}" if drafted and self._colour else fresh)
            sys.stdout.flush()
