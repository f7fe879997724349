"""Bars move while nothing ends, and stop when they are closed or forgotten."""

import io
import threading
import time

import pytest

from cats.cli import progress


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 0.02)


def beating() -> set[threading.Thread]:
    """Every bar's thread that runs, those of bars of earlier tests included: these may end at any time."""
    return {thread for thread in threading.enumerate() if thread.name == "heartbeat"}


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("quick")
def test_a_bar_is_redrawn_while_one_item_takes_long() -> None:
    before, shown = beating(), io.StringIO()
    with progress.live_bar(total=2, file=shown, desc="answers") as bar:
        drawn = shown.getvalue().count("\r")
        wait_for(lambda: shown.getvalue().count("\r") > drawn + 2)
        bar.update()
    assert "answers" in shown.getvalue()
    wait_for(lambda: beating() <= before)


@pytest.mark.usefixtures("quick")
def test_no_thread_outlives_a_bar_that_is_forgotten_or_never_shown() -> None:
    before = beating()
    assert list(progress.live_bar([1, 2], disable=True)) == [1, 2]
    assert beating() <= before
    assert list(progress.live_bar([1, 2], file=io.StringIO())) == [1, 2]
    wait_for(lambda: beating() <= before)
