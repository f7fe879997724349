"""A request for an answer, checked: fields of OpenAI's chat completions. A field works or is refused by name; none is ignored.

`user` and the like only label a request, and change nothing. A null is as good as nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cats.config import GenerationConfig
from cats.errors import CatsError
from cats.serve.refusals import RequestError
from cats.text import Message

MOST_MESSAGES, LONGEST_TEXT = 1024, 2**19
MOST_STOPS, LONGEST_STOP, LONGEST_NAME = 4, 256, 1024
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TAKEN = {"model", "messages", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "top_k"}
LENGTHS = ("max_tokens", "max_completion_tokens")
LABELS = ("user", "safety_identifier", "prompt_cache_key")
WITHOUT_EFFECT: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""Fields that are accepted with these values, which ask for nothing that is not done anyway."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        generation: how tokens are chosen; the answer's length is not in it yet.
        max_tokens: of the answer; None: as many as the server gives.
        length_field: the field that says so.
        include_usage: a stream ends with the usage.
    """

    model: str
    messages: Sequence[Message]
    generation: GenerationConfig
    max_tokens: int | None
    length_field: str
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_asked(body: bytes, temperature: float, seed: int) -> Asked:
    """The request in a body; `RequestError` names what is wrong with it.

    Args:
        temperature, seed: where the request gives none.
    """
    fields = {name: value for name, value in json_object(body).items() if value is not None}
    check_names(fields)
    stream = flag(fields, "stream")
    length_field = next((name for name in reversed(LENGTHS) if name in fields), LENGTHS[0])
    return Asked(
        model=named(fields, "model"),
        messages=messages_of(fields.get("messages")),
        generation=generation_of(fields, temperature, seed),
        max_tokens=whole(fields, length_field, None, 1, 2**31),
        length_field=length_field,
        stop=stops_of(fields.get("stop", [])),
        stream=stream,
        include_usage=includes_usage(fields, stream),
    )


def json_object(body: bytes) -> dict[str, Any]:
    """The object that a body holds."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {str(error)[:100]}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError(400, f"the body is a JSON {type(value).__name__}; send an object.", code="invalid_json")
    return value


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise `RequestError` for a field that is unknown, or asks for what is not done here."""
    for name, value in fields.items():
        if name in WITHOUT_EFFECT:
            if not any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in WITHOUT_EFFECT[name]):
                raise RequestError(400, f"this value of {name} is not supported here; leave it out.", name, "unsupported_value")
        elif name in LABELS:
            named(fields, name)
        elif name not in TAKEN and name not in LENGTHS:
            raise RequestError(400, f"unrecognized request argument supplied: {name[:64]!r}.", name[:64], "unknown_parameter")
    if all(name in fields for name in LENGTHS):
        raise RequestError(400, f"{' and '.join(LENGTHS)} say the same; give one of them.", LENGTHS[0], "invalid_value")


def text_of(value: Any, param: str, longest: int) -> str:
    """A string of so many characters at most, each of which is one (half a surrogate pair is none)."""
    if not isinstance(value, str):
        raise RequestError(400, f"{param} must be a string.", param, "invalid_type")
    if len(value) > longest:
        raise RequestError(400, f"{param} has {len(value)} characters; {longest} are taken.", param, "string_above_max_length")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(400, f"{param} holds half a surrogate pair, which is no character.", param, "invalid_value")
    return value


def named(fields: Mapping[str, Any], name: str) -> str:
    """A short string that must be there."""
    if name not in fields:
        raise RequestError(400, f"{name} is missing.", name, "missing_required_parameter")
    return text_of(fields[name], name, LONGEST_NAME)


def flag(fields: Mapping[str, Any], name: str, param: str | None = None) -> bool:
    """True or false; false where it is not given."""
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(400, f"{param or name} must be true or false.", param or name, "invalid_type")
    return value


def number(fields: Mapping[str, Any], name: str, otherwise: float, least: float, most: float) -> float:
    """A number from `least` to `most`."""
    value = fields.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(400, f"{name} must be a number.", name, "invalid_type")
    if not least <= value <= most:
        raise RequestError(400, f"{name} must lie between {least:g} and {most:g}.", name, "invalid_value")
    return value


