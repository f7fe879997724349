"""The planner's arithmetic: cycles against a simulated ring and the engine's own counts, choices by hand, profiles in files."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import cats
from cats import (
    AutoregressiveConfig,
    CascadeConfig,
    KangarooConfig,
    LookaheadConfig,
    MedusaConfig,
    MethodConfig,
    NestedConfig,
    PromptLookupConfig,
)
from cats.errors import BudgetError, CatsError
from cats.methods import method_of
from cats.planning.cost import Work, cycle_seconds, read_ahead, work_of
from cats.planning.plan import Demand, MemoryPlan, ModelSizes, plan_memory, window
from cats.planning.planner import Choice, Option, choose
from cats.planning.profile import (
    AcceptancePoint,
    AcceptanceProfile,
    MachineProfile,
    load_acceptance,
    load_machine,
    save_acceptance,
    save_machine,
    seconds_for,
)
from tests.tiny_models import DRAFT_EXIT, LAYERS, SHALLOW_EXIT, TinyModel, prompts

GB = 10**9
MATRICES = {"self_attn.q_proj": 4096, "self_attn.k_proj": 4096, "self_attn.v_proj": 4096, "self_attn.o_proj": 4096}
MATRICES |= {"mlp.gate_proj": 11008, "mlp.up_proj": 11008, "mlp.down_proj": 11008}
PLAIN = AcceptancePoint(AutoregressiveConfig(), (), 1.0, 1.0)
LAYER = ((1, 0.01), (41, 0.05))
MACHINE = MachineProfile({"processor": "one"}, "2026-01-01", 2e9, 1e-5, 1e-3, ((1, 1e-4),), LAYER, ((1, 0.01),), ((1, 0.02),))


@cache
def vicuna() -> ModelSizes:
    """Vicuna-7B in float16."""
    matrices = tuple((name, 2 * 4096 * wide) for name, wide in MATRICES.items())
    return ModelSizes(32, 4096, 11008, 32000, 4096, matrices, 4 * 4096, 2 * 32000 * 4096, 2 * 4 * 4096 * 4096)


# --- the cost of a cycle


def simulated(sizes: ModelSizes, memory: MemoryPlan, rate: float, work: Work) -> float:
    """Seconds of a cycle of the real ring: windows of whole matrices, first in first out, contiguous, read as soon as there is room."""
    passed = [piece for piece in sizes.pieces if piece.layer >= memory.demand.front]
    per_byte = work.layers / sum(piece.nbytes for piece in passed)
    streamed, clock, read_until, head, ends = set(memory.streamed), 0.0, 0.0, 0, []
    live: list[tuple[int, int, float]] = []
    for _ in range(6):
        clock += work.draft + work.shallow
        for piece in passed:
            if piece in streamed:
                length = window(piece.nbytes)
                head = 0 if head + length > memory.ring_bytes else head
                in_the_way = [place for place in live if place[0] < head + length and place[1] > head]
                live = [place for place in live if place not in in_the_way]
                read_until = max(read_until, *(released for _, _, released in in_the_way), 0.0) + piece.nbytes / rate
                clock = max(clock, read_until)
                live.append((head, head + length, clock + piece.nbytes * per_byte))
                head += length
            clock += piece.nbytes * per_byte
        clock += work.rest
        ends.append(clock)
    return (ends[-1] - ends[2]) / 3


def situations(ring_buffers: int) -> Iterator[tuple[MemoryPlan, Work, float]]:
    """Plans of Vicuna-7B, with (streaming : computing : front) in many proportions; the last number is computing by streaming."""
    for front, spare in ((0, 2.0), (5, 0.4), (10, 4.0), (15, 2.5)):
        budget = int(1.2 * GB + front * 0.406 * GB + spare * GB)
        memory = plan_memory(vicuna(), Demand(front=front, adapters=2, ring_buffers=ring_buffers), budget, "weights")
        stream = memory.streamed_bytes / MACHINE.flash_bytes_per_second
        for target in (0.01, 0.1, 0.3, 0.6, 0.9, 1.0, 1.1, 1.5, 3.0):
            for ahead in (0.0, 0.05, 0.1, 0.3, 1.0):
                yield memory, Work(ahead * stream / 2, ahead * stream / 2, target * stream, 0.02 * target * stream), target


def predicted(memory: MemoryPlan, work: Work, machine: MachineProfile = MACHINE) -> float:
    return cycle_seconds(vicuna(), memory, replace(machine, take_seconds=0.0), work).total


@pytest.mark.parametrize("ring_buffers", [3, 4, 6, 8])
def test_cost_agrees_with_a_simulated_ring(ring_buffers: int) -> None:
    errors = []
    for memory, work, target in situations(ring_buffers):
        error = abs(predicted(memory, work) / simulated(vicuna(), memory, MACHINE.flash_bytes_per_second, work) - 1)
        assert error < (0.05 if 0.8 < target < 1.2 else 0.03), (memory.demand, work)
        errors.append(error)
    assert sum(error < 0.02 for error in errors) > 0.95 * len(errors)
    assert sum(errors) / len(errors) < 0.005


@pytest.mark.parametrize("ring_buffers", [1, 2])
def test_a_small_rings_cost_is_roughly_right(ring_buffers: int) -> None:
    errors = [
        predicted(memory, work) / simulated(vicuna(), memory, MACHINE.flash_bytes_per_second, work) - 1
        for memory, work, target in situations(ring_buffers)
        if memory.demand.front in (0, 5) or target < 0.5
    ]
    assert abs(sum(errors) / len(errors)) < 0.1
    assert max(map(abs, errors)) < 0.3


def test_cost_by_hand() -> None:
    sizes = replace(vicuna(), layers=2)
    memory = plan_memory(sizes, Demand(front=0, ring_buffers=3, pinning=False), 2 * GB, "weights")
    machine = replace(MACHINE, flash_bytes_per_second=float(memory.streamed_bytes), take_seconds=0.0)  # one pass a second
    assert cycle_seconds(sizes, memory, machine, Work(0.0, 0.0, 0.0, 0.0)).total == pytest.approx(1.0)
    late = cycle_seconds(sizes, memory, machine, Work(3.0, 2.0, 0.0, 0.0))
    assert late.total == pytest.approx(5 + 1 - read_ahead(memory) / memory.streamed_bytes)
    busy = cycle_seconds(sizes, memory, machine, Work(1.0, 1.0, 9.0, 1.0))
    assert (busy.total, busy.stream_wait) == pytest.approx((12.0, 0.0))
    taking = cycle_seconds(sizes, memory, replace(machine, take_seconds=0.5), Work(1.0, 1.0, 9.0, 1.0))
    assert taking.total == pytest.approx(12.0 + 0.5 * len(memory.streamed))


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        (AutoregressiveConfig(), ()),
        (PromptLookupConfig(), ()),
        (KangarooConfig(steps=3, threshold=0.0), ("draft",)),
        (CascadeConfig(steps=3), ("draft", "shallow")),
        (CascadeConfig(steps=4, tree_topk=3, total_tokens=24), ("draft", "shallow")),
        (CascadeConfig(steps=3, tree_topk=4, total_tokens=30, sv_passes=2), ("draft", "shallow")),
        (LookaheadConfig(window=3, levels=4, guesses=2), ()),
        (NestedConfig(steps=6, adaptive=False), ()),
        (NestedConfig(steps=6, adaptive=False, siblings=2), ()),
    ],
)
def test_a_cycle_is_priced_with_the_passes_that_the_engine_makes(
    tiny: Callable[[str], TinyModel], method: MethodConfig, needed: tuple[str, ...]
) -> None:
    """A machine on which a layer takes a second, whatever the rows, and all else nothing: seconds are layer passes."""
    memory = cats.MemoryOptions(coarse="int8") if method.name == "nested" else None
    model = cats.load(tiny("llama").base, {name: tiny("llama").adapters[name] for name in needed}, memory=memory)
    config = cats.GenerationConfig(max_new_tokens=48, eos_token_ids=())
    traces = cats.generate(model, prompts(1, 20, seed=3)[0], method, config).traces[1:]
    usual, nodes = Counter((trace.layer_passes, trace.nodes) for trace in traces).most_common(1)[0][0]
    machine = replace(MACHINE, step_seconds=0.0, pass_seconds=((1, 0.0),), layer_seconds=((1, 1.0),), head_seconds=((1, 0.0),))
    point = AcceptancePoint(method, (DRAFT_EXIT, SHALLOW_EXIT)[: len(needed)], 2.0, nodes)
    machine = replace(machine, exit_seconds=((1, 0.0),), coarse_layer_seconds=((1, 1.0),))
    assert work_of(point, LAYERS, machine).total == pytest.approx(usual)


def test_passes_of_the_coarse_form_cost_what_they_read() -> None:
    """Of matrices whose exact form stands for the coarse one, the exact form."""
    machine = replace(
        MACHINE, pass_seconds=((1, 0.0),), layer_seconds=((1, 2.0),), head_seconds=((1, 0.5),), coarse_layer_seconds=((1, 1.0),)
    )
    machine = replace(machine, exit_seconds=((1, 0.25),), step_seconds=0.0)
    chain = AcceptancePoint(NestedConfig(steps=4, adaptive=False), (), 3.0, 5.0)
    assert [work_of(chain, 10, machine, share).draft for share in (1.0, 0.5, 0.0)] == pytest.approx([42.0, 62.0, 82.0])
    assert (work_of(chain, 10, machine).layers, work_of(chain, 10, machine).rest) == (20.0, 0.5)
    batches = AcceptancePoint(NestedConfig(steps=4, adaptive=False, draft="lookup"), (), 3.0, 5.0)
    assert work_of(batches, 10, machine).draft == pytest.approx(21.0)
    drafted = AcceptancePoint(NestedConfig(steps=4, adaptive=False, draft="adapter"), (3,), 3.0, 5.0)
    assert work_of(drafted, 10, machine).draft == pytest.approx(21.0 + 2 * 8 * (3.0 + 0.25))
    assert work_of(AcceptancePoint(MedusaConfig(depth=3), (), 2.0, 64.0), 10, machine).draft == 0.5
    assert not NestedConfig().priced
    with pytest.raises(ValueError, match="cost of a cycle of nested is not known"):
        work_of(AcceptancePoint(NestedConfig(), (), 3.0, 5.0), 10, machine)


def test_seconds_between_and_beyond_the_measured_rows() -> None:
    table = ((1, 1.0), (4, 2.5), (8, 4.5))
    assert [seconds_for(table, rows) for rows in (1, 2, 4, 6, 8, 16)] == pytest.approx([1.0, 1.5, 2.5, 3.5, 4.5, 8.5])
    assert seconds_for(((1, 2.0), (2, 1.0)), 50) == 1.0


# --- choices


def options(*points: AcceptancePoint, **demand: Any) -> list[Option]:
    return [
        Option(point, vicuna(), Demand(front=max(point.exits, default=0), adapters=len(point.exits), nodes=40, **demand))
        for point in (PLAIN, *points)
    ]


def chain(shallow_exit: int, accepted: float, steps: int = 5) -> AcceptancePoint:
    return AcceptancePoint(CascadeConfig(steps=steps), (3, shallow_exit), accepted, 9.0)


def planned(budget_gb: float, *points: AcceptancePoint, covers: str = "weights", ring: int | None = None) -> Choice:
    return choose(options(*points), MACHINE, int(budget_gb * GB), covers, ring)


def test_the_fastest_that_fits_is_chosen_and_the_two_sentences_say_so() -> None:
    choice = planned(8, chain(10, 2.5), chain(15, 3.05))
    best = choice.best
    assert best.option.label == "CATS chain, exits 3 and 15, 5 steps"
    assert best.memory.charged <= 8 * GB
    assert best.tokens_per_second == pytest.approx(3.05 / best.seconds.total)
    assert choice.sentence.startswith(f"{best.option.label}: {best.tokens_per_second:.1f} tokens/s predicted (3.05 tokens a cycle")
    assert "CATS chain, exits 3 and 10, 5 steps would make" in choice.reason
    assert "plain decoding would make" in choice.reason
    assert "waits for the stream at 2.00 GB/s" in choice.reason


def test_what_does_not_fit_is_left_out_and_named() -> None:
    choice = planned(5, chain(10, 2.5), chain(15, 9.0), chain(15, 9.0, steps=3))
    assert choice.best.option.point.exits == (3, 10)
    assert "CATS chain, exits 3 and 15, 5 steps and 1 more do not fit the budget" in choice.reason
    with pytest.raises(BudgetError, match="the weights need at least"):
        planned(0.3, chain(10, 2.5))


def test_plain_decoding_where_speculation_does_not_pay() -> None:
    choice = planned(16, chain(10, 1.01))
    assert choice.best.option.label == "plain decoding"
    assert "the budget holds every layer" in choice.reason


def test_a_given_ring_is_kept_and_a_small_one_is_called_rough() -> None:
    assert {planned(6, chain(10, 2.5), ring=ring).ring_buffers for ring in (1, 5)} == {1, 5}
    assert "roughly" in planned(6, chain(10, 2.5), ring=1).reason
    best = planned(6, chain(10, 2.5)).best.tokens_per_second
    assert all(planned(6, chain(10, 2.5), ring=ring).best.tokens_per_second * 0.98 <= best for ring in (2, 3, 8))


def test_of_rings_alike_one_that_lets_a_prompt_stream_each_layer_once_is_taken() -> None:
    best = choose(options(), replace(MACHINE, flash_bytes_per_second=1e13, take_seconds=0.0), 2 * GB, "weights").best
    least = choose(options(), replace(MACHINE, flash_bytes_per_second=1e13, take_seconds=0.0), 2 * GB, "weights", 2).best
    assert best.memory.holds_sublayers
    assert not least.memory.holds_sublayers
    assert best.tokens_per_second == pytest.approx(least.tokens_per_second, rel=0.02)


def test_more_memory_and_faster_flash_never_predict_slower() -> None:
    rates = [planned(budget / 4, chain(10, 2.5), ring=3).best.tokens_per_second for budget in range(22, 64, 3)]
    assert all(after >= before * 0.999 for before, after in pairwise(rates)), rates
    fast = choose(options(), replace(MACHINE, flash_bytes_per_second=1e13), 8 * GB, "weights")
    assert "computing hides the stream" in fast.reason
    assert fast.best.tokens_per_second > planned(8).best.tokens_per_second


def test_labels() -> None:
    assert KangarooConfig().label((3,)) == "Kangaroo, exit 3, 6 steps"
    assert PromptLookupConfig().label(()) == "prompt lookup, 10 tokens"
    tree = CascadeConfig(tree_topk=10, total_tokens=40, sv_passes=2, verifier="siblings")
    assert tree.label((3, 15)) == "CATS tree, exits 3 and 15, 5 steps, 40 nodes, 2 rounds, verifier siblings"


# --- profiles in files


def test_a_machine_profile_is_read_for_what_it_was_measured_for_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "machine.json"
    save_machine(MACHINE, path)
    assert load_machine(path, {"processor": "one"}) == MACHINE
    assert load_machine(path, {"processor": "another"}) is None
    assert load_machine(tmp_path / "none.json", {}) is None
    assert [entry.name for entry in path.parent.iterdir()] == ["machine.json"]
    good = json.loads(path.read_text())
    changes: tuple[dict[str, Any], ...] = (
        {"format": "cats machine profile 0"},
        {"flash_bytes_per_second": 0},
        {"flash_bytes_per_second": float("nan")},
        {"layer_seconds": []},
        {"layer_seconds": [[2, 0.1], [1, 0.2]]},
        {"head_seconds": [[1, -0.1]]},
        {"take_seconds": None},
    )
    for change in changes:
        path.write_text(json.dumps({**good, **change}))
        assert load_machine(path, {"processor": "one"}) is None, change
    path.write_text('{"format": ')
    assert load_machine(path, {"processor": "one"}) is None


def test_an_acceptance_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    kangaroo = AcceptancePoint(KangarooConfig(steps=4), (3,), 1.9, 41.2)
    profile = AcceptanceProfile((chain(15, 3.05), kangaroo, AcceptancePoint(PromptLookupConfig(), (), 1.3, 30.0)), ("how",))
    save_acceptance(profile, tmp_path / "acceptance.json")
    assert load_acceptance(tmp_path / "acceptance.json", method_of) == profile


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "something else"}, "its format is 'something else'"),
        ({"points": 5}, "cannot be used"),
        ({"points": [{}]}, "lacks 'method'"),
        ({"points": [{"method": {"name": "made_up"}, "exits": [], "accepted": 2, "nodes": 9}]}, "'made_up' is unknown"),
        ({"points": [{"method": {"name": "kangaroo", "colour": 1}, "exits": [3], "accepted": 2, "nodes": 9}]}, "no setting colour"),
        ({"points": [{"method": {"name": "kangaroo", "steps": 0}, "exits": [3], "accepted": 2, "nodes": 9}]}, "steps is 0"),
        ({"points": [{"method": {"name": "cascade"}, "exits": [15, 3], "accepted": 2, "nodes": 9}]}, r"the exits \[15, 3\]"),
        ({"points": [{"method": {"name": "kangaroo"}, "exits": [3], "accepted": 0.5, "nodes": 9}]}, "accepted 0.5"),
    ],
)
def test_bad_acceptance_profiles_are_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "acceptance.json"
    save_acceptance(AcceptanceProfile((chain(15, 3.05),)), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CatsError, match=says) as refused:
        load_acceptance(path, method_of)
    assert "acceptance.json" in str(refused.value)
