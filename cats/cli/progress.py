"""Bars for long work that move at least every few seconds, so that a run that computes can be told from one that has died."""

import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
HEARTBEAT = 4.0  # seconds


def live_bar(items: Iterable[T] | None = None, **settings: Any) -> "tqdm[T]":
    """A tqdm bar that is also redrawn, with the time it has taken so far, while no item ends; settings are tqdm's."""
    bar = tqdm(items, **settings)
    if not bar.disable:
        threading.Thread(target=_beat, args=(weakref.ref(bar),), name="heartbeat", daemon=True).start()
    return bar


@contextmanager
def heartbeat(what: str, shown: bool = True) -> "Iterator[tqdm[Any]]":
    """Say what goes on inside the block, and for how long already, where nothing can be counted; the bar's description may change."""
    with live_bar(desc=what, bar_format="{desc}: {elapsed}", leave=False, disable=not shown) as bar:
        yield bar


def _beat(known: "weakref.ref[tqdm[Any]]") -> None:
    """Redraw until the bar is closed or forgotten."""
    while True:
        time.sleep(HEARTBEAT)
        bar = known()
        if bar is None or bar.disable:
            return
        bar.refresh()
        del bar
