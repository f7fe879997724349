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


def settings_of(method: str) -> dict[str, type]:
    """Names and types of a method's settings, in the order of its configuration."""
    return {field.name: field.type for field in dataclasses.fields(METHODS[method][1]) if isinstance(field.type, type)}


def flag_of(setting: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + setting.replace("_", "-")


def method_config(method: str, given: Mapping[str, int | float | None]) -> MethodConfig:
    """The configuration of `method` with the settings that are given and not None; one that the method lacks raises `CatsError`."""
    own = settings_of(method)
    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings:
        if name not in own:
            known = ", ".join(flag_of(setting) for setting in own) or "no settings at all"
            raise CatsError(
                f"{flag_of(name)} does nothing for the method {method}, which has {known}; leave it out or choose another method."
            )
    return METHODS[method][1](**settings)  # type: ignore[arg-type]
