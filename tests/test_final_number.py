"""The number that an answer ends with: marks, boxes, units, currencies, signs, fractions, and what a model writes on behind it."""

from fractions import Fraction

import pytest

from evaluation.final_number import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He had 20, so 18 are left.", "18"),
        ("There are 3. #### 1,234", "1234"),
        ("#### 5\nNo, wait.\n#### $7.50 per day", "15/2"),
        ("#### 12 apples\nThat is 3 a day.", "12"),
        ("Nothing behind it: ####, but 4 before", "4"),
        ("####\n12", "12"),
        ("16-3-4=9", "9"),
        ("from 70-80", "80"),
        ("$1,000,000.", "1000000"),
        ("a loss of -5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22123 degrees", "-3"),
        ("-3/4", "-3/4"),
        ("so (5 - 3) = 2 remain", "2"),
        ("The answer is \\boxed{42}, not 41.", "42"),
        ("\\boxed{\\frac{3}{4}} of 8", "3/4"),
        ("\\boxed{\\$1{,}000}", "1000"),
        ("3 1/2 cups", "7/2"),
        ("half, 1/2", "1/2"),
        ("48/2=24", "24"),
        ("50%.", "50"),
        ("1, 2, 3", "3"),
        ("18.", "18"),
        ("18.00", "18"),
        (".5", "1/2"),
        ("3.14.", "157/50"),
        ("5km", "5"),
        ("USD 5.00", "5"),
        ("1e3", "1000"),
        ("**12**", "12"),
        ("10\u202f000 people", "10000"),
        ("7/0", "0"),
        ("#### 10\n\nQ: A farmer has 5 cows.\nA: #### 7", "10"),
        ("Question: how many?\nThere are 6.", "6"),
        ("8 of H2O", "8"),
        ("3 and " + "9" * 5000, "3"),
        ("1e99999999999", "1"),
        ("H2O", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))
