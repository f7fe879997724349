"""Replayed acceptance: a cascade, or a chain of nested weights, that does all its work, on any weights, and accepts what a schedule says.

Speed and memory do not depend on what the weights know, except through two things: how many drafted tokens the target accepts, and how
many corrections the shallow verifier adds (a chain of nested weights has none). A `Schedule` fixes both, cycle by cycle: from a recorded
run, or from a stated mean. With it a model of random weights costs what a trained one of its shapes costs. Such a run writes no text, and
every figure made this way says "replayed acceptance".

    schedule = Schedule.with_mean(3.05, CascadeConfig(), corrections=2.7, cycles=100)
    schedule = Schedule.with_mean(11, NestedConfig(adaptive=False), cycles=100)
    stream(model, ids, replayed(config, schedule, model), generation_config, acceptance=ReplayedAcceptance(schedule))
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cats import CascadeConfig, CatsError, CatsModel, MethodConfig, NestedConfig, build_method
from cats.acceptance import Verdict
from cats.config import require
from cats.methods.base import Method
from cats.methods.cascade import Cascade
from cats.methods.nested import Nested
from cats.state import Cycle, DecodeState
from cats.tree import TokenTree

SPREAD = 1.5
"""How far, in tokens, the running total of a schedule with a stated mean may stray from it before rounding."""


@dataclass(frozen=True)
class ReplayedCycle:
    """What happens in one cycle.

    Attributes:
        accepted: drafted tokens accepted along the trunk; the last one may be a correction.
        corrected: places in the chain after which the shallow verifier differs; place `steps` is its free token.
        through_correction: the last accepted token is the correction after place `accepted - 1`.
    """

    accepted: int
    corrected: frozenset[int]
    through_correction: bool = False


class Schedule:
    """The cycles of one answer; method and acceptance rule look at the same one. After the last cycle the first comes again."""

    def __init__(self, cycles: Sequence[ReplayedCycle]):
        if not cycles:
            raise CatsError("there are no cycles to replay; give a recorded run that has some.")
        self.cycles = list(cycles)
        self._place = -1

    def restart(self) -> None:
        """A new answer begins."""
        self._place = -1

    def advance(self) -> ReplayedCycle:
        """The next cycle."""
        self._place += 1
        return self.current

    @property
    def current(self) -> ReplayedCycle:
        """The cycle that `advance` came to."""
        return self.cycles[self._place % len(self.cycles)]

    @property
    def mean(self) -> float:
        """Accepted length: tokens committed per target pass, the target's own next token included."""
        return 1 + sum(cycle.accepted for cycle in self.cycles) / len(self.cycles)

    @classmethod
    def with_mean(
        cls, length: float, config: CascadeConfig | NestedConfig, corrections: float | None = None, *, cycles: int, seed: int = 0
    ) -> "Schedule":
        """A fixed, seeded sequence with accepted length `length`; its running total never strays more than two tokens from that mean.

        Args:
            length: accepted length; 1 accepts nothing, steps + 1 accepts the whole trunk, steps + 2 a cascade's free token as well.
            corrections: of a cascade: mean corrections a cycle, the free token included (at least 1, at most steps + 1).
        """
        check_replayable(config)
        corrects = isinstance(config, CascadeConfig)
        longest = config.steps + (2 if corrects else 1)
        if not 1 <= length <= longest:
            raise CatsError(f"the replayed acceptance is {length}; with {config.steps} steps it lies between 1 and {longest}.")
        if (corrections is not None) != corrects:
            raise CatsError("a cascade is replayed with a number of corrections, and a chain of nested weights without one.")
        drawn = random.Random(seed)
        counts = diffused(length, 1, longest, cycles, drawn)
        if corrections is None:
            return cls([ReplayedCycle(committed - 1, frozenset()) for committed in counts])
        if not 1 <= corrections <= config.steps + 1:
            raise CatsError(
                f"the replayed corrections are {corrections}; with {config.steps} steps they lie between 1 and {config.steps + 1}."
            )
        corrected = diffused(corrections, 1, config.steps + 1, cycles, drawn)
        return cls([_drawn_cycle(committed - 1, count, config.steps, drawn) for committed, count in zip(counts, corrected, strict=True)])

    @classmethod
    def recorded(cls, steps: Iterable[Mapping[str, Any]], config: CascadeConfig) -> "Schedule":
        """The cycles of recorded turns (`steps` of an answer record) of a cascade chain with the same number of steps.

        A record says per cycle how many tokens were accepted, how many nodes the tree had and where the verifier first differed. Where
        its other corrections stood it does not say: they are placed right behind the first. A path that ends one token behind the last
        agreement is taken to end in the correction. Cycles whose trees the end of the answer cut are left out.
        """
        check_replayable(config)
        cycles: list[ReplayedCycle] = []
        for turn in steps:
            left = sum(turn["committed"])
            names = ("committed", "accepted", "nodes", "shallow_accepted")
            for committed, accepted, nodes, agreed in zip(*(turn[name] for name in names), strict=True):
                if left > config.steps + 1:
                    cycles.append(_recorded_cycle(accepted, nodes, agreed, config.steps))
                left -= committed
        return cls(cycles)


