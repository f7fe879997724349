"""Every method by name, with the configuration it takes. The methods themselves are imported when one is built."""

import importlib
from collections.abc import Collection
from typing import TYPE_CHECKING

from cats.config import AutoregressiveConfig, CascadeConfig, EagleSelfConfig, KangarooConfig, MethodConfig, PromptLookupConfig

if TYPE_CHECKING:
    from cats.methods.base import Method

METHODS: dict[str, type[MethodConfig]] = {
    "autoregressive": AutoregressiveConfig,
    "cascade": CascadeConfig,
    "kangaroo": KangarooConfig,
    "eagle_self": EagleSelfConfig,
    "prompt_lookup": PromptLookupConfig,
}
CLASSES = {
    "autoregressive": "Autoregressive",
    "cascade": "Cascade",
    "kangaroo": "Kangaroo",
    "eagle_self": "EagleSelf",
    "prompt_lookup": "PromptLookup",
}
"""The class of each method, in the module of the method's name."""


def build_method(config: MethodConfig) -> "Method":
    """The method that `config` belongs to."""
    made: Method = getattr(importlib.import_module(f"cats.methods.{config.name}"), CLASSES[config.name])(config)
    return made


def best_method(adapters: Collection[str]) -> str:
    """Name of the method that gets most out of these adapters."""
    if {"draft", "shallow"} <= set(adapters):
        return "cascade"
    return "kangaroo" if "draft" in adapters else "prompt_lookup"
