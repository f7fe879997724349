"""The program that an answer holds: fenced or not, the whole function or how it goes on, with words around it."""

from typing import Any

import pytest

from evaluation.candidate_code import program_of

HEAD = 'from typing import List\n\n\ndef add_one(x: int) -> int:\n    """One more.\n    >>> add_one(1)\n    2\n    """\n'
WHOLE = "def add_one(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"Sure:\n```python\n{WHOLE}```\nIt adds one.",
        f"```python\n{WHOLE}",
        f"```\nprint('first')\n```\nThen:\n~~~python\n{WHOLE}~~~",
        "1. Do this:\n   ```python\n   def add_one(x):\n       return x + 1\n   ```",
        "```python\ndef add_one(x: int) -> List[int]:\n    return x + 1\n```",
        "```\n    y = x + 1\n    return y\n```",
        "```python\ny = x + 1\nreturn y\n```",
        WHOLE,
        f"Here is how:\n\n{WHOLE}\nThis returns what is asked.",
        "    return x + 1\n",
        "    return x + 1\n\nThis function adds one.",
        "y = x\n    return y + 1",
        "y = x\nreturn y + 1",
    ],
)
def test_the_program_is_found(answer: str) -> None:
    program = program_of(answer, HEAD, "add_one")
    assert program is not None
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["add_one"](1) == 2


@pytest.mark.parametrize("answer", ["", "\n", "I would add one to x and return it.", "Sure, here is how it goes on."])
def test_words_are_no_program(answer: str) -> None:
    assert program_of(answer, HEAD, "add_one") is None


def test_a_block_that_is_no_python_is_run_and_fails() -> None:
    program = program_of("```python\ndef add_one(x)\n    return\n```", HEAD, "add_one")
    assert program is not None
    with pytest.raises(SyntaxError):
        exec(program, {})


def test_a_loop_of_a_model_takes_no_time() -> None:
    assert program_of("x = = 1\n" * 100_000, HEAD, "add_one") is None
