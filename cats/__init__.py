"""CATS: cascaded adaptive tree speculation for models that do not fit in memory. Public names."""

from cats.cats_model import MultiAdapterCATSModel
from cats.config import (
    AutoregressiveConfig,
    CascadeConfig,
    EagleSelfConfig,
    GenerationConfig,
    KangarooConfig,
    MemoryOptions,
    MethodConfig,
    PromptLookupConfig,
)
from cats.engine import Generation, Step, generate, stream
from cats.errors import CatsError
from cats.methods import METHODS, build_method
from cats.stopping import StopStrings

load = MultiAdapterCATSModel.from_pretrained

__all__ = [
    "METHODS",
    "AutoregressiveConfig",
    "CascadeConfig",
    "CatsError",
    "EagleSelfConfig",
    "Generation",
    "GenerationConfig",
    "KangarooConfig",
    "MemoryOptions",
    "MethodConfig",
    "MultiAdapterCATSModel",
    "PromptLookupConfig",
    "Step",
    "StopStrings",
    "build_method",
    "generate",
    "load",
    "stream",
]
