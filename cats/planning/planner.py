"""The method that makes the most tokens per second within a budget, and why.

Every setting whose accepted length was measured is priced on this machine (cost.py), with every ring that the budget holds; plain
decoding, which accepts one token and needs no measurement, stands beside them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cats.errors import BudgetError
from cats.planning.cost import CycleSeconds, coarse_share, cycle_seconds, work_of
from cats.planning.plan import Demand, MemoryPlan, ModelSizes, amount, plan_memory
from cats.planning.profile import AcceptancePoint, MachineProfile

RINGS = (2, 3, 4, 6, 8)
ALIKE = 0.02
"""Share of tokens per second that predictions are not told apart by."""


@dataclass(frozen=True)
class Option:
    """A way to run that weights and adapters allow: what was measured of it, and what it asks of memory.

    Attributes:
        assumed: whether its accepted length is an assumption, for want of a measured one.
    """

    point: AcceptancePoint
    sizes: ModelSizes
    demand: Demand
    assumed: bool = False

    @property
    def label(self) -> str:
        """In a few words."""
        return self.point.method.label(self.point.exits)

    @property
    def doubt(self) -> str:
        """What has to be said beside a prediction; empty where all of it was measured."""
        return f" (its {self.point.accepted:g} tokens a cycle are assumed, not measured)" if self.assumed else ""


@dataclass(frozen=True)
class Candidate:
    """An option within the budget, priced."""

    option: Option
    memory: MemoryPlan
    seconds: CycleSeconds

    @property
    def tokens_per_second(self) -> float:
        """Predicted, in the steady state, the prompt left out."""
        return self.option.point.accepted / self.seconds.total


@dataclass(frozen=True)
class Choice:
    """What to run.

    Attributes:
        candidates: every option that fits, with its best ring, the fastest first.
        refused: why the others do not fit, by their labels.
    """

    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    machine: MachineProfile

    @property
    def best(self) -> Candidate:
        """The fastest."""
        return self.candidates[0]

    @property
    def ring_buffers(self) -> int:
        """Size of the chosen ring, in largest matrices."""
        return self.best.memory.demand.ring_buffers

    @property
    def sentence(self) -> str:
        """What was chosen, and what it is predicted to do."""
        best = self.best
        streamed = f", {amount(best.memory.streamed_bytes)} streamed through a ring of {self.ring_buffers}" if best.memory.streamed else ""
        cycle = f"{best.option.point.accepted:.2f} tokens a cycle of {best.seconds.total * 1e3:.1f} ms{streamed}"
        return f"{best.option.label}: {best.tokens_per_second:.1f} tokens/s predicted ({cycle})"

    @property
    def reason(self) -> str:
        """Why: what the next best would do, what bounds a cycle, what does not fit."""
        others = [candidate for candidate in self.candidates[1:] if candidate.option.label != "plain decoding"][:1]
        plain = [candidate for candidate in self.candidates[1:] if candidate.option.label == "plain decoding"]
        parts = [f"{other.option.label} would make {other.tokens_per_second:.1f}{other.option.doubt}" for other in (*others, *plain)]
        parts.append(self._bound() + self.best.option.doubt)
        if self.refused:
            label = next(iter(self.refused))
            more = f" and {len(self.refused) - 1} more do" if len(self.refused) > 1 else " does"
            parts.append(f"{label}{more} not fit the budget")
        return "; ".join(parts)

    def _bound(self) -> str:
        """What a cycle waits for."""
        best = self.best
        if not best.memory.streamed:
            return "the budget holds every layer"
        rate = f"{self.machine.flash_bytes_per_second / 1e9:.2f} GB/s"
        share = best.seconds.stream_wait / best.seconds.total
        if share < 0.01:
            return f"computing hides the stream at {rate}"
        rough = ", roughly: so small a ring overlaps in part" if self.ring_buffers < 3 else ""
        return f"{share:.0%} of a cycle waits for the stream at {rate}{rough}"


def choose(options: Sequence[Option], machine: MachineProfile, budget_bytes: int, covers: str, ring_buffers: int | None = None) -> Choice:
    """The fastest of `options` that fits.

    Args:
        covers: what the budget covers, see `MemoryPlan`.
        ring_buffers: this ring and no other.

    Raises:
        BudgetError: nothing fits; the sentence is that of the option that asks for least.
    """
    rings = RINGS if ring_buffers is None else (ring_buffers,)
    candidates, refused = [], {}
    for option in options:
        try:
            candidates.append(with_best_ring(list(priced(option, machine, budget_bytes, covers, rings))))
        except BudgetError as error:
            refused[option.label] = str(error)
    if not candidates:
        raise BudgetError(refused[min(options, key=lambda option: (option.demand.front, option.demand.nodes)).label])
    ordered = sorted(candidates, key=lambda candidate: candidate.tokens_per_second, reverse=True)
    return Choice(tuple(ordered), refused, machine)


def with_best_ring(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest; of those that are as good as equal to it, one whose ring lets a prompt stream each layer once, then the smallest."""
    fastest = max(candidate.tokens_per_second for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.tokens_per_second >= (1 - ALIKE) * fastest]
    return max(near, key=lambda candidate: (candidate.memory.holds_sublayers, candidate.tokens_per_second, -candidate.memory.ring_bytes))


def priced(option: Option, machine: MachineProfile, budget_bytes: int, covers: str, rings: Sequence[int]) -> Iterator[Candidate]:
    """The option with every ring that fits; raises `BudgetError` where the smallest does not. Where nothing streams, rings are alike."""
    for place, buffers in enumerate(sorted(rings)):
        try:
            memory = plan_memory(option.sizes, replace(option.demand, ring_buffers=buffers), budget_bytes, covers)
        except BudgetError:
            if place == 0:
                raise
            return
        work = work_of(option.point, option.sizes.layers, machine, coarse_share(option.sizes, memory))
        yield Candidate(option, memory, cycle_seconds(option.sizes, memory, machine, work))
        if not memory.streamed:
            return
