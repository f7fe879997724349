"""The program that an answer in words holds, beside the beginning of it that the question gave. Pure functions of text; runs nothing.

An answer holds the whole function, in a fenced block or without one, or only how the given beginning goes on. Lines behind the code that
are no Python are left out; what a block holds is taken as it stands.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", re.MULTILINE | re.DOTALL)
LONGEST, MOST_LINES = 50_000, 500
"""Characters of an answer, and lines of code without a fence, that are looked at."""


def program_of(answer: str, prompt: str, entry_point: str) -> str | None:
    """The whole program of an answer, `prompt` at its beginning; None where the answer holds no code.

    Args:
        prompt: the given beginning: imports, helpers, and the head and docstring of `entry_point`.
    """
    answer = answer[:LONGEST]
    blocks = [block for block in FENCE.findall(answer) if block.strip()]
    whole = re.compile(rf"^[ \t]*(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    for block in blocks:
        if whole.search(block):
            return redefined(prompt, textwrap.dedent(block))
    for block in blocks:
        continued = continuation(prompt, block)
        if continued is not None:
            return continued
    if blocks:
        return prompt + "\n" + textwrap.dedent(blocks[0])
    return unfenced(answer, prompt, whole)


def unfenced(answer: str, prompt: str, whole: "re.Pattern[str]") -> str | None:
    """The program of an answer without a fenced block."""
    if whole.search(answer):
        lines = answer.split("\n")
        begin = next(place for place, line in enumerate(lines) if re.match(r"\s*(?:def|class|import|from|async|@)\b", line + " "))
        code = longest_prefix("", textwrap.dedent("\n".join(lines[begin:])))
        return redefined(prompt, code) if code and whole.search(code) else redefined(prompt, "\n".join(lines[begin:]))
    return continuation(prompt, answer)


def redefined(prompt: str, code: str) -> str:
    """The prompt, for its imports and helpers, and the whole function behind it, which replaces the prompt's."""
    return f"{prompt}\n\n{code}" if parses(prompt) else code


def continuation(prompt: str, text: str) -> str | None:
    """The prompt and the longest beginning of a text that goes on with it as Python; None where that is nothing."""
    candidates = [code for body in indented(text.strip("\n")) if (code := longest_prefix(prompt, body)) is not None]
    return prompt + max(candidates, key=lambda code: code.count("\n")) if candidates else None


def indented(text: str) -> Iterator[str]:
    """The text as it stands, with its first line's indentation given back, which chat templates strip, and indented as a whole."""
    if text[:1] in (" ", "\t"):
        yield text
        return
    yield "    " + text
    yield textwrap.indent(text, "    ")


def longest_prefix(before: str, text: str) -> str | None:
    """The most lines of a text that are Python behind `before` and hold a statement more than it; None where none do."""
    lines = text.rstrip().split("\n")[:MOST_LINES]
    given = statements(before) or 0
    for count in range(len(lines), 0, -1):
        if lines[count - 1].strip():
            code = "\n".join(lines[:count]) + "\n"
            total = statements(before + code)
            if total is not None and total > given:
                return code
    return None


def parses(code: str) -> bool:
    """Whether this is Python."""
    return statements(code) is not None


def statements(code: str) -> int | None:
    """How many statements a program has; None where it is no Python."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(code)
            compile(tree, "answer", "exec", dont_inherit=True)  # finds what the grammar allows and the language does not
            return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
