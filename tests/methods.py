"""Every method in every shape that the tests run: each method says its own (`cats.methods.base.Method.shapes`), files are made here."""

import dataclasses

from cats.config import MemoryOptions, MethodConfig
from cats.methods import needs_of, small_shapes
from cats.methods.medusa import MedusaConfig
from cats.methods.rest import RestConfig
from cats.planning.plan import COARSE, View
from cats.settings import flag_of
from tests.datastores import store_of
from tests.heads import HEADS, heads_of


def shapes_for(width: int) -> dict[str, MethodConfig]:
    """The shapes for models of this width."""
    return small_shapes() | {
        "medusa": MedusaConfig(heads_of(width), nodes=12, depth=HEADS),
        "rest": RestConfig(store_of(8), longest_match=3, shortest_match=1, continuation=4, total_tokens=12),
    }


SHAPES = shapes_for(width=32)


def memory_for(shape: str, memory: MemoryOptions | None = None) -> MemoryOptions | None:
    """The options, with an int8 copy where the shape drafts with a coarse form of plain weights, and with its other views."""
    if memory is not None:
        memory = dataclasses.replace(memory, views=(*memory.views, *sparse_views(shape)))
    return dataclasses.replace(memory or MemoryOptions(), coarse="int8") if COARSE in needs_of(SHAPES[shape]).views else memory


def sparse_views(shape: str) -> tuple[View, ...]:
    """The views of the exact weights that the shape drafts with."""
    return tuple(view for view in needs_of(SHAPES[shape]).views if view != COARSE)


def follows_the_clock(shape: str) -> bool:
    """Whether what a cycle verifies depends on what passes have taken, and so differs from run to run."""
    return shape == "cascade-hidden" or SHAPES[shape].name == "cas_spec" or getattr(SHAPES[shape], "adaptive", False)


def flags_of(config: MethodConfig) -> list[str]:
    """The command-line flags of a method and its settings."""
    flags = ["--method", config.name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool):
            flags.append(flag_of(field.name if value else f"no_{field.name}"))
        elif value is not None:
            flags += [flag_of(field.name), *map(str, value if isinstance(value, tuple) else [value])]
    return flags + (["--coarse", "int8"] if COARSE in needs_of(config).views else [])
