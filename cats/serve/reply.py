"""An answer as it grows: what of its text may be shown and who wrote it, why it ended, what it has cost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cats.config import MethodConfig
from cats.engine import Step
from cats.text import GrowingText, ModelText
from cats.writers import writers_of

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


class Piece(NamedTuple):
    """Text of one token, and its writer (`cats.writers.WRITERS`)."""

    text: str
    by: str


class Visible:
    """Of the pieces that come, what may be shown: no white space at either end, and nothing from a stop string on.

    Holds back what may yet turn out to be the beginning of a stop string, or white space at the end.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._pending: list[Piece] = []
        self._begun = self._ended = False

    def add(self, piece: Piece) -> list[Piece]:
        """What is certain now."""
        if self._ended:
            return []
        self._pending.append(piece)
        text = "".join(part.text for part in self._pending)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if not places:
            return self._released(len(text) - self._begins_a_stop(text))
        self._ended = True
        return self._released(min(places))

    def end(self) -> list[Piece]:
        """The rest, when no more will come."""
        return [] if self._ended else self._released(sum(len(part.text) for part in self._pending))

    def _begins_a_stop(self, text: str) -> int:
        """Characters at the end of `text` that a stop string begins with."""
        longest = max(map(len, self._stops), default=1)
        tails = range(min(longest - 1, len(text)), 0, -1)
        return next((size for size in tails if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)

    def _released(self, until: int) -> list[Piece]:
        """What is pending of the first `until` characters, without the white space at its ends."""
        text = "".join(part.text for part in self._pending)[:until].rstrip()
        skipped = 0 if self._begun else len(text) - len(text.lstrip())
        self._begun |= bool(text)
        shown, rest, begin = [], [], 0
        for part in self._pending:
            end = begin + len(part.text)
            shown.append(Piece(text[max(begin, skipped) : end], part.by))
            rest.append(Piece(part.text[max(0, len(text) - begin) :], part.by))
            begin = end
        self._pending = [piece for piece in rest if piece.text]
        return [piece for piece in shown if piece.text]


class Reply:
    """One answer.

    Args:
        stop: texts that end it, as the request has them; those of the chat template end it too.
        prompt: tokens of the prompt.
        method: that makes it.

    Attributes:
        text: what may be shown so far.
    """

    def __init__(self, text: ModelText, stop: Sequence[str], prompt: int, method: MethodConfig):
        self.text = ""
        self._growing, self._visible = GrowingText(text.decode), Visible((*stop, *text.stop_strings))
        self._method, self._prompt = method, prompt
        self._tokens = self._accepted = self._proposed = self._passes = 0
        self._cached = self._decoded = 0
        self._seconds = self._prompt_seconds = 0.0
        self._finish: str | None = None

    def take(self, step: Step) -> list[Piece]:
        """What the step adds to what may be shown."""
        shown: list[Piece] = []
        for token, writer in zip(step.tokens, writers_of(step, self._method), strict=True):
            shown += self._visible.add(Piece(self._growing.add(token), writer))
        if step.finish is not None:
            shown += [*self._visible.add(Piece(self._growing.end(), "target")), *self._visible.end()]
        self._count(step)
        self.text += "".join(piece.text for piece in shown)
        return shown

    def _count(self, step: Step) -> None:
        trace, tokens = step.trace, len(step.tokens)
        self._finish = step.finish
        self._tokens += tokens
        if trace.prefill:
            self._cached = self._prompt - trace.prompt_rows
            self._prompt_seconds = trace.seconds.total
            return
        self._passes += 1
        self._decoded += tokens
        self._seconds += trace.seconds.total
        self._accepted += min(trace.accepted, tokens)
        self._proposed += trace.nodes - 1

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words; None while it is not finished."""
        return None if self._finish is None else FINISH[self._finish]

    def figures(self) -> dict[str, Any]:
        """What it has cost so far; tokens and seconds of passes leave the prompt's out."""
        return {
            "target_passes": self._passes,
            "tokens": self._decoded,
            "seconds": round(self._seconds, 4),
            "prompt_seconds": round(self._prompt_seconds, 4),
        }

    def usage(self) -> dict[str, Any]:
        """In OpenAI's form, where proposed tokens are those of a "prediction", and our own figures beside it."""
        details = {"accepted_prediction_tokens": self._accepted, "rejected_prediction_tokens": self._proposed - self._accepted}
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._tokens,
            "total_tokens": self._prompt + self._tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached},
            "completion_tokens_details": details,
            "cats": self.figures(),
        }
