"""The settings that make the most tokens per second within a budget, and why.

Every combination of shallow exit, steps, tree and ring that a budget holds is priced (cost.py) and credited with the
accepted length that was measured for it or near it (profile.py); plain decoding under the same budget stands beside them
and is chosen where speculation does not pay. What was set explicitly is never changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cats.config import AutoregressiveConfig, CascadeConfig, MethodConfig
from cats.errors import BudgetError, CatsError
from cats.planning.cost import CycleSeconds, Work, cascade_work, cycle_seconds, largest_window, node_slots, plain_work, tree_nodes
from cats.planning.plan import Demand, MemoryPlan, ModelSizes, amount, plan_memory
from cats.planning.profile import AcceptanceProfile, DeviceProfile, Estimate, chain_nodes

TREES = (16, 24, 32, 40, 60, 96, 128, 192, 256)
RINGS = (3, 4, 6, 8)
CASCADE_SETTINGS = ("steps", "threshold", "tree_topk", "total_tokens", "branch_rounds", "sv_passes")
MEMORY_SETTINGS = ("ring_buffers", "positions", "pinning")
OTHER_SETTINGS = ("method", "draft_exit", "shallow_exit")
Fixed = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to run, priced.

    Attributes:
        exits: draft and shallow exit; empty for plain decoding.
        accepted: predicted tokens per target pass.
    """

    method: MethodConfig
    exits: tuple[int, ...]
    memory: MemoryPlan
    seconds: CycleSeconds
    accepted: Estimate

    @property
    def tokens_per_second(self) -> float:
        """Predicted, in the steady state, the prompt left out."""
        return self.accepted.accepted / self.seconds.total

    @property
    def label(self) -> str:
        """In a few words."""
        if not isinstance(self.method, CascadeConfig):
            return "plain decoding"
        tree = f"tree of {self.method.total_tokens}" if self.method.total_tokens != -1 else f"top-{self.method.tree_topk} branches"
        shape = tree if self.method.tree_topk > 1 else "chain"
        return f"CATS, shallow exit {self.exits[1]}, {self.method.steps} steps, {shape}"

    @property
    def preference(self) -> tuple[float, ...]:
        """Faster first; among equals what is smaller."""
        cascade = self.method if isinstance(self.method, CascadeConfig) else CascadeConfig(steps=1)
        return (self.tokens_per_second, -sum(self.exits), -cascade.steps, -cascade.total_tokens, -self.memory.ring_bytes)


@dataclass(frozen=True)
class Choice:
    """What to run.

    Attributes:
        reasons: sentences for the reader: why this, what bounds it, what of the prediction was not measured.
        alternatives: the best of every other exit, and plain decoding, fastest first.
    """

    best: Candidate
    reasons: tuple[str, ...]
    alternatives: tuple[Candidate, ...]

    @property
    def method(self) -> MethodConfig:
        """The method and its settings."""
        return self.best.method

    @property
    def memory(self) -> MemoryPlan:
        """What stays and what streams."""
        return self.best.memory

    @property
    def seconds(self) -> CycleSeconds:
        """Predicted seconds of a cycle by stage."""
        return self.best.seconds

    @property
    def tokens_per_second(self) -> float:
        """Predicted."""
        return self.best.tokens_per_second


