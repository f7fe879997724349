"""Which level drafts next, and how far: what each level's drafts have been worth, what passes have cost, and what follows from both.

Plain floats; no model and no torch, so that deciding costs next to nothing beside what is decided. Kept as long as the model; it can be
written to a file and started from. Numbers of this file change what a cycle costs, and never what is committed.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from cats.errors import CatsError
from cats.files import write_atomically
from cats.methods.estimates import FIRST_GUESS, START, WINDOW, Acceptance, Regression

HISTORY = 20_000
TARGET = "target"


def expected(a: float, k: int) -> float:
    """Tokens accepted of a chain of k, each of which stands with chance `a` where the one before it does."""
    return float(k) if a >= 1 else a * (1 - a**k) / (1 - a)


def speed_up(a: float, c: float, k: int) -> float:
    """Of one draft used alone, over plain decoding: k tokens that cost `c` target passes each, then the target's pass and its own token."""
    return (1 + expected(a, k)) / (c * k + 1)


def best_length(a: float, c: float, longest: int) -> int:
    """The k from 0 to `longest` with the best `speed_up`."""
    return max(range(longest + 1), key=lambda k: speed_up(a, c, k))


def gain(a: float, c: float, k: int, a_bottom: float, c_bottom: float) -> float:
    """Tokens that a target pass's time buys: k of a draft, and one of the bottom level behind them."""
    return (expected(a, k) + a**k * a_bottom) / (c * k + c_bottom)


class Option(NamedTuple):
    """A level that may draft behind a leaf, in target passes as the unit of cost.

    Attributes:
        a, c: chance that its next token stands, and what a token costs.
        longest: tokens, at most.
    """

    level: str
    a: float
    c: float
    longest: int


class Choice(NamedTuple):
    """A level, tokens to draft, and the tokens that a target pass's time buys this way where the leaf stands."""

    level: str
    length: int
    gain: float


def best_choice(options: Sequence[Option], a_bottom: float, c_bottom: float) -> Choice | None:
    """The level and length of the greatest `gain`; None where nothing can draft."""
    best: Choice | None = None
    for option in options:
        power, total = 1.0, 0.0
        for k in range(1, option.longest + 1):
            power *= option.a
            total += power
            gain = (total + power * a_bottom) / (option.c * k + c_bottom)
            if best is None or gain > best.gain:
                best = Choice(option.level, k, gain)
    return best


class Router:
    """What is known of levels and passes, for one model.

    Args:
        about: the model and the levels; a saved state of others is refused.
        path: where the state is read from, if it is there, and written to when the model closes; None: nowhere.

    Attributes:
        acceptances: by level.
        hit_rate: share of look-ups that find something, lately.
        judged: lately, (level, chance that was given, whether it stood).
        timed: lately, (level or "target", seconds predicted, seconds measured).
    """

    nbytes: ClassVar[int] = 0
    """Of the weights and tables that a memory budget counts."""

    def __init__(self, about: Mapping[str, Any], levels: Sequence[str], path: Path | None = None):
        self._about, self._path = dict(about) | {"levels": list(levels)}, path
        record = read_state(path, self._about) if path is not None and path.exists() else {"acceptances": {}, "times": {}}
        self.acceptances = {level: Acceptance(record["acceptances"].get(level)) for level in levels}
        self._times = {kind: Regression(**entry) for kind, entry in record["times"].items()}
        self.hit_rate = START
        self.judged: deque[tuple[str, float, bool]] = deque(maxlen=HISTORY)
        self.timed: deque[tuple[str, float, float]] = deque(maxlen=HISTORY)

    def times(self, kind: str) -> Regression:
        """Of the passes of a level, head included, or of the target's; a new kind is expected to be like the target's."""
        if kind not in self._times:
            self._times[kind] = Regression(self.times(TARGET).weights if kind != TARGET else FIRST_GUESS)
        return self._times[kind]

    def ran(self, kind: str, rows: float, context: float, layers: float, nbytes: float, seconds: float) -> None:
        """Take in a measured pass."""
        times = self.times(kind)
        self.timed.append((kind, times.seconds(rows, context, layers, nbytes), seconds))
        times.learn(rows, context, layers, nbytes, seconds)

    def searched(self, hit: bool) -> None:
        """Prompt lookup has had a match, or has not."""
        self.hit_rate += (hit - self.hit_rate) / WINDOW

    def judge(self, verdicts: Sequence[tuple[str, float, bool]]) -> None:
        """The cycle is over: levels, the probabilities that they gave, and whether the target took the tokens."""
        self.judged.extend((level, self.acceptances[level].chance(said), taken) for level, said, taken in verdicts)
        for level, acceptance in self.acceptances.items():
            acceptance.judge([(said, taken) for whose, said, taken in verdicts if whose == level])

    def close(self) -> None:
        """Write the state, where it is to be kept."""
        if self._path is not None:
            acceptances = {level: acceptance.record for level, acceptance in self.acceptances.items()}
            times = {kind: regression.record for kind, regression in self._times.items()}
            text = json.dumps({"about": self._about, "acceptances": acceptances, "times": times}, indent=1) + "\n"
            write_atomically(self._path, lambda part: part.write_text(text, encoding="utf-8"))


def read_state(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state; raises `CatsError` where it cannot be read, or is of another model or other levels."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved = {key: record["about"][key] for key in about}
        for entry in record["acceptances"].values():
            Acceptance(entry)
        for entry in record["times"].values():
            Regression(**entry)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CatsError(f"cannot read the state in {path}: {error!r}; remove the file, or give another --state.") from error
    differing = [key for key in about if saved[key] != about[key]]
    if differing:
        what, was, now = differing[0], saved[differing[0]], about[differing[0]]
        raise CatsError(f"the state in {path} was learnt with {what} {was}, and here it is {now}; give another --state.")
    return record
