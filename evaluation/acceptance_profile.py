"""What the planner knows of a model's methods: accepted lengths from a table of `evaluation.acceptance_table`, beside the adapters.

    python -m evaluation.acceptance_profile evaluation/results/acceptance.json --adapters data/smollm2-135m/adapters
    python -m evaluation.acceptance_profile nested.json --model-path NESTED

Writes `acceptance.json` into the folder that holds the adapters, or into the model's directory (nested weights bring their own drafter),
one point per method and exits: tokens and nodes per target pass, over all benches of the table together. Exits are those of the table,
or else what the adapter of that name in the folder says. Left out are methods that the planner cannot price, those that read a file
which has a place on one machine only, and those that were not measured on every bench, since benches differ more than methods do; tables
of sampled answers are refused, since the planner predicts greedy ones.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cats.adapter import read_adapter_config
from cats.cli.command import CommandParser, exit_with_sentence
from cats.config import MethodConfig
from cats.errors import CatsError
from cats.methods import method_of, needs_of
from cats.planned import ACCEPTANCE_FILE
from cats.planning.profile import AcceptancePoint, AcceptanceProfile, save_acceptance


def profile_of(cells: Sequence[Mapping[str, Any]], folder: Path) -> AcceptanceProfile:
    """Points of every method that the planner can price and that has a cell of every bench; a method's cells are pooled by their steps."""
    pooled: dict[tuple[Any, tuple[int, ...]], list[Mapping[str, Any]]] = {}
    for cell in cells:
        method = method_of(cell["settings"]["method"])
        if method.priced and cell["summary"]["steps"] and not has_place(method):
            exits = tuple(exit_of(cell["settings"]["adapters"][name], folder) for name in needs_of(method).adapters)
            pooled.setdefault((method, exits), []).append(cell)
    points, benches = [], benches_of(cells)
    for (method, exits), same in pooled.items():
        if benches_of(same).keys() != benches.keys():
            continue
        steps = sum(cell["summary"]["steps"] for cell in same)
        accepted, nodes = (
            sum(cell["summary"][name] * cell["summary"]["steps"] for cell in same) / steps for name in ("accepted_length", "nodes_per_step")
        )
        points.append(AcceptancePoint(method, exits, round(accepted, 4), round(nodes, 2)))
    if not points:
        raise CatsError(
            "the table has no method that the planner can price, of all its benches; measure prompt_lookup, kangaroo, cascade or nested."
        )
    return AcceptanceProfile(tuple(points), (notes_of(cells),))


def benches_of(cells: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    """The benches of some cells, in their order."""
    return dict.fromkeys(cell["settings"]["bench"] for cell in cells)


def has_place(method: MethodConfig) -> bool:
    """Whether a setting names a file or a directory."""
    return any(isinstance(getattr(method, setting.name), Path) for setting in fields(method))


def exit_of(adapter: Mapping[str, Any], folder: Path) -> int:
    """The exit of an adapter of a table."""
    if adapter.get("exit_layer") is not None:
        return int(adapter["exit_layer"])
    if not adapter.get("name") or not (folder / adapter["name"]).is_dir():
        raise CatsError(f"the table does not say the exit of the adapter {adapter.get('name')!r}, and {folder} has none of that name.")
    exit_layer = getattr(read_adapter_config(folder / adapter["name"]), "exit_layer", None)
    if exit_layer is None:
        raise CatsError(f"{folder / adapter['name'] / 'config.json'} does not say the exit layer of the adapter; add it.")
    return int(exit_layer)


def notes_of(cells: Sequence[Mapping[str, Any]]) -> str:
    """How it was measured."""
    settings = cells[0]["settings"]
    benches = ", ".join(benches_of(cells))
    return f"{settings['model']['name']}, greedy, {settings['dtype']}, {benches}, at most {settings['max_new_tokens']} tokens an answer"


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Read the tables, write the profile, say what is in it."""
    parser = CommandParser(
        prog="python -m evaluation.acceptance_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", type=Path, nargs="+", help="result files of evaluation.acceptance_table, of one model")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--adapters", type=Path, help="the folder that holds the adapters; the profile is written there")
    where.add_argument(
        "--model-path", type=Path, help="the directory of a model that drafts without adapters; the profile is written there"
    )
    args = parser.parse_args(argv)
    folder = args.adapters or args.model_path
    if not folder.is_dir():
        raise CatsError(f"there is no directory {folder}; give the folder that holds the adapters, or the model's.")
    try:
        cells = [cell for table in args.tables for cell in json.loads(table.read_text(encoding="utf-8"))["cells"]]
        models = {cell["settings"]["model"]["weights"] for cell in cells}
        sampled = any(cell["settings"].get("temperature") for cell in cells)
        profile = profile_of(cells, folder) if len(models) == 1 and not sampled else None
    except (ValueError, KeyError, TypeError) as error:
        raise CatsError(f"{args.tables[0]} is no table of evaluation.acceptance_table ({type(error).__name__}: {error}).") from error
    if sampled:
        raise CatsError("the tables hold sampled answers, and the planner predicts greedy ones; give tables made without --temperature.")
    if profile is None:
        raise CatsError(f"the tables are of {len(models)} models; give those of one.")
    save_acceptance(profile, folder / ACCEPTANCE_FILE)
    for point in profile.points:
        sys.stdout.write(f"{point.accepted:6.3f}  {point.method.label(point.exits)}\n")


if __name__ == "__main__":
    main()