@dataclass(frozen=True)
class Problem:
    """Everything that a choice depends on, checked."""

    sizes: ModelSizes
    device: DeviceProfile
    acceptance: AcceptanceProfile
    budget_bytes: int | None
    covers: str
    exits: tuple[int, ...]
    fixed: Fixed

    def __post_init__(self) -> None:
        known = (*CASCADE_SETTINGS, *MEMORY_SETTINGS, *OTHER_SETTINGS)
        for name in self.fixed:
            if name not in known:
                raise CatsError(f"the planner has no setting {name!r}; it has {', '.join(known)}.")
        if self.fixed.get("method") not in (None, "cascade", "autoregressive"):
            raise CatsError(f"the planner does not plan the method {self.fixed['method']}; it plans cascade and autoregressive.")
        speculative = [name for name in (*CASCADE_SETTINGS, "draft_exit", "shallow_exit") if name in self.fixed]
        if self.fixed.get("method") == "autoregressive" and speculative:
            raise CatsError(f"{speculative[0]} does nothing for plain decoding; leave it out, or plan the method cascade.")
        for exit_layer in self.exits:
            if not self.draft_exit < exit_layer < self.sizes.layers:
                raise CatsError(f"shallow exit {exit_layer} must lie above the draft exit {self.draft_exit} and below {self.sizes.layers}.")

    @property
    def draft_exit(self) -> int:
        """The one set, or the one that acceptance was measured with."""
        return int(self.fixed.get("draft_exit", self.acceptance.draft_exit))

    @property
    def only_cascade(self) -> bool:
        """An explicit setting of CATS asks for CATS."""
        asked = any(name in self.fixed for name in (*CASCADE_SETTINGS, "shallow_exit"))
        return self.fixed.get("method") == "cascade" or (asked and self.fixed.get("method") is None)

    def demands(self, demand: Demand) -> Iterator[Demand]:
        """The demand with what was set of memory, for every ring to be tried."""
        given = {name: self.fixed[name] for name in MEMORY_SETTINGS if name in self.fixed}
        device = self.device
        demand = replace(demand, compute_itemsize=device.compute_itemsize, interpreter_bytes=device.interpreter_bytes, **given)
        rings = (demand.ring_buffers,) if "ring_buffers" in given else RINGS
        for buffers in rings:
            yield replace(demand, ring_buffers=buffers)


def choose(
    sizes: ModelSizes,
    device: DeviceProfile,
    acceptance: AcceptanceProfile,
    budget_bytes: int | None,
    covers: str = "process",
    exits: Sequence[int] = (),
    fixed: Fixed | None = None,
) -> Choice:
    """The fastest way to run that fits.

    Args:
        budget_bytes: None is no limit.
        covers: what the budget covers, see `MemoryPlan`.
        exits: shallow exits for which there are adapters.
        fixed: settings that stay as they are: fields of `CascadeConfig`; method, draft_exit, shallow_exit; ring_buffers,
            positions, pinning. One that belongs to CATS alone asks for CATS.

    Raises:
        CatsError: nothing fits (the sentence says what would), or settings contradict each other.
    """
    fixed = dict(fixed or {})
    shallow_exits = (int(fixed["shallow_exit"]),) if "shallow_exit" in fixed else tuple(sorted(set(exits)))
    problem = Problem(sizes, device, acceptance, budget_bytes, covers, shallow_exits, fixed)
    by_exit: dict[int, Candidate] = {}
    if fixed.get("method") != "autoregressive":
        for exit_layer in problem.exits:
            found = list(cascades(problem, exit_layer))
            if found:
                by_exit[exit_layer] = max(found, key=lambda candidate: candidate.preference)
    plain = max(plains(problem), key=lambda candidate: candidate.preference, default=None)
    options = [*by_exit.values(), *([plain] if plain else [])]
    eligible = list(by_exit.values()) if problem.only_cascade else options
    if not eligible:
        raise CatsError(nothing_fits(problem))
    best = max(eligible, key=lambda candidate: candidate.preference)
    others = sorted((option for option in options if option is not best), key=lambda option: -option.tokens_per_second)
    return Choice(best, tuple(reasons(problem, best, by_exit, plain)), tuple(others))


def plains(problem: Problem) -> Iterator[Candidate]:
    """Plain decoding, with every ring that fits."""
    work = plain_work(problem.sizes, problem.device)
    yield from priced(problem, Demand(), AutoregressiveConfig(), (), work, Estimate(1.0, ()))


