"""Fall-back: plain decoding where a method does not pay on this machine, for this text; a trial of the method now and then.

A method pays where it makes more tokens a second than plain decoding, both measured in cycles of their own. Which of the two runs a cycle
changes what it costs, and never what is committed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, ClassVar

import torch

from cats.acceptance import Verdict
from cats.methods.base import Method

if TYPE_CHECKING:
    from cats.cats_model import MultiAdapterCATSModel
    from cats.state import Cycle, DecodeState


@dataclass(frozen=True)
class Patience:
    """When to give up and when to try again, in cycles.

    Attributes:
        stretch: of the method, judged together.
        plain: measured at least before anything is judged; the median of the last `plain_kept` is what a plain one costs.
        fresh: of the method, after which a plain one is measured again, since a longer text costs more.
        pause: plain ones before the first trial; twice as many after each trial that fails, up to `longest_pause`.
        trial: of the method, judged together in a trial.
    """

    stretch: int = 16
    plain: int = 2
    plain_kept: int = 8
    fresh: int = 128
    pause: int = 64
    longest_pause: int = 512
    trial: int = 4


class Gain:
    """What has been measured of one method on one model, and what follows for the next cycle. Kept as long as the model.

    Attributes:
        value: tokens a second of the stretch judged last, as a multiple of plain decoding's; None before that.
    """

    nbytes: ClassVar[int] = 0
    """Of the weights and tables that a memory budget counts."""

    def __init__(self, patience: Patience = Patience()):
        self.patience = patience
        self.value: float | None = None
        self._own: deque[tuple[int, float]] = deque(maxlen=patience.stretch)
        self._plain: deque[float] = deque(maxlen=patience.plain_kept)
        self._since_plain = 0
        self._pause, self._waiting = patience.pause, 0
        self._judged_after, self._settling = patience.stretch, True

    @property
    def pausing(self) -> bool:
        """Whether the method did not pay, and waits for its next trial."""
        return self._waiting > 0

    @property
    def wants_plain(self) -> bool:
        """Whether the next cycle should be plain: in a pause, or to have something to compare with."""
        return self.pausing or (self._complete and not self._comparable)

    @property
    def _complete(self) -> bool:
        return len(self._own) >= self._judged_after

    @property
    def _comparable(self) -> bool:
        return len(self._plain) >= self.patience.plain and self._since_plain < self.patience.fresh

    def settle(self) -> None:
        """Leave the method's next cycle out: it catches up on what plain ones or a new answer left to it."""
        self._settling = True

    def learn(self, plain: bool, tokens: int, seconds: float) -> None:
        """Take in a finished cycle: what it committed and what it took."""
        if plain:
            self._plain.append(seconds / tokens)
            self._since_plain = 0
            self._waiting = max(0, self._waiting - 1)
        else:
            self._since_plain += 1
            if not self._settling:
                self._own.append((tokens, seconds))
            self._settling = False
        if self._complete and self._comparable and not self.pausing:
            self._judge()

    def _judge(self) -> None:
        """Begin a pause where plain decoding was faster; a trial that went well is followed by whole stretches."""
        tokens, seconds = (sum(part) for part in zip(*self._own, strict=True))
        self.value = tokens / seconds * median(self._plain)
        trying = self._judged_after == self.patience.trial
        if self.value < 1:
            self._pause = min(2 * self._pause, self.patience.longest_pause) if trying else self.patience.pause
            self._waiting, self._judged_after = self._pause, self.patience.trial
        elif trying:
            self._judged_after = self.patience.stretch
        if self.value < 1 or trying:
            self._own.clear()
            self.settle()


def measured_seconds(cycle: "Cycle") -> float:
    """What the cycle has taken up to now."""
    return cycle.reading()[0].total


class Fallback(Method):
    """Another method, or plain decoding in its place.

    Args:
        method: that is wrapped; it grows the tree of the cycles that are its own, and observes these alone.
        gain: what is known of it, and is added to.
        seconds: what a cycle took, asked for after its verification.

    Attributes:
        plain_cycles, cycles: of this answer.
        fell_back: whether plain decoding took over in this answer, for more than a comparison.
    """

    def __init__(self, method: Method, gain: Gain, seconds: "Callable[[Cycle], float] | None" = None):
        self.method, self.gain, self._seconds = method, gain, seconds or measured_seconds
        self.config, self.adapters = method.config, method.adapters
        self.plain_cycles = self.cycles = 0
        self.fell_back = self._plain = False

    @property
    def max_nodes(self) -> int:
        """See `Method`."""
        return self.method.max_nodes

    def start(self, state: "DecodeState") -> None:
        """See `Method`."""
        self.plain_cycles = self.cycles = 0
        self.fell_back = False
        self.gain.settle()
        self.method.start(state)

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        self._plain = self.gain.wants_plain
        self.cycles += 1
        self.plain_cycles += self._plain
        self.fell_back |= self.gain.pausing
        return [0] if self._plain else self.method.propose(cycle)

    def observe(self, cycle: "Cycle", nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        """See `Method`."""
        if not self._plain:
            self.method.observe(cycle, nodes, logits_TV, verdict)
        self.gain.learn(self._plain, len(verdict.path), self._seconds(cycle))


def with_fallback(method: Method, model: "MultiAdapterCATSModel") -> Method:
    """The method, wrapped; what is learnt of it is kept with the model. Plain decoding itself has nothing to fall back to."""
    if method.max_nodes == 1:
        return method
    gain: Gain = model.resources.get((Gain, method.config), Gain)
    return Fallback(method, gain)
