"""A replayed cascade does the work of a real one, in the recorded shape, and accepts what the schedule says."""

from collections.abc import Callable

import pytest

import cats
from evaluation.eval import steps_record
from evaluation.metrics import mean
from evaluation.replay import ReplayedAcceptance, ReplayedCycle, Schedule, replayed
from tests.tiny_models import DRAFT_EXIT, LAYERS, SHALLOW_EXIT, TinyModel
from tests.weight_kinds import of_kind, options_of

Tiny = Callable[[str], TinyModel]
CHAIN = cats.CascadeConfig()
SETTINGS = cats.GenerationConfig(max_new_tokens=60, eos_token_ids=())


def steps_of(tiny: TinyModel, config: cats.CascadeConfig, schedule: Schedule) -> list[cats.Step]:
    """The steps behind the prefill."""
    model = cats.load(tiny.base, tiny.adapters)
    method = replayed(config, schedule, model)
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
    steps = steps_of(tiny("llama"), config, schedule)
    for step, cycle in list(zip(steps, schedule.cycles, strict=False))[:-2]:
        assert step.trace.accepted == cycle.accepted
        assert step.trace.nodes == (1 + config.steps + len(cycle.corrected) if config == CHAIN else 24)
        assert step.trace.shallow_accepted == min(cycle.corrected)
        if config == CHAIN:
            assert step.trace.layer_passes == CHAIN.steps * DRAFT_EXIT + DRAFT_EXIT + (LAYERS - DRAFT_EXIT) + SHALLOW_EXIT
    assert sum(step.trace.committed for step in steps) == SETTINGS.max_new_tokens - 1


def test_a_path_ends_in_the_correction_where_the_schedule_says_so(tiny: Tiny) -> None:
    schedule = Schedule([ReplayedCycle(3, frozenset({2, 5}), through_correction=True), ReplayedCycle(6, frozenset({5}))])
    first, second = steps_of(tiny("llama"), CHAIN, schedule)[:2]
    assert first.trace.accepted_kinds == ("trunk", "trunk", "correction")
    assert second.trace.accepted_kinds == (*("trunk",) * 5, "correction")


def test_a_recorded_run_comes_out_as_it_went(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    real = cats.generate(model, [5, 7, 11], cats.build_method(CHAIN), SETTINGS)
    schedule = Schedule.recorded([steps_record(real.traces)], CHAIN)
    again = steps_of(tiny("llama"), CHAIN, schedule)
    assert len(schedule.cycles) > 5
    for before, after in zip(real.traces[1 : len(schedule.cycles)], again, strict=False):
        assert (before.nodes, before.accepted, before.shallow_accepted, before.layer_passes) == (
            after.trace.nodes,
            after.trace.accepted,
            after.trace.shallow_accepted,
            after.trace.layer_passes,
        )


def test_a_chain_of_nested_weights_is_replayed_too(tiny: Tiny) -> None:
    """Every step is drafted, whatever is accepted of it; memory is as if the text were real."""
    model = cats.load(of_kind(tiny("llama").base, "nested"), memory=options_of("nested", cats.MemoryOptions(pinning=False)))
    config = cats.NestedConfig(steps=8, adaptive=False)
    schedule = Schedule.with_mean(5.5, config, cycles=50)
    assert schedule.mean == pytest.approx(5.5, abs=0.01)
    assert max(cycle.accepted for cycle in schedule.cycles) <= 8
    for _ in range(2):  # a schedule begins anew with each answer
        method = replayed(config, schedule, model)
        steps = list(cats.stream(model, [5, 7, 11], method, SETTINGS, acceptance=ReplayedAcceptance(schedule)))[1:]
        for step, cycle in list(zip(steps, schedule.cycles, strict=False))[:-2]:
            assert (step.trace.nodes, step.trace.accepted) == (9, cycle.accepted)
            assert step.trace.layer_passes == 9 * LAYERS
        assert sum(step.trace.committed for step in steps) == SETTINGS.max_new_tokens - 1


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(cats.CatsError, match="between 1 and 7"):
        Schedule.with_mean(7.5, CHAIN, corrections=2, cycles=10)
    with pytest.raises(cats.CatsError, match="between 1 and 6"):
        Schedule.with_mean(3, CHAIN, corrections=0.5, cycles=10)
    with pytest.raises(cats.CatsError, match="threshold"):
        Schedule.with_mean(3, cats.CascadeConfig(threshold=0.5), corrections=2, cycles=10)
    with pytest.raises(cats.CatsError, match="between 1 and 21"):
        Schedule.with_mean(22, cats.NestedConfig(adaptive=False), cycles=10)
    with pytest.raises(cats.CatsError, match="not adaptive"):
        Schedule.with_mean(3, cats.NestedConfig(), cycles=10)
    with pytest.raises(cats.CatsError, match="number of corrections"):
        Schedule.with_mean(3, cats.NestedConfig(adaptive=False), corrections=2, cycles=10)
    with pytest.raises(cats.CatsError, match="no cycles"):
        Schedule.recorded([], CHAIN)
    turn = {"committed": [1] * 9, "accepted": [0] * 9, "nodes": [3] * 9, "shallow_accepted": [0] * 9}
    with pytest.raises(cats.CatsError, match="3 nodes"):
        Schedule.recorded([turn], CHAIN)