def check_replayable(config: CascadeConfig | NestedConfig) -> None:
    """Settings whose work depends on what the weights know cannot be replayed."""
    if isinstance(config, NestedConfig):
        fixed = not config.adaptive and config.draft == "coarse" and not config.siblings
        require(fixed, "a replayed chain of nested weights is not adaptive, and the coarse form alone drafts it: else it follows the text.")
    elif config.threshold > 0 or config.sv_passes > 1:
        raise CatsError("a replayed cascade has threshold 0 and sv-passes 1: with others its work depends on what the weights know.")


def replayed(config: MethodConfig, schedule: Schedule, model: CatsModel) -> Method:
    """The method that does the work of `config` on `model`, to be judged by `ReplayedAcceptance(schedule)`."""
    if isinstance(config, NestedConfig):
        return ReplayedNested(config, schedule, model)
    if isinstance(config, CascadeConfig):
        return ReplayedCascade(config, schedule)
    raise CatsError(f"{config.name} cannot be replayed; only cascade and nested can.")


def diffused(mean: float, least: int, most: int, count: int, drawn: random.Random) -> list[int]:
    """`count` whole numbers between `least` and `most` whose running sum follows `mean`."""
    numbers: list[int] = []
    total = 0
    for place in range(1, count + 1):
        stray = drawn.uniform(-SPREAD, SPREAD) if place < count else 0.0
        number = min(most, max(least, math.floor(place * mean + stray + 0.5) - total))
        numbers.append(number)
        total += number
    return numbers


def _drawn_cycle(accepted: int, corrections: int, steps: int, drawn: random.Random) -> ReplayedCycle:
    """The free token always, the other corrections anywhere else."""
    places = [steps, *drawn.sample(range(steps), corrections - 1)]
    return ReplayedCycle(accepted, frozenset(places), through_correction=accepted > steps)


def _recorded_cycle(accepted: int, nodes: int, agreed: int, steps: int) -> ReplayedCycle:
    """See `Schedule.recorded`."""
    count = nodes - 1 - steps
    if not 1 <= count <= steps + 1:
        raise CatsError(f"a recorded tree has {nodes} nodes, which no chain of {steps} steps has; record a cascade chain with these steps.")
    wanted = dict.fromkeys([steps, *range(agreed, steps), *range(steps)])
    return ReplayedCycle(min(accepted, steps + 1), frozenset(list(wanted)[:count]), through_correction=accepted == agreed + 1)


class Replayed(Method):
    """What follows a schedule: an answer begins it again, each cycle is its next one. Stands before the method in the bases."""

    schedule: Schedule

    def start(self, state: DecodeState) -> None:
        """See `Method`."""
        super().start(state)
        self.schedule.restart()

    def propose(self, cycle: Cycle) -> Sequence[int]:
        """See `Method`."""
        self.schedule.advance()
        return super().propose(cycle)  # type: ignore[safe-super]


class ReplayedCascade(Replayed, Cascade):
    """The cascade; only, where the shallow verifier differs from the draft is taken from the schedule, after it has been computed."""

    def __init__(self, config: CascadeConfig, schedule: Schedule):
        check_replayable(config)
        super().__init__(config)
        self.schedule = schedule

    def _compare(self, cycle: Cycle, trunk: Sequence[int], said: Sequence[int]) -> dict[int, int]:
        corrected = [place for place in sorted(self.schedule.current.corrected) if place < len(said)]
        vocabulary = cycle.state.base.config.vocab_size
        differing = {}
        for place in corrected:
            token = said[place]
            while cycle.tree.child(trunk[place], token) is not None:
                token = (token + 1) % vocabulary
            differing[place] = token
        self._note(cycle, trunk, len(said), differing)
        return differing


class ReplayedNested(Replayed, Nested):
    """A chain of the coarse form, all of it computed."""

    config: NestedConfig

    def __init__(self, config: NestedConfig, schedule: Schedule, model: CatsModel):
        check_replayable(config)
        super().__init__(config, build_method(config, model).resources)
        self.schedule = schedule


class ReplayedAcceptance:
    """An acceptance rule (see cats/acceptance.py) that accepts what the schedule says, as far as the tree reaches."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """The scheduled path and, after it, the target's own best token."""
        best = dict(zip(nodes, logits_TV.argmax(dim=-1).tolist(), strict=True))
        path = [0]
        while len(nodes) > 1 and len(path) <= self.schedule.current.accepted and (child := self._child(tree, path)) is not None:
            path.append(child)
        return Verdict(tuple(path), best[path[-1]], {node: node in path for node in nodes if node})

    def _child(self, tree: TokenTree, path: list[int]) -> int | None:
        cycle = self.schedule.current
        kinds = {tree.kinds[node]: node for node in reversed(tree.children(path[-1]))}
        wanted = "correction" if cycle.through_correction and len(path) == cycle.accepted else "trunk"
        return kinds.get(wanted, kinds.get("trunk", kinds.get("correction")))
