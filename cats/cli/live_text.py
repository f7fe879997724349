"""Text that appears as it is made, and the line of figures below it."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cats.text import GrowingText

if TYPE_CHECKING:
    from cats.text import ModelText
    from cats.trace import StepTrace

GREEN, PLAIN = "\033[32m", "\033[0m"


class LiveText:
    """Writes tokens as text, never half a character, each in the colour of what wrote it.

    Args:
        colours: name of a writer -> escape sequence; text of the others stays as the terminal has it.
    """

    def __init__(self, text: "ModelText", colours: Mapping[str, str]):
        self._text, self._colours = GrowingText(text.decode), colours

    def show(self, token: int, writer: str) -> None:
        """Append one token."""
        self._write(self._text.add(token), writer)

    def end(self) -> None:
        """Append what is left of the last character."""
        self._write(self._text.end(), "")

    def _write(self, fresh: str, writer: str) -> None:
        colour = self._colours.get(writer)
        sys.stdout.write(f"{colour}{fresh}{PLAIN}" if colour and fresh else fresh)
        sys.stdout.flush()


def drafts_in_green() -> dict[str, str]:
    """Colours of an answer in a terminal: drafted tokens that the target accepted stand out."""
    return {"draft": GREEN} if sys.stdout.isatty() else {}


def figures(traces: "Sequence[StepTrace]", prompt: str) -> str:
    """What an answer cost, in a line; the first trace is that of the prompt, `prompt` says what was read."""
    cycles = traces[1:]
    tokens, seconds = sum(trace.committed for trace in cycles), sum(trace.seconds.total for trace in cycles)
    rate = f", {tokens / seconds:.1f} tokens/s, {tokens / len(cycles):.2f} tokens per target pass" if cycles else ""
    return f"[{counted(tokens + traces[0].committed, 'token')}{rate}, {prompt} read in {traces[0].seconds.total:.2f} s]"


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"
