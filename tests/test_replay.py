"""A replayed cascade does the work of a real one, in the recorded shape, and accepts what the schedule says."""

from collections.abc import Callable

import pytest

import cats
from evaluation.eval import steps_record
from evaluation.metrics import mean
from evaluation.replay import ReplayedAcceptance, ReplayedCascade, ReplayedCycle, Schedule
from tests.tiny_models import DRAFT_EXIT, LAYERS, SHALLOW_EXIT, TinyModel

Tiny = Callable[[str], TinyModel]
CHAIN = cats.CascadeConfig()
SETTINGS = cats.GenerationConfig(max_new_tokens=60, eos_token_ids=())


def replayed(tiny: TinyModel, config: cats.CascadeConfig, schedule: Schedule) -> list[cats.Step]:
    """The steps behind the prefill."""
    model = cats.load(tiny.base, tiny.adapters)
    method = ReplayedCascade(config, schedule)
    return list(cats.stream(model, [5, 7, 11], method, SETTINGS, acceptance=ReplayedAcceptance(schedule)))[1:]


@pytest.mark.parametrize("length", [1.0, 2.34, 3.05, 6.5, 7.0])
def test_the_mean_is_kept_all_along(length: float) -> None:
    schedule = Schedule.with_mean(length, CHAIN, corrections=2.6, cycles=200)
    assert schedule.mean == pytest.approx(length, abs=0.01)
    total = 0
    for place, cycle in enumerate(schedule.cycles, start=1):
        total += cycle.accepted + 1
        assert abs(total - place * length) <= 2
    assert mean([len(cycle.corrected) for cycle in schedule.cycles]) == pytest.approx(2.6, abs=0.01)
    assert schedule.cycles == Schedule.with_mean(length, CHAIN, corrections=2.6, cycles=200).cycles
    assert all(CHAIN.steps in cycle.corrected for cycle in schedule.cycles)


@pytest.mark.parametrize("config", [CHAIN, cats.CascadeConfig(tree_topk=3, total_tokens=24)], ids=["chain", "tree"])
def test_it_accepts_what_the_schedule_says(tiny: Tiny, config: cats.CascadeConfig) -> None:
    schedule = Schedule.with_mean(3.05, config, corrections=2.6, cycles=50)
    steps = replayed(tiny("llama"), config, schedule)
    for step, cycle in list(zip(steps, schedule.cycles, strict=False))[:-2]:
        assert step.trace.accepted == cycle.accepted
        assert step.trace.nodes == (1 + config.steps + len(cycle.corrected) if config == CHAIN else 24)
        assert step.trace.shallow_accepted == min(cycle.corrected)
        if config == CHAIN:
            assert step.trace.layer_passes == CHAIN.steps * DRAFT_EXIT + DRAFT_EXIT + (LAYERS - DRAFT_EXIT) + SHALLOW_EXIT
    assert sum(step.trace.committed for step in steps) == SETTINGS.max_new_tokens - 1


def test_a_path_ends_in_the_correction_where_the_schedule_says_so(tiny: Tiny) -> None:
    schedule = Schedule([ReplayedCycle(3, frozenset({2, 5}), through_correction=True), ReplayedCycle(6, frozenset({5}))])
    first, second = replayed(tiny("llama"), CHAIN, schedule)[:2]
    assert first.trace.accepted_kinds == ("trunk", "trunk", "correction")
    assert second.trace.accepted_kinds == (*("trunk",) * 5, "correction")


def test_a_recorded_run_comes_out_as_it_went(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    real = cats.generate(model, [5, 7, 11], cats.build_method(CHAIN), SETTINGS)
    schedule = Schedule.recorded([steps_record(real.traces)], CHAIN)
    again = replayed(tiny("llama"), CHAIN, schedule)
    assert len(schedule.cycles) > 5
    for before, after in zip(real.traces[1 : len(schedule.cycles)], again, strict=False):
        assert (before.nodes, before.accepted, before.shallow_accepted, before.layer_passes) == (
            after.trace.nodes,
            after.trace.accepted,
            after.trace.shallow_accepted,
            after.trace.layer_passes,
        )


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(cats.CatsError, match="between 1 and 7"):
        Schedule.with_mean(7.5, CHAIN, corrections=2, cycles=10)
    with pytest.raises(cats.CatsError, match="between 1 and 6"):
        Schedule.with_mean(3, CHAIN, corrections=0.5, cycles=10)
    with pytest.raises(cats.CatsError, match="threshold"):
        Schedule.with_mean(3, cats.CascadeConfig(threshold=0.5), corrections=2, cycles=10)
    with pytest.raises(cats.CatsError, match="no cycles"):
        Schedule.recorded([], CHAIN)
    turn = {"committed": [1] * 9, "accepted": [0] * 9, "nodes": [3] * 9, "shallow_accepted": [0] * 9}
    with pytest.raises(cats.CatsError, match="3 nodes"):
        Schedule.recorded([turn], CHAIN)