def cascades(problem: Problem, shallow_exit: int) -> Iterator[Candidate]:
    """CATS at one exit, with every chain, tree and ring that fits."""
    exits = (problem.draft_exit, shallow_exit)
    for config in configurations(problem):
        settings = vars(config)
        branched = tree_nodes(settings) if config.tree_topk > 1 else None
        accepted = problem.acceptance.estimate(shallow_exit, config.steps, branched)
        demand = Demand(front=shallow_exit, adapters=2, nodes=node_slots(settings))
        yield from priced(problem, demand, config, exits, cascade_work(problem.sizes, problem.device, exits, settings), accepted)


def configurations(problem: Problem) -> Iterator[CascadeConfig]:
    """Settings to be tried: what was fixed, steps up to the longest measured, trees up to the largest measured."""
    acceptance = problem.acceptance
    fixed = {name: problem.fixed[name] for name in CASCADE_SETTINGS if name in problem.fixed}
    measured = {point.nodes for point in acceptance.trees if point.nodes}
    trees = sorted(nodes for nodes in {*TREES, *measured} if nodes <= max(measured, default=0))
    base = {"sv_passes": acceptance.sv_passes, **fixed}
    branched = fixed.get("tree_topk", 1) > 1 or fixed.get("total_tokens", -1) != -1 or fixed.get("branch_rounds", 1) > 1
    for steps in (fixed["steps"],) if "steps" in fixed else range(1, acceptance.longest + 1):
        if fixed.get("tree_topk") == 1 or not branched:
            yield CascadeConfig(**{**base, "steps": steps, "tree_topk": 1})
        if fixed.get("tree_topk") == 1:
            continue
        branching = {"tree_topk": acceptance.tree_topk, "branch_rounds": acceptance.branch_rounds, **base, "steps": steps}
        larger = [nodes for nodes in trees if nodes > chain_nodes(steps)]
        for total in (fixed["total_tokens"],) if "total_tokens" in fixed else larger or (-1,):
            yield CascadeConfig(**{**branching, "total_tokens": total})


def priced(
    problem: Problem, demand: Demand, method: MethodConfig, exits: tuple[int, ...], work: Work, accepted: Estimate
) -> Iterator[Candidate]:
    """The candidates that fit, one for every ring; a ring is of no use where nothing streams."""
    for wanted in problem.demands(demand):
        try:
            memory = plan_memory(problem.sizes, wanted, problem.budget_bytes, problem.covers)
        except BudgetError:
            continue
        yield Candidate(method, exits, memory, cycle_seconds(problem.sizes, memory, problem.device, work), accepted)
        if not memory.streamed:
            return


def smallest_budget(problem: Problem, demand: Demand) -> int:
    """Bytes of the smallest budget that a demand fits in."""
    least = min(problem.demands(demand), key=lambda wanted: wanted.ring_buffers)
    low, high = 0, 1 << 50
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_memory(problem.sizes, least, middle, problem.covers)
            high = middle
        except BudgetError:
            low = middle
    return high


def smallest_cascade(problem: Problem, exit_layer: int) -> int:
    """Bytes of the smallest budget for CATS at an exit."""
    slots = min(node_slots(vars(config)) for config in configurations(problem))
    return smallest_budget(problem, Demand(front=exit_layer, adapters=2, nodes=slots))


def nothing_fits(problem: Problem) -> str:
    """The sentence for a budget that is too small, with the smallest that is not."""
    if problem.only_cascade and not problem.exits:
        return "CATS needs a shallow exit; give --shallow-exits with the exits that have an adapter."
    what = "the whole process" if problem.covers == "process" else "the weights"
    needs = [] if problem.only_cascade else [f"plain decoding needs {amount(smallest_budget(problem, Demand()))}"]
    if problem.exits and problem.fixed.get("method") != "autoregressive":
        needs.append(f"CATS with shallow exit {problem.exits[0]} needs {amount(smallest_cascade(problem, problem.exits[0]))}")
    advice = ", use fewer --budget-positions, or let the budget cover the weights alone" if problem.covers == "process" else ""
    return f"{amount(problem.budget_bytes or 0)} for {what} is too small: {', and '.join(needs)}; raise the budget{advice}."


