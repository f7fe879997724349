"""Every method by name, with the configuration it takes."""

import dataclasses
from collections.abc import Mapping

from cats.config import AutoregressiveConfig, CascadeConfig, EagleSelfConfig, KangarooConfig, MethodConfig, PromptLookupConfig
from cats.errors import CatsError
from cats.methods.autoregressive import Autoregressive
from cats.methods.base import Method
from cats.methods.cascade import Cascade
from cats.methods.eagle_self import EagleSelf
from cats.methods.kangaroo import Kangaroo
from cats.methods.prompt_lookup import PromptLookup

METHODS: dict[str, tuple[type[Method], type[MethodConfig]]] = {
    "autoregressive": (Autoregressive, AutoregressiveConfig),
    "cascade": (Cascade, CascadeConfig),
    "kangaroo": (Kangaroo, KangarooConfig),
    "eagle_self": (EagleSelf, EagleSelfConfig),
    "prompt_lookup": (PromptLookup, PromptLookupConfig),
}


def build_method(config: MethodConfig) -> Method:
    """The method that `config` belongs to."""
    return METHODS[config.name][0](config)  # type: ignore[call-arg]


def settings_of(config_class: type[MethodConfig]) -> dict[str, type]:
    """Names and types of a method's settings, in the order of its configuration."""
    return {field.name: field.type for field in dataclasses.fields(config_class) if isinstance(field.type, type)}


def every_setting() -> dict[str, type]:
    """Names and types of all methods' settings."""
    return {name: kind for _, config_class in METHODS.values() for name, kind in settings_of(config_class).items()}


def flag_of(setting: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + setting.replace("_", "-")


def method_config(method: str, given: Mapping[str, int | float | None]) -> MethodConfig:
    """The configuration of `method` with the settings that are given and not None; one that the method lacks raises `CatsError`."""
    config_class = METHODS[method][1]
    own = settings_of(config_class)
    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings:
        if name not in own:
            known = ", ".join(flag_of(setting) for setting in own) or "no settings at all"
            raise CatsError(
                f"{flag_of(name)} does nothing for the method {method}, which has {known}; leave it out or choose another --method."
            )
    return config_class(**settings)  # type: ignore[arg-type]
