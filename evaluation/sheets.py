"""A table in Markdown and in LaTeX (booktabs), and a figure as PNG and PDF. Knows nothing of what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cats.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "<": "$<$", ">": "$>$", "^": r"\^{}"}


@dataclass(frozen=True)
class Sheet:
    """A table: its title, its columns, rows of text, and what is to be said below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Under a heading of the second level."""
        lines = ["| " + " | ".join(row) + " |" for row in (self.head, *self.rows)]
        table = "\n".join([lines[0], "|---" * len(self.head) + "|", *lines[1:]])
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")

    def latex(self) -> str:
        """A table environment for the booktabs package, first column to the left, the others to the right."""
        head, *body = [" & ".join(map(escaped, row)) + r" \\" for row in (self.head, *self.rows)]
        columns = "l" + "r" * (len(self.head) - 1)
        caption = escaped(f"{self.title}. {self.note}" if self.note else self.title)
        lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}"]) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def number(value: float | None, form: str = ".2f") -> str:
    """A figure, a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def save_figure(figure: "Figure", path: Path) -> None:
    """As PNG at `path`, and as PDF beside it."""
    write_atomically(path.with_suffix(".png"), lambda part: figure.savefig(part, format="png", dpi=150))
    write_atomically(path.with_suffix(".pdf"), lambda part: figure.savefig(part, format="pdf"))
