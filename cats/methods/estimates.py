"""What each draft level has been worth and what its passes take, learnt from every cycle. Plain floats, no model.

`Acceptance` is CAS-Spec's moving average, with what a draft's own probabilities have been worth beside it; `Regression` is its latency
model. Numbers of this file change what a cycle costs, and never what is committed.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

PAST, WINDOW = 0.7, 20
"""Of the moving average: the weight of what was known before, and of how many verdicts the latest are counted."""
START, REVIVAL = 0.7, 0.005
"""Acceptance before anything is known, and how much of the way back to it a level goes in a cycle that did not try it."""
BINS, PRIOR_COUNT, MOST_COUNTED = 10, 4.0, 400.0
CERTAIN = 0.995
SCALES = (1.0, 0.1, 0.001, 0.1, 1e-7)
"""Of (1, rows, context, layers, streamed bytes), so that each is about 1."""
FIRST_GUESS = (0.0, 0.0, 0.0, 0.01, 0.0)
"""Seconds per scaled feature before anything is measured: a millisecond a layer."""
VAGUE, MEMORY = 100.0, 0.995
"""Variance of the first guess, in variances of one measurement; weight of each measurement when the next one comes."""
OUTLIER, SETTLED = 4.0, 8
"""A pass that took so many times what was expected was interrupted, and counts as so long; from so many measurements on."""


class Acceptance:
    """How often the target takes what one level drafts.

    Attributes:
        average: moving average over cycles; see `estimate` for what it is in the middle of one.
    """

    def __init__(self, record: Mapping[str, Any] | None = None):
        record = record or {}
        self.average = float(record.get("average", START))
        self._window: deque[float] = deque(map(float, record.get("window", ())), maxlen=WINDOW)
        self._counted = [float(count) for count in record.get("counted", [PRIOR_COUNT] * BINS)]
        self._taken = [float(count) for count in record.get("taken", [PRIOR_COUNT * (place + 0.5) / BINS for place in range(BINS)])]
        self._pending: list[float] = []

    @property
    def record(self) -> dict[str, Any]:
        """What `Acceptance` starts from again."""
        return {"average": self.average, "window": list(self._window), "counted": self._counted, "taken": self._taken}

    def estimate(self) -> float:
        """Chance that the next drafted token stands; tokens of this cycle count with what the draft says of them itself."""
        recent = [*self._window, *self._pending][-WINDOW:]
        return min(CERTAIN, PAST * self.average + (1 - PAST) * fmean(recent) if recent else self.average)

    def chance(self, said: float) -> float:
        """What a token's probability in its draft has been worth."""
        place = min(int(said * BINS), BINS - 1)
        return min(CERTAIN, self._taken[place] / self._counted[place])

    def draft(self, said: float) -> None:
        """A token is drafted and waits for its verdict."""
        self._pending.append(said)

    def judge(self, verdicts: Sequence[tuple[float, bool]]) -> None:
        """The cycle is over: probabilities of tokens whose context stood, and whether they did."""
        self._pending.clear()
        for said, taken in verdicts:
            place = min(int(said * BINS), BINS - 1)
            self._counted[place] += 1
            self._taken[place] += taken
            if self._counted[place] > MOST_COUNTED:
                self._counted[place] /= 2
                self._taken[place] /= 2
        self._window.extend(float(taken) for _, taken in verdicts)
        self.average = self.estimate() if verdicts else self.average + REVIVAL * (START - self.average)


class Regression:
    """Bayesian linear regression of seconds on scaled features, a measurement at a time, with old ones slowly forgotten."""

    def __init__(self, weights: Sequence[float] = FIRST_GUESS, covariance: Sequence[Sequence[float]] | None = None, count: int = 0):
        size = range(len(SCALES))
        self.weights, self.count = list(map(float, weights)), count
        self.covariance = [[float(covariance[i][j]) if covariance else VAGUE * (i == j) for j in size] for i in size]

    @property
    def record(self) -> dict[str, Any]:
        """What `Regression` starts from again."""
        return {"weights": self.weights, "covariance": self.covariance, "count": self.count}

    def seconds(self, rows: float, context: float, layers: float, nbytes: float) -> float:
        """Predicted of one pass."""
        features = (1.0, rows, context, layers, nbytes)
        return max(1e-6, sum(weight * scale * value for weight, scale, value in zip(self.weights, SCALES, features, strict=True)))

    def row_seconds(self) -> float:
        """What one more row costs."""
        return max(0.0, self.weights[1] * SCALES[1])

    def learn(self, rows: float, context: float, layers: float, nbytes: float, seconds: float) -> None:
        """Take in a measured pass."""
        predicted = self.seconds(rows, context, layers, nbytes)
        seconds = min(seconds, OUTLIER * predicted) if self.count >= SETTLED else seconds
        x = [scale * value for scale, value in zip(SCALES, (1.0, rows, context, layers, nbytes), strict=True)]
        projected = [sum(entry * value for entry, value in zip(row, x, strict=True)) for row in self.covariance]
        spread = MEMORY + sum(entry * value for entry, value in zip(projected, x, strict=True))
        error = seconds - sum(weight * value for weight, value in zip(self.weights, x, strict=True))
        self.weights = [weight + entry / spread * error for weight, entry in zip(self.weights, projected, strict=True)]
        self.covariance = [
            [self.covariance[i][j] - projected[i] * projected[j] / spread for j in range(len(x))] for i in range(len(x))
        ]
        if sum(self.covariance[i][i] for i in range(len(x))) < MEMORY * VAGUE * len(x):
            self.covariance = [[entry / MEMORY for entry in row] for row in self.covariance]
        self.count += 1
