"""The number that an answer in words ends with, exactly, as a fraction. Pure functions of text.

In this order: what stands behind the last `####`, else inside the last `\\boxed{}`, else the last number. What a model writes on behind its
answer, a next problem of its own, is left out.
"""

import re
from fractions import Fraction

NEXT_PROBLEM = re.compile(r"^\s*(?:Q|Question|Problem)\s*\d*\s*:", re.MULTILINE)
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d{1,2}(?!\w))?|(?<!\w)\.\d+"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])-\s?)?(?:[$€£¥]\s?(?P<inner>-)?)?(?<!\w)(?P<value>{DIGITS})"
    r"(?:\s?/\s?(?P<below>\d+(?:,\d{3})*)(?![\d/])|\s(?P<part>\d+)/(?P<parts>\d+)(?![\d/]))?"
)
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?)\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
LONGEST = 200
"""Characters; what is longer is a loop of a model, no number."""
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_number(text: str) -> Fraction | None:
    """The number that the text ends with; None where it has none."""
    said = plain(text)
    following = next((match.start() for match in NEXT_PROBLEM.finditer(said) if said[: match.start()].strip()), len(said))
    said = said[:following]
    marked = [line for line in said.split("####")[1:] if last_number(line.strip().split("\n")[0]) is not None]
    if marked:
        return last_number(marked[-1].strip().split("\n")[0])
    boxed = [inside for inside in BOXED.findall(said) if last_number(inside) is not None]
    return last_number(boxed[-1] if boxed else said)


def plain(text: str) -> str:
    """The text with LaTeX's and typographers' ways of writing numbers turned into the usual ones, and emphasis left out."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\$", "$").replace("\\%", "%").replace("**", "")
    text = re.sub(r"(?<=\d)(?:\\,|\u202f|\u2009|\u00a0)(?=\d{3}(?!\d))", ",", text)
    return FRACTION.sub(lambda match: f" {match[1]}{match[2]}/{match[3]}", text)


def last_number(text: str) -> Fraction | None:
    """The last number of a text; a fraction over zero is read as the number below its stroke."""
    matches = [number for number in NUMBER.finditer(text) if len(number[0]) <= LONGEST]
    return value_of(matches[-1]) if matches else None


def value_of(match: "re.Match[str]") -> Fraction:
    """A match of `NUMBER` as a fraction."""
    value = Fraction(match["value"].replace(",", ""))
    if match["below"] is not None:
        below = Fraction(match["below"].replace(",", ""))
        value = value / below if below else below
    elif match["part"] is not None and int(match["parts"]):
        value += Fraction(int(match["part"]), int(match["parts"]))
    negative = (match["sign"] is not None) != (match["inner"] is not None)
    return -value if negative else value
