"""How many nodes the target pass may verify for nothing: as many as it computes while its weights are streamed."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cats.state import Cycle

LEAST, FIRST, MOST = 16, 40, 512


class HiddenNodes:
    """Learns from every cycle of an answer.

    Attributes:
        nodes: for the next target pass, LEAST to MOST; LEAST where nothing is streamed.
    """

    def __init__(self) -> None:
        self.nodes = FIRST
        self._before = 0.0

    def proposed(self, cycle: "Cycle") -> None:
        """The target pass comes next."""
        self._before = computing(cycle)

    def verified(self, cycle: "Cycle", nodes: int) -> None:
        """A target pass over so many nodes is done."""
        self.nodes = hidden(nodes, computing(cycle) - self._before, cycle.state.base.source.stream_seconds)


def computing(cycle: "Cycle") -> float:
    """Seconds that the processor has worked in this cycle so far."""
    seconds, _ = cycle.reading()
    return seconds["compute"] - seconds["stream_wait"]


def hidden(nodes: int, seconds: float, stream_seconds: float) -> int:
    """Nodes whose share of `seconds`, in which a pass computed `nodes`, fills the stream."""
    return min(MOST, max(LEAST, int(nodes * stream_seconds / max(seconds, 1e-9))))
