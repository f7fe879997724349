"""`--memory-budget` without a method: the planner chooses one, and two lines on standard error say which and why."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cats
from cats.cli.memory_flags import memory_options
from cats.cli.method_flags import every_setting
from cats.config import MemoryOptions, require

if TYPE_CHECKING:
    from cats.api import AdapterPlace, CatsModel


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """What only planned loads know."""
    parser.add_argument("--measure-again", action="store_true", help="measure the machine for the planner even where it has been")


def is_planned(arguments: argparse.Namespace) -> bool:
    """Whether the command leaves the method to the planner."""
    planned = arguments.memory_budget is not None and arguments.method is None
    require(
        planned or not arguments.measure_again,
        "--measure-again is about choosing a method under a budget; give --memory-budget and no --method with it.",
    )
    return planned


def load_planned(
    arguments: argparse.Namespace, path: str | Path, adapters: "Mapping[str, AdapterPlace]"
) -> "tuple[CatsModel, cats.MethodConfig]":
    """The model within its budget, and the method that the planner chose; what was given on the command line stays as it is."""
    from cats.planned import Planning

    dtypes = {"dtype": arguments.dtype, "compute_dtype": arguments.compute_dtype}
    from cats.cli.progress import heartbeat

    with heartbeat("loading") as bar:
        model = cats.load(
            path,
            with_siblings(arguments, adapters),
            device=arguments.device,
            memory=planned_memory(arguments),
            template=arguments.template,
            plan=Planning(
                given_settings(arguments),
                lambda what, share: bar.set_description_str(f"{what} ({share:.0%})"),
                arguments.measure_again,
            ),
            **dtypes,
        )
    if model.plan is None:
        raise RuntimeError("a load under a budget was not planned")
    lines = list(model.plan.lines)
    if arguments.ledger and model.plan.choice is not None:
        lines += [f"{one.tokens_per_second:9.1f} tokens/s  {one.option.label}" for one in model.plan.choice.candidates]
        lines += [f"     does not fit  {label}" for label in model.plan.choice.refused]
    sys.stderr.write("\n".join(lines) + "\n")
    return model, model.plan.method


def planned_memory(arguments: argparse.Namespace) -> MemoryOptions:
    """The options that were given, with what was not left to the planner."""
    memory = memory_options(arguments, arguments.max_new_tokens, None)
    return replace(memory or MemoryOptions(), ring_buffers=arguments.ring_buffers)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of methods on the command line."""
    settings = {name: getattr(arguments, name) for name in every_setting()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items() if value is not None}


def with_siblings(arguments: argparse.Namespace, adapters: "Mapping[str, AdapterPlace]") -> "dict[str, AdapterPlace | list[AdapterPlace]]":
    """Adapters that came with the default model, with all others of the same folder to choose from; those that were given, alone."""
    candidates: dict[str, AdapterPlace | list[AdapterPlace]] = dict(adapters)
    for name, place in adapters.items():
        brought = getattr(arguments, f"{name}_adapter_path") is None
        if brought and isinstance(place, tuple) and place[1] is None:
            first = Path(place[0])
            others = [path.parent for path in sorted(first.parent.glob("*/config.json")) if path.parent != first]
            candidates[name] = [first, *others]
    return candidates
