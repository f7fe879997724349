"""`--list-methods`: every method in a line, with what it needs, what holds of its text, and what it keeps in memory."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cats.methods import CLASSES, Method
from cats.planning.plan import amount

WEIGHTS = ("*.safetensors", "*.bin")


class ListMethods(argparse.Action):
    """Prints the list and ends the command, as --help does, whatever else is missing; adapters that were given before it count.

    Args:
        brought: adapters of the default model, by name.
    """

    def __init__(self, brought: Mapping[str, Path], **settings: Any):
        super().__init__(nargs=0, **settings)
        self.brought = brought

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        given = getattr(namespace, "model_path", None) is not None
        places = {} if given else dict(self.brought)
        for name in ("draft", "shallow"):
            place = getattr(namespace, f"{name}_adapter_path", None)
            places |= {} if place is None else {name: Path(place)}
        sys.stdout.write("\n".join(method_lines(places)) + "\n")
        parser.exit()


def method_lines(adapters: Mapping[str, Path]) -> list[str]:
    """The list, a line each; bytes are of the default settings, of adapters as far as they lie in these directories."""
    head = ("method", "needs", "resident beside the model", "its text is", "what it does")
    rows = [head, *((name, needed(cls), resident_beside(cls, adapters), cls.guarantee, first_line(cls)) for name, cls in CLASSES.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def first_line(cls: type[Method]) -> str:
    """Of the docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]


def needed(cls: type[Method]) -> str:
    """Adapters, views and things of its own, as the class says."""
    return ", ".join(cls.needs(cls.Config()).words) or "nothing"


def resident_beside(cls: type[Method], adapters: Mapping[str, Path]) -> str:
    """Bytes beside the base, where they are known."""
    needs = cls.needs(cls.Config())
    sizes = [stored(adapters.get(name)) for name in needs.adapters]
    if None in sizes:
        return "its adapters"
    if needs.own and not needs.resident_bytes:
        return f"its {' and '.join(name.removeprefix('a ') for name in needs.own)}"
    nbytes = needs.resident_bytes + sum(size or 0 for size in sizes)
    return amount(nbytes) if nbytes else "nothing"


def stored(adapter: Path | None) -> int | None:
    """Bytes of an adapter's files of weights; None where it does not lie here."""
    if adapter is None or not adapter.is_dir():
        return None
    return sum(path.stat().st_size for pattern in WEIGHTS for path in adapter.glob(pattern))
