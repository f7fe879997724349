"""One flag per setting of any method. A flag works or is refused: one that the chosen method has no setting for is an error.

The flags follow the fields of the method configurations in cats/config.py, so a new method brings its own.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from cats.config import MethodConfig, require
from cats.errors import ContractError
from cats.methods import METHODS
from cats.settings import Setting, flag_of, settings_of


def every_setting() -> dict[str, Setting]:
    """All methods' settings by name; one that two methods understand differently raises `ContractError`."""
    settings: dict[str, Setting] = {}
    for method, config_class in METHODS.items():
        for name, setting in settings_of(config_class).items():
            known = settings.setdefault(name, setting)
            if (known.kind, known.choices, known.count) != (setting.kind, setting.choices, setting.count):
                raise ContractError(f"the setting {name} of the method {method} is not what another method calls so; rename it.")
    return settings


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """Add them. They have no default here: what is not given keeps the method's own, which the help names."""
    group = parser.add_argument_group("method")
    for name, setting in every_setting().items():
        users = ", ".join(
            f"{method} {getattr(config_class(), name)}" for method, config_class in METHODS.items() if name in settings_of(config_class)
        )
        text = f"{setting.help} (default: {users})".replace("%", "%%")
        if setting.kind is bool:
            group.add_argument(setting.flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(setting.flag, type=setting.kind, nargs=setting.count, choices=setting.choices or None, help=text)


def chosen_method(method: str, args: argparse.Namespace) -> MethodConfig:
    """The configuration of `method` with the flags that were given; one that does nothing for it raises `CatsError`."""
    return method_config(method, {name: getattr(args, name) for name in every_setting()})


def method_config(method: str, given: Mapping[str, Any]) -> MethodConfig:
    """The configuration of `method` with the settings that are given and not None; one that the method lacks raises `CatsError`."""
    config_class = METHODS[method]
    own = settings_of(config_class)
    settings = {name: value for name, value in given.items() if value is not None}
    known = ", ".join(map(flag_of, own)) or "no settings at all"
    for name in settings:
        require(
            name in own,
            f"{flag_of(name)} does nothing for the method {method}, which has {known}; leave it out or choose another --method.",
        )
    return config_class(**{name: tuple(value) if own[name].count else value for name, value in settings.items()})


every_setting()  # a configuration that no flag can carry is found on import
