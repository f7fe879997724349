"""The demo's own words: every method answers as plain decoding does, and the figures that were promised are there."""

import pytest

from scripts import demo


def test_the_demo_shows_every_method_and_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--max-new-tokens", "12"])
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith(tuple(demo.METHODS)) and " x " in line]
    assert [row.split("  ")[0].strip() for row in rows] == list(demo.METHODS)
    assert all("yes" in row for row in rows)
    assert rows[0].split()[1] == "1.00"
    assert "\033" not in shown, "colour is for terminals"
    assert shown.strip().splitlines()[-1], "the text of one answer comes last"
