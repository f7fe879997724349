"""Every method by name: those of the files in this folder, and those whose classes are defined elsewhere."""

import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from cats.config import MemoryOptions, MethodConfig, require
from cats.methods.base import CLASSES, METHODS, PRESETS, TITLES, Method, Needs
from cats.settings import settings_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from cats.cats_model import MultiAdapterCATSModel

__all__ = [
    "CLASSES",
    "METHODS",
    "PRESETS",
    "TITLES",
    "Method",
    "Needs",
    "best_method",
    "build_method",
    "check_runnable",
    "method_of",
    "needs_of",
    "small_shapes",
    "with_needs",
]

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")


def build_method(config: MethodConfig, model: "MultiAdapterCATSModel | None" = None) -> Method:
    """The method that `config` belongs to, with what it holds of `model`: made now, or found from an earlier call.

    Without a model, a method that holds something can be asked for `max_nodes`, and cannot decode.
    """
    cls = CLASSES[config.name]
    if model is None:
        return cls(config)
    method = cls(config, model.resources.get(config, lambda: cls.open(model, config), cls.needs(config).resident_bytes))
    method.model = model
    return method


def needs_of(config: MethodConfig) -> Needs:
    """What the method that `config` belongs to asks of a model."""
    return CLASSES[config.name].needs(config)


def check_runnable(configs: Iterable[MethodConfig], base: "PretrainedConfig", coarse: str | None = None) -> None:
    """Raise `CatsError` where one of the methods lacks something to run with a base model of this configuration; see `Method.lacks`."""
    for config in configs:
        lacking = CLASSES[config.name].lacks(config, base, coarse)
        require(lacking is None, str(lacking))


def with_needs(memory: MemoryOptions, *configs: MethodConfig) -> MemoryOptions:
    """The options, with room for what any of these methods grows, drafts with and holds."""
    needs = [needs_of(config) for config in configs]
    return replace(
        memory,
        nodes=max((memory.nodes, *(build_method(config).max_nodes for config in configs))),
        views=tuple(dict.fromkeys((*memory.views, *(view for need in needs for view in need.views)))),
        method_bytes=memory.method_bytes + sum(need.resident_bytes for need in needs),
    )


def method_of(record: Mapping[str, Any]) -> MethodConfig:
    """The configuration that `cats.settings.as_record` wrote; raises `CatsError` for a name or a setting that is unknown."""
    settings = dict(record)
    name = settings.pop("name")
    require(name in METHODS, f"the method {name!r} is unknown")
    unknown = settings.keys() - {field.name for field in fields(METHODS[name])}
    require(not unknown, f"{name} has no setting {', '.join(sorted(unknown))}")
    known = settings_of(METHODS[name])
    return METHODS[name](**{key: known[key].restored(value) for key, value in settings.items()})


def small_shapes() -> dict[str, MethodConfig]:
    """The small settings of every method, by name."""
    return {name: config for cls in CLASSES.values() for name, config in cls.shapes.items()}


def best_method(adapters: Collection[str], coarse: bool = False, settings: Iterable[str] = ()) -> str:
    """Name of the method that gets most out of these adapters; where it lacks one of the settings, of a coarse form that has them all."""
    best = "prompt_lookup"
    if "draft" in adapters:
        best = "cascade" if "shallow" in adapters else "kangaroo"
    has_all = {name: set(settings) <= settings_of(METHODS[name]).keys() for name in (best, "nested")}
    return "nested" if coarse and has_all["nested"] and not has_all[best] else best
