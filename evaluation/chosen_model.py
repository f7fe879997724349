"""Which model the flags mean: a directory, a hub id or the default model, and the adapters at the exits that were asked for.

    --model-path M --draft-adapter-path D --shallow-adapter-path S       adapters one by one
    --model-path M --adapters FOLDER --draft-layer 3 --shallow-layer 15  by exit, from a folder that holds them
    --draft-layer 3 --shallow-layer 10                                   the default model's own adapters of these exits
    (nothing)                                                            the default model with its usual adapters

Knows places and configurations; loads nothing.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cats import CatsError, MethodConfig
from cats.adapter import read_adapter_config
from cats.cli.default_model import default_model
from cats.earlyexit import read_config
from cats.hub import locate
from cats.methods import check_runnable, needs_of
from evaluation.options import ADAPTERS, Adapters


@dataclass(frozen=True)
class ChosenModel:
    """A checkpoint that is there, and the adapters that the methods need.

    Attributes:
        name: what results call it: the hub id, or the directory's name.
        directory: of the checkpoint.
        adapters: directory and exit by name; an exit of None is what the adapter's config.json says.
    """

    name: str
    directory: Path
    adapters: Adapters


def chosen_model(methods: list[MethodConfig], args: argparse.Namespace) -> ChosenModel:
    """What the flags of `add_model_flags` mean for these methods; contradictions, and what is missing, raise `CatsError`."""
    check_needed(methods, args)
    name, directory, brought = base_model(args.model_path)
    check_runnable(methods, read_config(directory), getattr(args, "coarse", None))
    needed = {name: config.name for config in methods for name in needs_of(config).adapters}
    adapters = {role: chosen_adapter(role, method, brought, args) for role, method in sorted(needed.items())}
    return ChosenModel(name, directory, adapters)


def base_model(place: str | None) -> tuple[str, Path, Mapping[str, Path]]:
    """Name and directory of the checkpoint at `place` (None: the default model), and the adapters that it brings along."""
    if place is None:
        directory, brought = default_model()
        return directory.resolve().name, directory, brought
    directory = locate(place)
    return (directory.resolve().name if Path(place).expanduser().is_dir() else place), directory, {}


def check_needed(methods: list[MethodConfig], args: argparse.Namespace) -> None:
    """Raise `CatsError` for flags of adapters that none of the methods uses, and for exits in the wrong order."""
    used = " and ".join(dict.fromkeys(config.name for config in methods))
    needed = {name for config in methods for name in needs_of(config).adapters}
    for name in ADAPTERS:
        for flag in (f"{name}_adapter_path", f"{name}_layer"):
            if name not in needed and getattr(args, flag) is not None:
                said = f"--{flag.replace('_', '-')}"
                raise CatsError(f"{said} does nothing for {used}, which has no {name} adapter; leave it out or choose another method.")
    places = [getattr(args, f"{name}_adapter_path") for name in ADAPTERS if name in needed]
    if args.adapters is not None and None not in places:
        raise CatsError(f"--adapters does nothing for {used} here: every adapter that is needed has a place of its own; leave it out.")
    draft, shallow = (getattr(args, f"{name}_layer") for name in ADAPTERS)
    if None not in (draft, shallow) and draft >= shallow:
        raise CatsError(f"--draft-layer {draft} is not before --shallow-layer {shallow}; the draft exit must come first.")


def chosen_adapter(role: str, method: str, brought: Mapping[str, Path], args: argparse.Namespace) -> tuple[Path, int | None]:
    """Directory and exit of the adapter that `method` needs as `role`; a missing one raises `CatsError`."""
    path, layer = getattr(args, f"{role}_adapter_path"), getattr(args, f"{role}_layer")
    if path is not None:
        return locate(path), layer
    if args.adapters is None and layer is None and role in brought:
        return brought[role], None
    folder = Path(args.adapters) if args.adapters is not None else next((place.parent for place in brought.values()), None)
    if folder is None:
        raise CatsError(
            f"the method {method} needs the {role} adapter; give --{role}-adapter-path, or --adapters FOLDER with --{role}-layer."
        )
    if layer is None:
        raise CatsError(f"the method {method} needs the {role} adapter; say by --{role}-layer which of those in {folder} it is.")
    return adapter_of_exit(folder, layer, role), layer


def adapter_of_exit(folder: Path, layer: int, role: str) -> Path:
    """The adapter in `folder` that reads this exit; none, or several, raise `CatsError`."""
    adapters = adapters_in(folder)
    places = adapters.get(layer, [])
    if not places:
        exits = ", ".join(map(str, adapters)) or "none"
        raise CatsError(f"{folder} holds no adapter of exit {layer}, only of {exits}; choose one of them or give --{role}-adapter-path.")
    if len(places) > 1:
        names = ", ".join(place.name for place in places)
        raise CatsError(f"{folder} holds several adapters of exit {layer} ({names}); give one by --{role}-adapter-path.")
    return places[0]


def adapters_in(folder: Path) -> dict[int, list[Path]]:
    """The adapters in the folders of `folder` by exit, in the order of exits; what is no adapter that says its exit is passed over."""
    if not folder.is_dir():
        raise CatsError(f"there is no directory {folder}; --adapters takes one that holds adapters, as training writes them.")
    adapters: dict[int, list[Path]] = {}
    for place in sorted(config.parent for config in folder.glob("*/config.json")):
        exit_layer = getattr(read_adapter_config(place), "exit_layer", None)
        if exit_layer is not None:
            adapters.setdefault(int(exit_layer), []).append(place)
    return dict(sorted(adapters.items()))


def exit_of(adapter: Path) -> int:
    """The exit that an adapter directory says; its absence raises `CatsError`."""
    exit_layer = getattr(read_adapter_config(adapter), "exit_layer", None)
    if exit_layer is None:
        raise CatsError(f"{adapter / 'config.json'} does not say the exit layer of the adapter; write it there.")
    return int(exit_layer)