def whole(fields: Mapping[str, Any], name: str, otherwise: int | None, least: int, most: int) -> int | None:
    """A whole number from `least` to `most`."""
    value = fields.get(name, otherwise)
    if value is otherwise:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(400, f"{name} must be a whole number.", name, "invalid_type")
    if not least <= value <= most:
        raise RequestError(400, f"{name} must lie between {least} and {most}.", name, "invalid_value")
    return value


def generation_of(fields: Mapping[str, Any], temperature: float, seed: int) -> GenerationConfig:
    """How tokens are chosen. At an explicit temperature of 0 the best token is taken, whatever top_p and top_k are."""
    chosen, top_p = number(fields, "temperature", temperature, 0, 2), number(fields, "top_p", 1.0, 0, 1)
    top_k = whole(fields, "top_k", 0, 0, 2**31) or 0
    if fields.get("temperature") == 0 and top_p > 0:
        top_p, top_k = 1.0, 0
    try:
        return GenerationConfig(temperature=chosen, top_p=top_p, top_k=top_k, seed=whole(fields, "seed", seed, -(2**63), 2**63 - 1) or 0)
    except CatsError as error:
        raise RequestError(400, str(error), "top_p" if top_p != 1 else "top_k", "invalid_value") from error


def stops_of(given: Any) -> tuple[str, ...]:
    """Texts that end the answer: one, or a list of a few."""
    listed = given if isinstance(given, list) else [given]
    if len(listed) > MOST_STOPS:
        raise RequestError(400, f"stop lists {len(listed)} texts; {MOST_STOPS} are taken.", "stop", "array_above_max_length")
    stops = tuple(text_of(one, "stop", LONGEST_STOP) for one in listed)
    if not all(stops):
        raise RequestError(400, "a text of stop is empty.", "stop", "invalid_value")
    return stops


def includes_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    """What stream_options say, which are only for streams."""
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise RequestError(400, "stream_options must be an object.", "stream_options", "invalid_type")
    if options and not stream:
        raise RequestError(400, "stream_options are for streams; give stream, too, or leave them out.", "stream_options", "invalid_value")
    for name, value in options.items():
        if name != "include_usage" and not (name == "include_obfuscation" and value is False):
            raise RequestError(
                400, f"stream_options.{name[:64]} is not supported here.", f"stream_options.{name[:64]}", "unsupported_value"
            )
    return flag(options, "include_usage", "stream_options.include_usage")


def messages_of(given: Any) -> list[Message]:
    """A conversation."""
    if not isinstance(given, list) or not given:
        raise RequestError(400, "messages must be a list of at least one message.", "messages", "missing_required_parameter")
    if len(given) > MOST_MESSAGES:
        raise RequestError(400, f"messages lists {len(given)}; {MOST_MESSAGES} are taken.", "messages", "array_above_max_length")
    return [message_of(message, f"messages[{place}]") for place, message in enumerate(given)]


def message_of(given: Any, param: str) -> Message:
    """A message; fields that are empty, as those of an answer that comes back, say nothing."""
    if not isinstance(given, dict):
        raise RequestError(400, f"{param} must be an object.", param, "invalid_type")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(400, f"the role of {param} must be one of {', '.join(ROLES)}.", f"{param}.role", "invalid_value")
    for name, value in given.items():
        if name not in ("role", "content") and value not in (None, [], {}):
            raise RequestError(
                400, f"{param}.{name[:64]} is not supported here; leave it out.", f"{param}.{name[:64]}", "unsupported_value"
            )
    return {"role": ROLES[role], "content": content_of(given.get("content"), f"{param}.content")}


def content_of(given: Any, param: str) -> str:
    """The text of a message: itself, or its parts put together."""
    if not isinstance(given, list):
        return text_of(given, param, LONGEST_TEXT)
    for part in given:
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise RequestError(400, f"{param} may hold parts of text only.", param, "unsupported_value")
    return "".join(text_of(part["text"], param, LONGEST_TEXT) for part in given)
