"""CATS: cascaded adaptive tree speculation for models that do not fit in memory. Public names, each imported when it is first used.

The configuration of every method is among them, under its class's name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cats.api import Answer, CatsModel, generate, load, stream
    from cats.cats_model import MultiAdapterCATSModel
    from cats.config import GenerationConfig, MemoryOptions, MethodConfig
    from cats.custom_generate import transformers_generate
    from cats.engine import Generation, Step
    from cats.errors import CatsError
    from cats.kept import KeptCaches
    from cats.methods import METHODS, build_method
    from cats.methods.autoregressive import AutoregressiveConfig
    from cats.methods.cascade import CascadeConfig
    from cats.methods.eagle_self import EagleSelfConfig
    from cats.methods.kangaroo import KangarooConfig
    from cats.methods.nested import NestedConfig
    from cats.methods.prompt_lookup import PromptLookupConfig
    from cats.stopping import StopStrings
    from cats.text import ModelText

_HOMES = {
    "api": ("Answer", "CatsModel", "generate", "load", "stream"),
    "cats_model": ("MultiAdapterCATSModel",),
    "config": ("GenerationConfig", "MemoryOptions", "MethodConfig"),
    "custom_generate": ("transformers_generate",),
    "engine": ("Generation", "Step"),
    "errors": ("CatsError",),
    "kept": ("KeptCaches",),
    "methods": ("METHODS", "build_method"),
    "stopping": ("StopStrings",),
    "text": ("ModelText",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "Answer",
    "AutoregressiveConfig",
    "CascadeConfig",
    "CatsError",
    "CatsModel",
    "EagleSelfConfig",
    "Generation",
    "GenerationConfig",
    "KangarooConfig",
    "KeptCaches",
    "MemoryOptions",
    "MethodConfig",
    "ModelText",
    "MultiAdapterCATSModel",
    "NestedConfig",
    "PromptLookupConfig",
    "Step",
    "StopStrings",
    "build_method",
    "generate",
    "load",
    "stream",
    "transformers_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        return _configuration(name)
    value = getattr(importlib.import_module(f"cats.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def _configuration(name: str) -> Any:
    """The configuration class of this name, of any method."""
    if name.endswith("Config"):
        for config_class in importlib.import_module("cats.methods").METHODS.values():
            if config_class.__name__ == name:
                return config_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
