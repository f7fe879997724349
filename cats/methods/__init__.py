"""Every method by name, with the configuration it takes."""

from cats.config import AutoregressiveConfig, CascadeConfig, EagleSelfConfig, KangarooConfig, MethodConfig, PromptLookupConfig
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
