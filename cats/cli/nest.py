"""`python -m cats.cli.nest SRC DST`: a checkpoint as codes that stay in memory and low bits that are streamed, without the loss of a bit.

    python -m cats.cli.nest SRC DST             convert
    python -m cats.cli.nest --verify DST [SRC]  rebuild every tensor and compare it: its SHA-256, and all bits with SRC
    python -m cats.cli.nest --back DST PLACE    the original checkpoint again

SRC is a checkpoint directory or a hub id. An interrupted run goes on where it was; a directory appears when it is complete.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.config import require


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m cats.cli.nest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    deeds = parser.add_mutually_exclusive_group()
    deeds.add_argument("--verify", action="store_true", help="compare a nested checkpoint with what it was made of")
    deeds.add_argument("--back", action="store_true", help="make the original checkpoint of a nested one")
    parser.add_argument("first", metavar="SRC", help="what is read: a directory or a hub id")
    parser.add_argument("second", metavar="DST", nargs="?", help="what is made; with --verify, the original to compare with")
    arguments = parser.parse_args(argv)
    require(arguments.verify or arguments.second is not None, "say where to write: python -m cats.cli.nest SRC DST.")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Do what was asked for, below a bar."""
    from cats.cli.progress import live_bar
    from cats.hub import locate
    from cats.nested import conversion

    first = locate(arguments.first)
    layout: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False}
    if arguments.verify or arguments.back:
        nested = conversion.opened(first)
        total = sum(nested.nbytes(name) for name in nested.digests)
        with live_bar(total=total, desc="verifying" if arguments.verify else "restoring", **layout) as bar:
            if arguments.verify:
                original = conversion.Source(locate(arguments.second)) if arguments.second else None
                conversion.verify(nested, original, bar.update)
            else:
                conversion.restore(nested, Path(arguments.second), bar.update)
        count = len(nested.digests)
        tensors = f"{first}: all {count} tensors" if arguments.verify else f"{arguments.second}: {count} tensors"
        sys.stdout.write(f"{tensors} bit for bit as they were published\n")
        return
    made = conversion.conversion_of(first, Path(arguments.second))
    sys.stderr.write("".join(f"{nbytes / 1e9:8.3f} GB  {what}\n" for what, nbytes in conversion.shown_sizes(made).items()))
    with live_bar(total=made.original_bytes, desc="nesting", **layout) as bar:
        conversion.convert(made, bar.update)
    sys.stdout.write(f"{made.target}\n")


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    run(parse_arguments(argv))


if __name__ == "__main__":
    main()
