"""Tokens per second while weights stream, from result files of `evaluation.benchmarks.streaming`: a Markdown table, and a bar picture.

    python -m evaluation.streamed_speed                            the table, from the committed results
    python -m evaluation.streamed_speed --picture docs/streamed_speed.png       and the bars of its last link

Rows are methods, first on published weights, then on nested ones; columns are links. The accepted length is that of the first link that has
the method. Table and picture of the README are made by this command.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.errors import CatsError
from cats.files import write_atomically
from evaluation.presets import title_of

RESULTS = Path(__file__).with_name("results")
LINKS = ("disk", "500MBs", "100MBs")
PUBLISHED = [RESULTS / f"streaming_{link}.json" for link in LINKS]
NESTED = [RESULTS / f"nested_{link}.json" for link in LINKS]
PLAIN, DISK = "autoregressive", "this disk"
TITLES = {"eagle_self_tree:total_tokens=40": "EAGLE-self tree, 40 nodes", "nested_lookup": "nested, prompt lookup first", "rest": "REST"}
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method on one checkpoint: its figures by link."""

    title: str
    nested: bool
    links: Mapping[str, Figures]


def read_links(paths: Sequence[Path]) -> dict[str, Mapping[str, Figures]]:
    """Link -> method -> figures; a file that is missing or another command's raises `CatsError`."""
    links = {}
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            link, methods = result["link"], result["methods"]
        except (OSError, ValueError, KeyError) as error:
            raise CatsError(f"{path} is no result of evaluation.benchmarks.streaming: {error}; name one that is.") from error
        links[DISK if link.startswith(DISK) else link] = methods
    return links


def rows_of(paths: Sequence[Path], nested: bool) -> list[Row]:
    """Plain decoding, then the other methods, slowest on the last link first."""
    links = read_links(paths)
    last = list(links.values())[-1]
    labels = dict.fromkeys(label for methods in links.values() for label in methods)
    order = sorted(labels, key=lambda label: (label != PLAIN, last[label]["tokens_per_second"] if label in last else 0.0))
    return [Row(title(label), nested, {link: methods[label] for link, methods in links.items() if label in methods}) for label in order]


def title(label: str) -> str:
    """What the table calls a method."""
    label = label.partition(":datastore=")[0]
    return TITLES.get(label) or title_of(label)


def streamed_table(rows: Sequence[Row]) -> str:
    """Accepted length, and tokens per second on each link, as Markdown."""
    links = list(dict.fromkeys(link for row in rows for link in row.links))
    lines = [["weights", "method", "accepted length", *links]]
    for row in rows:
        speeds = [f"{row.links[link]['tokens_per_second']:.2f}" if link in row.links else "-" for link in links]
        length = next(iter(row.links.values()))["accepted_length"]
        lines.append(["nested" if row.nested else "published", row.title, f"{length:.2f}", *speeds])
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *body]) + "\n"


def draw(rows: Sequence[Row], picture: Path) -> None:
    """A bar a method on the last link of the first row, with its interval; nested weights are hatched, so that it can be read in grey."""
    from matplotlib.figure import Figure  # only this picture needs it, and it takes a second to load

    link = list(rows[0].links)[-1]
    shown = [row for row in rows if link in row.links]
    figure = Figure(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(shown):
        speed, (low, high) = (row.links[link][name] for name in ("tokens_per_second", "tokens_per_second_interval"))
        style: dict[str, Any] = {"color": "white", "hatch": "////"} if row.nested else {"color": "#8a8a8a"}
        axes.barh(
            place, speed, edgecolor="black", linewidth=0.7, xerr=[[speed - low], [high - speed]], error_kw={"elinewidth": 0.8}, **style
        )
        axes.annotate(f"{speed:.2f}", (high, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(
        range(len(shown)), [row.title + (", nested weights" if row.nested and row.title == shown[0].title else "") for row in shown]
    )
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(f"tokens/s, weights streamed at {link.removeprefix('emulated ')} (emulated)" if link != DISK else "tokens/s, this disk")
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(picture, lambda part: figure.savefig(part, format="png", dpi=120))


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", nargs="+", type=Path, default=PUBLISHED, metavar="FILE", help="results on published weights")
    parser.add_argument("--nested", nargs="*", type=Path, default=NESTED, metavar="FILE", help="results on nested weights")
    parser.add_argument("--picture", type=Path, help="where to draw the bars (.png)")
    args = parser.parse_args(argv)
    rows = rows_of(args.published, nested=False) + (rows_of(args.nested, nested=True) if args.nested else [])
    if args.picture:
        draw(rows, args.picture)
    sys.stdout.write(streamed_table(rows))


if __name__ == "__main__":
    main()
