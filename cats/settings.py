"""A method's settings as its configuration declares them: what a flag, a preset or a record has to know of each field.

A field may be a bool, int, float, str or Path, a `Literal` of such values, a tuple of them (`tuple[int, ...]`, `tuple[int, int]`), and
any of these or None, which stands for "not given". Its help is `field(metadata={"help": ...})`.
"""

import dataclasses
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cats.errors import ContractError

SCALARS = (bool, int, float, str, Path)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field.

    Attributes:
        name: of the field.
        kind: type of one value.
        help: what it does.
        choices: the values it may have; empty where any will do.
        count: None for one value, a number for a tuple of so many, "+" for a tuple of any length.
    """

    name: str
    kind: type
    help: str
    choices: tuple[Any, ...] = ()
    count: int | Literal["+"] | None = None

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return flag_of(self.name)

    @property
    def wants(self) -> str:
        """What a value must be, in words."""
        one = f"one of {', '.join(map(str, self.choices))}" if self.choices else f"a {self.kind.__name__}"
        return one if self.count is None else f"{'several' if self.count == '+' else self.count} values joined by +, each {one}"

    def parse(self, text: str) -> Any:
        """The value that a text stands for, those of a tuple joined by `+`; anything else raises `ValueError`."""
        if self.count is None:
            return self._one(text)
        values = tuple(self._one(part) for part in text.split("+"))
        if self.count not in ("+", len(values)):
            raise ValueError(f"{len(values)} values in place of {self.count}")
        return values

    def restored(self, value: Any) -> Any:
        """The value that `as_record` wrote down."""
        if self.kind is Path and value is not None:
            return tuple(map(Path, value)) if self.count is not None else Path(value)
        return tuple(value) if isinstance(value, list) else value

    def _one(self, text: str) -> Any:
        if self.kind is bool:
            if text.lower() not in ("true", "false"):
                raise ValueError(f"{text!r} is neither true nor false")
            return text.lower() == "true"
        value = self.kind(text)
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r} is not among the choices")
        return value


def flag_of(setting: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + setting.replace("_", "-")


def settings_of(config_class: type) -> dict[str, Setting]:
    """The settings by name, in the order of the fields; a field that no flag can carry raises `ContractError`."""
    hints = get_type_hints(config_class)
    return {field.name: _setting_of(config_class, field, hints[field.name]) for field in dataclasses.fields(config_class) if field.init}


def _setting_of(config_class: type, field: "dataclasses.Field[Any]", hint: Any) -> Setting:
    inner, count = _element(_without_none(hint))
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    kinds = {type(choice) for choice in choices} or {inner}
    kind = kinds.pop()
    if kinds or kind not in SCALARS or (kind is bool and (count or choices)):
        known = ", ".join(scalar.__name__ for scalar in SCALARS)
        raise ContractError(
            f"the setting {field.name} of {config_class.__name__} has the type {hint}, which no flag can carry; "
            f"use {known}, a Literal or tuple of these, or one of them or None."
        )
    return Setting(field.name, kind, field.metadata.get("help", field.name), choices, count)


def _without_none(hint: Any) -> Any:
    """X of `X | None`, anything else as it stands."""
    rest = [option for option in get_args(hint) if option is not types.NoneType]
    return rest[0] if get_origin(hint) in (Union, types.UnionType) and len(rest) == 1 else hint


def _element(hint: Any) -> tuple[Any, int | Literal["+"] | None]:
    """The type of one value, and how many there are: see `Setting.count`."""
    options = get_args(hint)
    if get_origin(hint) is not tuple or not options:
        return hint, None
    if options[1:] == (Ellipsis,):
        return options[0], "+"
    return (options[0], len(options)) if len(set(options)) == 1 else (hint, None)


def as_record(config: Any) -> dict[str, Any]:
    """Name and settings of a method's configuration as JSON can hold them."""
    return {"name": config.name} | {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value