def reasons(problem: Problem, best: Candidate, by_exit: Mapping[int, Candidate], plain: Candidate | None) -> Iterator[str]:
    """Why `best`, in sentences."""
    yield from exit_reasons(problem, best, by_exit)
    if plain is None:
        yield "Plain decoding does not fit this budget, so there is nothing to compare with."
    elif best is not plain:
        ratio = best.tokens_per_second / plain.tokens_per_second
        verdict = "faster" if ratio > 1 else "SLOWER: speculation does not pay here, and was chosen because a setting asked for it"
        factor = ratio if ratio > 1 else 1 / ratio
        yield f"Plain decoding in the same budget would make {plain.tokens_per_second:.3f} tokens/s; this is {factor:.2f} times {verdict}."
    yield bound_reason(problem, best)
    if best.memory.streamed and best.memory.ring_bytes < 3 * largest_window(problem.sizes):
        yield "A ring of fewer than three of the largest matrices overlaps reading and computing only in part; its prediction is rough."
    yield from best.accepted.doubts
    yield from setting_doubts(problem, best)


def exit_reasons(problem: Problem, best: Candidate, by_exit: Mapping[int, Candidate]) -> Iterator[str]:
    """What became of every shallow exit."""
    if not best.exits:
        if not problem.exits and problem.fixed.get("method") != "autoregressive":
            yield "No shallow exit with an adapter was given, so plain decoding is all there is."
        elif by_exit:
            other = max(by_exit.values(), key=lambda candidate: candidate.preference)
            yield f"Speculation does not pay here: {other.label} would make {other.tokens_per_second:.3f} tokens/s."
    for exit_layer in problem.exits if problem.fixed.get("method") != "autoregressive" else ():
        if exit_layer not in by_exit:
            yield f"Shallow exit {exit_layer} does not fit: CATS with it needs {amount(smallest_cascade(problem, exit_layer))}."
        elif by_exit[exit_layer] is not best and best.exits:
            other = by_exit[exit_layer]
            theirs = f"{other.tokens_per_second:.3f} tokens/s, accepting {other.accepted.accepted:.2f}"
            ours = f"{best.tokens_per_second:.3f}, accepting {best.accepted.accepted:.2f}"
            yield f"Shallow exit {exit_layer} at its best would make {theirs}; exit {best.exits[1]} makes {ours}."


def bound_reason(problem: Problem, best: Candidate) -> str:
    """What a cycle waits for."""
    memory, seconds = best.memory, best.seconds
    if not memory.streamed:
        return "The budget holds every layer, so nothing is streamed and only computing counts."
    rate = f"{problem.device.flash_bytes_per_second / 1e9:.2f} GB/s"
    streamed = f"{amount(memory.streamed_bytes)} streamed per target pass at {rate}"
    share = seconds.stream_wait / seconds.total
    if share < 0.01:
        return f"Computing hides the stream ({streamed}): a faster flash would change nothing, a smaller tree might."
    return f"A cycle waits {seconds.stream_wait:.3f} of its {seconds.total:.3f} s for the stream ({streamed}): memory and flash bound it."


def setting_doubts(problem: Problem, best: Candidate) -> Iterator[str]:
    """Settings whose effect on acceptance was not measured."""
    if not isinstance(best.method, CascadeConfig):
        return
    acceptance = problem.acceptance
    if problem.draft_exit != acceptance.draft_exit:
        yield f"Acceptance was measured with draft exit {acceptance.draft_exit}, not {problem.draft_exit}; it is taken over as it is."
    if best.method.sv_passes != acceptance.sv_passes:
        yield f"Acceptance was measured with sv-passes {acceptance.sv_passes}, not {best.method.sv_passes}; it is taken over as it is."
    if best.method.threshold > 0:
        yield "A threshold's effect is not predicted: chains are priced and credited at full length."
    if best.method.tree_topk > 1:
        for name in ("tree_topk", "branch_rounds"):
            ours, measured = getattr(best.method, name), getattr(acceptance, name)
            if ours != measured:
                yield f"Trees were measured with {name.replace('_', '-')} {measured}, not {ours}; their gain is taken over as it is."
