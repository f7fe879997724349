"""How far a draft pays: what its margins have been worth, and what drafting and verifying have cost. Kept as long as the model.

A margin is the distance of a draft's two best logits. What it says is learnt from every verdict, in classes of margins, and forgotten
slowly, so that another kind of text or another temperature is followed. Numbers of this file change what a cycle costs, and never what
is committed.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

SMALLEST = 0.05
"""Margins below this are of the first class; each further class reaches twice as far."""
PRIOR = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
"""Chance that the target takes the draft's token, by class, before anything is known; worth `PRIOR_COUNT` verdicts."""
PRIOR_COUNT, MOST_COUNTED = 4.0, 400.0
SECOND = 0.9
"""Chance that the target takes the draft's second best token where it does not take the best."""
CYCLES_KEPT, CYCLES_NEEDED = 32, 3


@dataclass(frozen=True)
class CycleCost:
    """What a cycle cost, in seconds, and what came of it.

    Attributes:
        drafts: passes of the draft, one after the other.
        draft: seconds of all of them.
        rows: of the exact pass.
        exact: seconds of it.
        total: seconds of the cycle.
        tokens: committed.
    """

    drafts: int
    draft: float
    rows: int
    exact: float
    total: float
    tokens: int


class Pacing:
    """Learns; says how likely a token stands, and whether one more draft pays."""

    nbytes: ClassVar[int] = 0
    """Of the weights and tables that a memory budget counts."""

    def __init__(self) -> None:
        self._counted = [PRIOR_COUNT] * len(PRIOR)
        self._taken = [PRIOR_COUNT * chance for chance in PRIOR]
        self._costs: deque[CycleCost] = deque(maxlen=CYCLES_KEPT)

    def agreement(self, margin: float) -> float:
        """Chance that the target takes the token that the draft prefers by this margin."""
        place = margin_class(margin)
        return self._taken[place] / self._counted[place]

    def second(self, margin: float) -> float:
        """Chance that the target takes the second best instead."""
        return SECOND * (1 - self.agreement(margin))

    def judge(self, margin: float, taken: bool) -> None:
        """Take in a verdict."""
        place = margin_class(margin)
        self._counted[place] += 1
        self._taken[place] += taken
        if self._counted[place] > MOST_COUNTED:
            self._counted[place] /= 2
            self._taken[place] /= 2

    def learn(self, cost: CycleCost) -> None:
        """Take in a finished cycle."""
        if cost.drafts:
            self._costs.append(cost)

    def pays(self, chance: float) -> bool:
        """Whether a draft that stands with this chance saves more than it costs; yes, until enough cycles were measured.

        What a token is worth is what one has cost lately, cycles as a whole; so drafts go on as long as they bring the average down.
        """
        if len(self._costs) < CYCLES_NEEDED:
            return True
        seconds, tokens, drafts = (sum(getattr(cost, name) for cost in self._costs) for name in ("total", "tokens", "drafts"))
        draft = sum(cost.draft for cost in self._costs) / drafts
        return chance * seconds / tokens > draft + self.row_seconds

    @property
    def row_seconds(self) -> float:
        """What one more row adds to the exact pass: the slope through the cycles that are kept, not below 0."""
        rows, seconds = [cost.rows for cost in self._costs], [cost.exact for cost in self._costs]
        middle, mean = fmean(rows), fmean(seconds)
        spread = sum((count - middle) ** 2 for count in rows)
        along = sum((count - middle) * (taken - mean) for count, taken in zip(rows, seconds, strict=True))
        return max(0.0, along / spread) if spread else 0.0


def margin_class(margin: float) -> int:
    """0 for margins below SMALLEST, then one more for each doubling."""
    return min(1 + int(math.log2(margin / SMALLEST)), len(PRIOR) - 1) if margin >= SMALLEST else 0
