"""A chat endpoint that speaks OpenAI's protocol, asked with patience: what may pass is tried again, ever later. Knows no grades."""

import json
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from cats.errors import CatsError
from evaluation.judging import Messages

HOPELESS = (401, 403, 404)
"""Statuses of an endpoint that will answer nothing: wrong key, no right, no such model or address."""
PASSING = (408, 409, 425, 429)
"""Statuses below 500 that may pass."""
LONGEST_WAIT = 300.0
"""Seconds; an endpoint that asks for more is asked again all the same."""


class UnansweredError(Exception):
    """One request has no answer, and others may have; the message says why."""


class _PassingError(Exception):
    """A fault that may pass, and the seconds after which the endpoint wants to be asked again, where it says."""

    def __init__(self, cause: str, wait: float | None = None):
        super().__init__(cause)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How long an endpoint is waited for.

    Attributes:
        attempts: times that a request is sent, at most.
        first: seconds before the second attempt, about; they double from one to the next.
        timeout: seconds for one answer.
    """

    attempts: int = 6
    first: float = 1.0
    timeout: float = 120.0

    def pause(self, attempt: int, wanted: float | None) -> float:
        """Seconds to wait behind an attempt (from 0): what the endpoint wants, else what doubling gives, less up to a half by chance."""
        if wanted is not None:
            return min(wanted, LONGEST_WAIT)
        return min(self.first * 2.0**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class Reply:
    """What came back, and how many tokens the endpoint counted in it and in the request."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Endpoint:
    """One model behind one address.

    Args:
        url: of the protocol's root, such as http://localhost:8000/v1.
        key: sent as the bearer token.
        options: of every request, such as `temperature`.
        stop: once it is set, no pause lasts and nothing is asked again.
    """

    def __init__(self, url: str, model: str, key: str, options: Mapping[str, Any], patience: Patience, stop: threading.Event):
        from openai import OpenAI  # takes a second to load, and --help should not

        self.url, self.model, self.options, self.patience, self.stop = url, model, dict(options), patience, stop
        self.reached = False
        self.client = OpenAI(base_url=url, api_key=key, max_retries=0, timeout=patience.timeout)

    def ask(self, messages: Messages) -> Reply:
        """The reply to a conversation; `UnansweredError` where there is none after all attempts, `CatsError` where there never will be."""
        cause = "stopped"
        for attempt in range(self.patience.attempts):
            try:
                return reply_in(self._send(messages))
            except _PassingError as error:
                cause = str(error)
                last = attempt == self.patience.attempts - 1
                if last or self.stop.wait(self.patience.pause(attempt, error.wait)):
                    break
        if not self.reached and not self.stop.is_set():
            raise CatsError(f"nothing answers at {self.url}: {cause}; check the address, and that the endpoint runs.")
        raise UnansweredError(f"{cause} ({attempt + 1} attempts)")

    def _send(self, messages: Messages) -> str:
        """The body that comes back, whatever it holds."""
        import openai

        try:
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                **self.options,
            )
        except openai.APIStatusError as error:
            self.reached = True
            said = f"status {error.status_code}: {said_in(error.body, error.message)}"
            if error.status_code in HOPELESS:
                raise CatsError(f"{self.url} answers {self.model} with {said}; check the key, the model's name and the address.") from error
            if error.status_code not in PASSING and error.status_code < 500:
                raise UnansweredError(said) from error
            raise _PassingError(said, wanted_wait(error.response.headers)) from error
        except openai.APITimeoutError as error:
            raise _PassingError(f"no answer within {self.patience.timeout:g} s") from error
        except openai.APIConnectionError as error:
            self.reached |= type(error.__cause__).__name__ != "ConnectError"  # of httpx or of another library, by openai's version
            raise _PassingError(f"the connection broke ({error.__cause__ or error})") from error
        self.reached = True
        return str(raw.text)


def reply_in(body: str) -> Reply:
    """The reply that a body holds; one that holds none may have one the next time."""
    try:
        completion = json.loads(body)
        text = completion["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise _PassingError(f"the answer is no chat completion: {body[:60]!r}") from error
    if not isinstance(text, str) or not text.strip():
        raise _PassingError("the answer is empty")
    usage = completion.get("usage") or {}
    return Reply(text, usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)


def said_in(body: object, otherwise: str) -> str:
    """The first line of an error's message."""
    said = body.get("message") if isinstance(body, dict) else None
    return (str(said or otherwise).strip().splitlines() or [""])[0][:200]


def wanted_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, as a number or as a date; None where it says nothing that can be read."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None  # "nan" is a number to float()
