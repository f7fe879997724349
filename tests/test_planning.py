"""The planner's arithmetic: cost against a simulated ring, the paper's numbers, plans by budget, profiles in files, the commands."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cats import AutoregressiveConfig, CascadeConfig, build_method
from cats.cli.memory_flags import memory_options
from cats.cli.method_flags import chosen_method
from cats.errors import CatsError
from cats.planning.cost import (
    Work,
    cascade_work,
    cycle_seconds,
    node_slots,
    paper_bytes_per_token,
    plain_work,
    read_ahead,
    sizes_of,
    streamed_bytes_per_token,
    tree_nodes,
)
from cats.planning.plan import Demand, MemoryPlan, ModelSizes, plan_memory, window
from cats.planning.planner import Choice, choose
from cats.planning.profile import (
    AcceptancePoint,
    AcceptanceProfile,
    DeviceProfile,
    chain_length,
    chain_nodes,
    load_acceptance,
    load_device,
    save_acceptance,
    save_device,
    token_acceptance,
)
from evaluation import CATS_dynamic
from scripts import measure_device
from scripts import plan as plan_command

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "data" / "profiles"
TINY = ROOT / "data" / "tiny"
GB = 10**9
EXITS = (5, 10, 15)


@cache
def orin(budget: int = 8) -> DeviceProfile:
    return load_device(PROFILES / f"paper_orin_{budget}GB.json")


@cache
def published() -> AcceptanceProfile:
    return load_acceptance(PROFILES / "paper_vicuna_7B_acceptance.json")


@cache
def vicuna() -> ModelSizes:
    return sizes_of(json.loads((ROOT / "data" / "vicuna_7B_config.json").read_text()), 2, orin(), layers=32)


@cache
def planned(budget_gb: float | None, covers: str = "weights", device: int = 8) -> Choice:
    return choose(vicuna(), orin(device), published(), None if budget_gb is None else int(budget_gb * GB), covers, EXITS)


# --- sizes, counts, the paper's formula


def test_sizes_of_vicuna() -> None:
    sizes = vicuna()
    assert sizes.layer_bytes + sizes.other_layer_bytes == 2 * 202_383_360
    assert sizes.adapter_bytes == pytest.approx(2 * 67.1e6, rel=1e-3)
    assert sizes.lm_head_bytes == 2 * 32000 * 4096
    assert [name for name, _ in sizes.matrices][::6] == ["self_attn.q_proj", "mlp.down_proj"]


def test_sizes_of_grouped_heads_and_biases() -> None:
    config = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_attention_heads": 8, "num_hidden_layers": 3}
    sizes = sizes_of({**config, "num_key_value_heads": 2, "model_type": "qwen2"}, 2, replace(orin(), compute_itemsize=4, widen_bytes=77))
    assert dict(sizes.matrices)["self_attn.k_proj"] == 64 * 16 * 2
    assert sizes.kv_width == 16
    assert sizes.other_layer_bytes == 4 * (2 * 64 + 64 + 2 * 16)
    assert sizes.widen_bytes == 77


@pytest.mark.parametrize("broken", [{}, {"hidden_size": "wide"}, {"hidden_size": 8, "num_attention_heads": 0}])
def test_sizes_of_something_else_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(CatsError, match=r"config\.json"):
        sizes_of(broken, 2, orin())


@pytest.mark.parametrize(
    ("steps", "accepted", "gigabytes"), [(3, 2.7077, 5.6805), (5, 3.0520, 5.8354), (7, 3.2343, 6.2574), (10, 3.3332, 7.1646)]
)
def test_the_papers_bytes_per_token(steps: int, accepted: float, gigabytes: float) -> None:
    layer = vicuna().layer_bytes + vicuna().other_layer_bytes
    assert paper_bytes_per_token(steps, 3, 32, layer, accepted) / 1e9 == pytest.approx(gigabytes, abs=1e-4)


def test_our_bytes_per_token_are_those_that_stream() -> None:
    memory = plan_memory(vicuna(), Demand(front=10, adapters=2), 6 * GB, "weights")
    assert streamed_bytes_per_token(memory, 2.5) == memory.streamed_bytes / 2.5


@pytest.mark.parametrize(
    "config",
    [
        CascadeConfig(),
        CascadeConfig(steps=2, sv_passes=3),
        CascadeConfig(tree_topk=10, total_tokens=40),
        CascadeConfig(steps=4, tree_topk=8, sv_passes=2),
    ],
)
def test_node_slots_are_the_methods_own_bound(config: CascadeConfig) -> None:
    assert node_slots(vars(config)) == build_method(config).max_nodes
    assert tree_nodes(vars(config)) <= node_slots(vars(config))


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
            nbytes = piece.nbytes
            if piece in streamed:
                length = window(nbytes)
                head = 0 if head + length > memory.ring_bytes else head
                in_the_way = [place for place in live if place[0] < head + length and place[1] > head]
                live = [place for place in live if place not in in_the_way]
                read_until = max(read_until, *(released for _, _, released in in_the_way), 0.0) + nbytes / rate
                clock = max(clock, read_until)
                live.append((head, head + length, clock + nbytes * per_byte))
                head += length
            clock += nbytes * per_byte
        clock += work.lm_head
        ends.append(clock)
    return (ends[-1] - ends[2]) / 3


def situations(ring_buffers: int) -> Iterator[tuple[MemoryPlan, Work, float]]:
    """Plans of Vicuna-7B, with (streaming : computing : front) in many proportions; the last number is computing by streaming."""
    for front, spare in ((0, 2.0), (5, 0.4), (10, 4.0), (15, 2.5)):
        budget = int(1.2 * GB + front * 0.406 * GB + spare * GB)
        memory = plan_memory(vicuna(), Demand(front=front, adapters=2, ring_buffers=ring_buffers), budget, "weights")
        stream = memory.streamed_bytes / orin().flash_bytes_per_second
        for target in (0.01, 0.1, 0.3, 0.6, 0.9, 1.0, 1.1, 1.5, 3.0):
            for ahead in (0.0, 0.05, 0.1, 0.3, 1.0):
                yield memory, Work(ahead * stream / 2, ahead * stream / 2, target * stream, 0.02 * target * stream), target


@pytest.mark.parametrize("ring_buffers", [3, 4, 6, 8])
def test_cost_agrees_with_a_simulated_ring(ring_buffers: int) -> None:
    errors = []
    for memory, work, target in situations(ring_buffers):
        predicted = cycle_seconds(vicuna(), memory, orin(), work).total
        error = abs(predicted / simulated(vicuna(), memory, orin().flash_bytes_per_second, work) - 1)
        assert error < (0.05 if 0.8 < target < 1.2 else 0.03), (memory.demand, work)
        errors.append(error)
    assert sum(error < 0.02 for error in errors) > 0.95 * len(errors)
    assert sum(errors) / len(errors) < 0.005


@pytest.mark.parametrize("ring_buffers", [1, 2])
def test_a_small_rings_cost_is_roughly_right(ring_buffers: int) -> None:
    errors = [
        cycle_seconds(vicuna(), memory, orin(), work).total / simulated(vicuna(), memory, orin().flash_bytes_per_second, work) - 1
        for memory, work, target in situations(ring_buffers)
        if memory.demand.front in (0, 5) or target < 0.5
    ]
    assert abs(sum(errors) / len(errors)) < 0.1
    assert max(map(abs, errors)) < 0.3


def test_cost_by_hand() -> None:
    sizes = replace(vicuna(), layers=2)
    memory = plan_memory(sizes, Demand(front=0, ring_buffers=3, pinning=False), 2 * GB, "weights")
    device = replace(orin(), flash_bytes_per_second=float(memory.streamed_bytes))  # one pass a second
    assert cycle_seconds(sizes, memory, device, Work(0.0, 0.0, 0.0, 0.0)).total == pytest.approx(1.0)
    late = cycle_seconds(sizes, memory, device, Work(3.0, 2.0, 0.0, 0.0))
    assert late.total == pytest.approx(5 + 1 - read_ahead(sizes, memory) / memory.streamed_bytes)
    assert late.stream_wait == pytest.approx(late.target)
    busy = cycle_seconds(sizes, memory, device, Work(1.0, 1.0, 9.0, 1.0))
    assert busy.total == pytest.approx(12.0)
    assert busy.stream_wait == pytest.approx(0.0)


def test_nothing_streamed_costs_computing_alone() -> None:
    memory = plan_memory(vicuna(), Demand(), None)
    work = plain_work(vicuna(), orin())
    assert cycle_seconds(vicuna(), memory, orin(), work).total == pytest.approx(0.253, rel=1e-3)


def test_work_grows_with_what_is_run() -> None:
    def seconds(exits: tuple[int, int] = (3, 10), **changes: int) -> Work:
        return cascade_work(vicuna(), replace(orin(), layer_seconds=((1, 0.01), (101, 0.11))), exits, vars(CascadeConfig(**changes)))

    chain = seconds()
    adapter = 0.01 * vicuna().adapter_bytes / vicuna().layer_bytes
    assert chain.draft == pytest.approx(5 * (3 * 0.01 + adapter + orin().lm_head(1, vicuna().lm_head_bytes)))
    assert seconds(steps=8).draft > chain.draft
    assert seconds(exits=(3, 15)).shallow > chain.shallow
    assert seconds(exits=(3, 15)).layers < chain.layers
    assert seconds(tree_topk=10, total_tokens=60).layers > seconds(tree_topk=10, total_tokens=40).layers > chain.layers
    assert seconds(sv_passes=2).draft == pytest.approx(2 * chain.draft)


# --- device profiles


def test_seconds_between_and_beyond_the_measured_nodes() -> None:
    device = replace(orin(), layer_seconds=((1, 1.0), (4, 2.5), (8, 4.5)), layer_bytes=100)
    assert [device.layer(nodes, 100) for nodes in (1, 2, 4, 6, 8, 16)] == pytest.approx([1.0, 1.5, 2.5, 3.5, 4.5, 8.5])
    assert device.layer(4, 50) == pytest.approx(1.25)
    falling = replace(device, layer_seconds=((1, 2.0), (2, 1.0)))
    assert falling.layer(50, 100) == 1.0


def test_device_profile_round_trip(tmp_path: Path) -> None:
    device = replace(orin(), notes=("one", "two"), widen_bytes=5)
    save_device(device, tmp_path / "deep" / "device.json")
    assert load_device(tmp_path / "deep" / "device.json") == device
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["device.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "something else"}, "not 'cats device profile 1'"),
        ({"flash_bytes_per_second": 0}, "above 0"),
        ({"flash_bytes_per_second": "fast"}, "'fast' is no number"),
        ({"flash_bytes_per_second": True}, "no number"),
        ({"flash_bytes_per_second": float("nan")}, "above 0"),
        ({"memory_bytes_per_second": float("inf")}, "above 0"),
        ({"layer_seconds": []}, "must start at 1"),
        ({"layer_seconds": [[1, 0.1], [1, 0.2]]}, "must start at 1 and rise"),
        ({"layer_seconds": [[2, 0.1]]}, "must start at 1"),
        ({"layer_seconds": [[1, -0.1]]}, "above 0"),
        ({"layer_seconds": [[1.5, 0.1]]}, "no whole number"),
        ({"layer_seconds": 5}, "wrong value"),
        ({"interpreter_bytes": -1}, "not be negative"),
        ({"layer_bytes": None}, "no number"),
    ],
)
def test_bad_device_profiles_are_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "device.json"
    save_device(orin(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CatsError, match=says) as refused:
        load_device(path)
    assert "device.json" in str(refused.value)


def test_profiles_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match=r"no file .*measure_device"):
        load_device(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": ')
    with pytest.raises(CatsError, match="as JSON"):
        load_device(tmp_path / "half.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CatsError, match="format None"):
        load_device(tmp_path / "list.json")
    save_device(orin(), tmp_path / "device.json")
    fields = json.loads((tmp_path / "device.json").read_text())
    del fields["layer_bytes"]
    (tmp_path / "device.json").write_text(json.dumps(fields))
    with pytest.raises(CatsError, match="lacks 'layer_bytes'"):
        load_device(tmp_path / "device.json")


@pytest.mark.parametrize(("budget", "computing", "rate"), [(2, 0.213, 0.117), (6, 0.204, 0.126), (8, 0.253, 0.146)])
def test_the_papers_profiles_give_its_baselines(budget: int, computing: float, rate: float) -> None:
    """Its baseline streams every layer, and computes after, not while, it reads."""
    device, sizes = orin(budget), vicuna()
    work = plain_work(sizes, device)
    assert work.layers + work.lm_head == pytest.approx(computing, rel=1e-3)
    assert 1 / (12.95e9 / device.flash_bytes_per_second + work.layers + work.lm_head) == pytest.approx(rate, rel=1e-3)


# --- acceptance profiles


def test_acceptance_is_what_was_measured_where_it_was() -> None:
    for point in published().points:
        estimate = published().estimate(point.shallow_exit, point.steps, point.nodes)
        assert estimate.accepted == pytest.approx(point.accepted, rel=1e-6)
        assert not estimate.doubts or (point.shallow_exit, point.steps) == (10, 5)


def test_acceptance_between_and_outside() -> None:
    accepted = published().estimate
    assert accepted(10, 5).accepted < accepted(13, 5).accepted < accepted(15, 5).accepted
    assert "between measured exits" in accepted(13, 5).doubts[0]
    assert accepted(20, 5).accepted == accepted(15, 5).accepted
    assert "nearest measured" in accepted(20, 5).doubts[0]
    by_steps = [accepted(15, steps).accepted for steps in range(1, 11)]
    assert all(before < after for before, after in pairwise(by_steps))
    assert "4 steps" in accepted(15, 4).doubts[0]
    by_nodes = [accepted(15, 5, nodes).accepted for nodes in (10, 16, 24, 32, 40)]
    assert all(before < after for before, after in pairwise(by_nodes))
    assert accepted(15, 5, 400).accepted == pytest.approx(accepted(15, 5, 40).accepted)
    assert any("was not measured" in doubt for doubt in accepted(15, 5, 400).doubts)
    assert any("at shallow exit 10" in doubt for doubt in accepted(10, 5, 40).doubts)


def test_a_tree_without_measured_trees_gains_nothing() -> None:
    chains = replace(published(), points=published().chains)
    assert chains.estimate(15, 5, 60).accepted == pytest.approx(3.052)
    assert "No tree was measured" in chains.estimate(15, 5, 60).doubts[0]


def test_chain_model() -> None:
    assert chain_length(0.5, 3) == 1.875
    assert token_acceptance(1.875, 3) == pytest.approx(0.5)
    assert chain_nodes(5) == 9


def test_acceptance_profile_round_trip(tmp_path: Path) -> None:
    save_acceptance(published(), tmp_path / "acceptance.json")
    assert load_acceptance(tmp_path / "acceptance.json") == published()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"points": []}, "no chain"),
        ({"points": [{"shallow_exit": 5, "steps": 5, "nodes": 40, "accepted": 3}]}, "no chain"),
        ({"points": [{"shallow_exit": 2, "steps": 5, "nodes": None, "accepted": 3}]}, "not before the draft exit"),
        ({"points": [{"shallow_exit": 5, "steps": 5, "nodes": None, "accepted": 0.5}]}, "between 1 and"),
        ({"points": [{"shallow_exit": 5, "steps": 5, "nodes": None, "accepted": 9}]}, "between 1 and"),
        ({"points": [{"shallow_exit": 5, "steps": 5, "accepted": 3}]}, "lacks 'nodes'"),
        ({"tree_topk": 1}, "at least 2"),
        ({"draft_exit": 0.5}, "whole number"),
    ],
)
def test_bad_acceptance_profiles_are_refused_in_a_sentence(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "acceptance.json"
    save_acceptance(published(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CatsError, match=says):
        load_acceptance(path)


def test_trees_need_their_chain() -> None:
    tree = AcceptancePoint(20, 5, 40, 4.0)
    with pytest.raises(CatsError, match="no chain there"):
        replace(published(), points=(*published().points, tree))
    with pytest.raises(CatsError, match="has more than"):
        replace(published(), points=(*published().points, replace(tree, shallow_exit=15, nodes=8)))


# --- plans


def test_the_papers_eight_gigabytes() -> None:
    choice = planned(8)
    assert choice.best.exits == (3, 15)
    assert choice.memory.charged <= 8 * GB
    assert choice.tokens_per_second > 2 * 0.461  # the paper's own figure there, which streams everything in every cycle
    plain = next(other for other in choice.alternatives if not other.exits)
    assert choice.tokens_per_second > 2.5 * plain.tokens_per_second
    assert plain.tokens_per_second > 2 * 0.146


def test_the_papers_six_gigabytes() -> None:
    choice = planned(6, "weights", 6)
    assert choice.best.exits == (3, 10)
    assert choice.tokens_per_second > 0.373
    assert any(reason.startswith("Shallow exit 15 does not fit: CATS with it needs 6.8") for reason in choice.reasons)


def test_the_papers_two_gigabytes() -> None:
    with pytest.raises(CatsError, match=r"2\.000 GB for the whole process is too small: plain decoding needs 2\.\d+ GB, and CATS"):
        planned(2, "process", 2)
    choice = planned(2, "weights", 2)
    assert isinstance(choice.method, AutoregressiveConfig)
    assert any("Shallow exit 5 does not fit: CATS with it needs 2.8" in reason for reason in choice.reasons)
    with pytest.raises(CatsError, match=r"CATS with shallow exit 5 needs 2\.8"):
        choose(vicuna(), orin(2), published(), 2 * GB, "weights", EXITS, {"method": "cascade"})


@pytest.mark.parametrize("covers", ["weights", "process"])
def test_the_smallest_budget_named_is_the_smallest_that_works(covers: str) -> None:
    fixed = {"shallow_exit": 5, "steps": 5, "tree_topk": 1}
    with pytest.raises(CatsError) as refused:
        choose(vicuna(), orin(), published(), GB, covers, EXITS, fixed)
    named = float(str(refused.value).split("shallow exit 5 needs ")[1].split(" GB")[0])
    assert choose(vicuna(), orin(), published(), int((named + 0.001) * GB), covers, EXITS, fixed).best.exits == (3, 5)
    with pytest.raises(CatsError):
        choose(vicuna(), orin(), published(), int((named - 0.001) * GB), covers, EXITS, fixed)


@pytest.mark.parametrize("covers", ["weights", "process"])
def test_more_memory_never_predicts_slower(covers: str) -> None:
    fixed = {"steps": 5, "tree_topk": 10, "total_tokens": 40}
    for settings in ({"method": "autoregressive"}, fixed):
        budgets = [gigabytes / 4 for gigabytes in range(19, 64, 2)]
        rates = [choose(vicuna(), orin(), published(), int(b * GB), covers, EXITS, settings).tokens_per_second for b in budgets]
        assert all(after >= before * 0.999 for before, after in pairwise(rates)), list(zip(budgets, rates, strict=True))
        unlimited = choose(vicuna(), orin(), published(), None, covers, EXITS, settings)
        assert unlimited.tokens_per_second >= rates[-1]
        assert not unlimited.memory.streamed


def test_a_choice_over_everything_beats_every_fixed_one() -> None:
    best = planned(8).tokens_per_second
    for fixed in ({"steps": 3}, {"steps": 10}, {"tree_topk": 1}, {"total_tokens": 24}, {"shallow_exit": 5}, {"ring_buffers": 2}):
        assert choose(vicuna(), orin(), published(), 8 * GB, "weights", EXITS, fixed).tokens_per_second <= best * 1.0001


@pytest.mark.parametrize(
    "fixed",
    [
        {"steps": 3},
        {"steps": 12},
        {"steps": 40, "tree_topk": 3},
        {"tree_topk": 1},
        {"tree_topk": 4},
        {"total_tokens": 64, "tree_topk": 8},
        {"branch_rounds": 3},
        {"sv_passes": 2, "threshold": 0.3},
    ],
)
def test_explicit_settings_win(fixed: dict[str, Any]) -> None:
    choice = choose(vicuna(), orin(), published(), 8 * GB, "weights", EXITS, fixed)
    assert {name: getattr(choice.method, name) for name in fixed} == fixed


def test_explicit_memory_settings_win() -> None:
    fixed = {"ring_buffers": 5, "positions": 300, "pinning": False, "shallow_exit": 10, "draft_exit": 2}
    choice = choose(vicuna(), orin(), published(), 8 * GB, "process", EXITS, fixed)
    demand = choice.memory.demand
    assert (demand.ring_buffers, demand.positions, demand.pinning, choice.best.exits) == (5, 300, False, (2, 10))
    assert choice.memory.streamed_bytes == 22 * vicuna().layer_bytes
    assert any("measured with draft exit 3, not 2" in reason for reason in choice.reasons)
    ringed = choose(vicuna(), orin(), published(), 8 * GB, "weights", EXITS, {"ring_buffers": 1})
    assert ringed.memory.ring_bytes == max(window(nbytes) for _, nbytes in vicuna().matrices)
    assert any("only in part" in reason for reason in ringed.reasons)


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        ({"colour": 1}, "no setting 'colour'"),
        ({"method": "medusa"}, "does not plan the method medusa"),
        ({"method": "autoregressive", "steps": 4}, "steps does nothing for plain decoding"),
        ({"shallow_exit": 3}, "above the draft exit 3"),
        ({"shallow_exit": 32}, "below 32"),
        ({"steps": 0}, "steps is 0"),
        ({"tree_topk": 1, "total_tokens": 40}, "chain"),
    ],
)
def test_contradictions_are_refused(fixed: dict[str, Any], says: str) -> None:
    with pytest.raises(CatsError, match=says):
        choose(vicuna(), orin(), published(), 8 * GB, "weights", EXITS, fixed)


def test_plain_decoding_where_speculation_does_not_pay() -> None:
    hopeless = AcceptanceProfile("hopeless", 3, (AcceptancePoint(10, 5, None, 1.05),))
    choice = choose(vicuna(), orin(), hopeless, None, "process", (10,))
    assert isinstance(choice.method, AutoregressiveConfig)
    assert choice.reasons[0].startswith("Speculation does not pay here")
    forced = choose(vicuna(), orin(), hopeless, None, "process", (10,), {"steps": 5})
    assert isinstance(forced.method, CascadeConfig)
    assert any("SLOWER" in reason for reason in forced.reasons)


def test_without_exits_there_is_plain_decoding() -> None:
    choice = choose(vicuna(), orin(), published(), 8 * GB, "weights")
    assert isinstance(choice.method, AutoregressiveConfig)
    assert "No shallow exit" in choice.reasons[0]
    with pytest.raises(CatsError, match="needs a shallow exit"):
        choose(vicuna(), orin(), published(), 8 * GB, "weights", (), {"method": "cascade"})


def test_reasons_are_sentences_and_say_what_bounds_the_run() -> None:
    for choice in (planned(2, "weights", 2), planned(8), planned(None)):
        assert all(reason[0].isupper() and reason.endswith(".") for reason in choice.reasons)
        assert choice.seconds.total == pytest.approx(choice.best.accepted.accepted / choice.tokens_per_second)
    assert any("waits" in reason for reason in planned(8).reasons)
    assert any("holds every layer" in reason for reason in planned(None).reasons)
    fast = choose(vicuna(), replace(orin(), flash_bytes_per_second=1e13), published(), 8 * GB, "weights", EXITS)
    assert any("Computing hides the stream" in reason for reason in fast.reasons)


# --- the commands


VICUNA = ["--config", str(ROOT / "data" / "vicuna_7B_config.json"), "--layers", "32", "--profile", str(PROFILES / "paper_orin_8GB.json")]


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*VICUNA, "--memory-budget", "8GB", "--budget-covers", "weights", "--shallow-exits", "10", "15", "--steps", "5"]
    plan_command.main(arguments)
    text = capsys.readouterr().out
    for part in ("lm_head", "pinned behind the front", "tokens/s", "--shallow-layer 15", "--steps 5", "--memory-budget 8GB", "instead"):
        assert part in text
    plan_command.main([*arguments, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["exits"] == [3, 15]
    assert facts["charged"] == sum(facts["charges"].values())
    assert facts["settings"]["steps"] == 5
    assert facts["seconds"]["total"] == pytest.approx(facts["accepted_length"] / facts["tokens_per_second"])


def test_plan_command_overrides_and_refusals(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan_command.main(
        [*VICUNA, "--memory-budget", "3GB", "--no-pinning", "--flash-bandwidth", "1GB/s", "--method", "autoregressive", "--json"]
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["streamed_bytes"] == 32 * vicuna().layer_bytes
    assert facts["seconds"]["total"] == pytest.approx(12.95, rel=1e-2)
    assert "--no-pinning" in facts["flags"]
    (tmp_path / "config.json").write_text("[]")
    for arguments, says in (
        (["--config", str(ROOT / "data" / "vicuna_7B_config.json"), *VICUNA[4:]], "give --layers"),
        (["--config", str(tmp_path / "none.json"), *VICUNA[4:]], "cannot read the configuration"),
        (["--model-path", str(tmp_path), *VICUNA[4:]], "is no configuration"),
        ([*VICUNA, "--memory-budget", "1GB"], "too small"),
        ([*VICUNA, "--ring-buffers", "0"], "ring-buffers is 0"),
        ([*VICUNA, "--budget-positions", "0"], "budget-positions is 0"),
    ):
        with pytest.raises(SystemExit) as left:
            plan_command.main(arguments)
        assert left.value.code == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "memory", [[], ["--memory-budget", "6 GB"], ["--memory-budget", "3GB", "--budget-covers", "weights", "--no-pinning"]]
)
def test_the_flags_printed_are_those_of_the_evaluation(capsys: pytest.CaptureFixture[str], memory: list[str]) -> None:
    """Pasted behind model and adapters, they say what was planned."""
    plan_command.main([*VICUNA, *memory, "--method", "cascade", "--shallow-exits", "5", "--flash-bandwidth", "1GB/s", "--json"])
    plan = json.loads(capsys.readouterr().out)
    pasted = CATS_dynamic.parse(["--model-id", "m", "--model-path", "p", *" ".join(plan["flags"]).split()])
    assert (pasted.method, pasted.draft_layer, pasted.shallow_layer) == ("cascade", *plan["exits"])
    assert vars(chosen_method("cascade", pasted)) == {name: value for name, value in plan["settings"].items() if name != "method"}
    assert (memory_options(pasted, 8, [1]) is None) == (not memory)


def test_flags_are_those_of_the_methods() -> None:
    known = {action.dest for action in plan_command.parser()._actions}
    assert set(vars(CascadeConfig())) <= known


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_measure_device_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    output = tmp_path / "device.json"
    arguments = ["--nodes", "1", "3", "--repeats", "1", "--context", "8", "--output", str(output), "--dtype", dtype]
    made = ["--config", str(TINY / "config.json"), "--directory", str(tmp_path), "--file-size", "2MB"]
    measure_device.main([*arguments, *made])
    device = load_device(output)
    assert [nodes for nodes, _ in device.layer_seconds] == [1, 3]
    assert device.layer_bytes == 786432
    assert device.compute_itemsize == (2 if dtype == "bfloat16" else 4)
    assert device.widen_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["device.json"]
    sizes = sizes_of(json.loads((TINY / "config.json").read_text()), 2, device)
    published = json.loads((PROFILES / "paper_vicuna_7B_acceptance.json").read_text())
    points = [{"shallow_exit": 6, "steps": 5, "nodes": nodes, "accepted": accepted} for nodes, accepted in ((None, 2.6), (40, 3.5))]
    (tmp_path / "acceptance.json").write_text(json.dumps(published | {"draft_exit": 2, "points": points}))
    accepted = load_acceptance(tmp_path / "acceptance.json")
    assert choose(sizes, device, accepted, 8_000_000, "weights", (6,), {"method": "cascade"}).best.exits == (2, 6)
    capsys.readouterr()


def test_measure_device_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "device.json")]
    config = ["--config", str(TINY / "config.json")]
    for arguments, says in (
        ([*config, "--directory", str(tmp_path / "none")], "no directory"),
        ([*config, "--directory", str(tmp_path), "--file-size", "900000GB"], "free"),
        (["--config", str(tmp_path / "none.json")], "no file"),
        ([*config, "--repeats", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit) as left:
            measure_device.main([*arguments, *output])
        assert left.value.code == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_published_profiles_say_where_they_come_from() -> None:
    for path in PROFILES.glob("*.json"):
        assert json.loads(path.read_text())["notes"], path
    assert "Nothing here was measured by this project" in asdict(orin())["notes"][0]
