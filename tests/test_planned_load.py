"""Loading under a budget without a method: the planner's choice, what overrides it, the machine's profile in the cache, the two lines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cats
from cats import machine, planned
from cats.cli.ask import main
from cats.errors import CatsError
from cats.machine import Subject, measure
from cats.methods import method_of
from cats.planned import Planning
from cats.planning.profile import AcceptancePoint, AcceptanceProfile, MachineProfile, load_acceptance, save_acceptance
from cats.runtime.store import Store
from evaluation import acceptance_profile
from tests.tiny_models import DRAFT_EXIT, SHALLOW_EXIT, TinyModel

Tiny = Callable[[str], TinyModel]
EXITS = (DRAFT_EXIT, SHALLOW_EXIT)
FAST = MachineProfile({}, "2026-01-01", 1e9, 1e-6, 1e-5, ((1, 1e-6),), ((1, 1e-6), (40, 2e-6)), ((1, 1e-6),), ((1, 1e-6),))
"""A machine on which the stream of weights is all that counts."""
CHAIN = AcceptancePoint(cats.CascadeConfig(steps=4), EXITS, 3.0, 12.0)
TREE = AcceptancePoint(cats.CascadeConfig(steps=4, tree_topk=3, total_tokens=20), EXITS, 4.0, 16.0)
KANGAROO = AcceptancePoint(cats.KangarooConfig(), (DRAFT_EXIT,), 2.0, 9.0)
LOOKUP = AcceptancePoint(cats.PromptLookupConfig(), (), 1.2, 6.0)
BUDGET = 200_000
"""Of weights: CATS fits, and some layers are streamed."""


def with_acceptance(source: TinyModel, folder: Path, *points: AcceptancePoint) -> dict[str, Any]:
    """Copies of a model's adapters with accepted lengths beside them."""
    for name in ("draft", "shallow"):
        shutil.copytree(getattr(source, name), folder / name)
    save_acceptance(AcceptanceProfile(points), folder / "acceptance.json")
    return {"draft": (folder / "draft", DRAFT_EXIT), "shallow": (folder / "shallow", SHALLOW_EXIT)}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Subject]:
    """What was measured: in place of the clock, the machine `FAST`; profiles go to a cache of their own."""
    subjects: list[Subject] = []

    def instead(subject: Subject, report: Any) -> MachineProfile:
        subjects.append(subject)
        report("measuring", 0.5)
        return MachineProfile(**{**vars(FAST), "subject": subject.key})

    monkeypatch.setenv("CATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "measure", instead)
    return subjects


def source_of(model: cats.CatsModel) -> Store:
    assert isinstance(model.base.source, Store)
    return model.base.source


def load(tiny: TinyModel, adapters: dict[str, Any], **changes: Any) -> cats.CatsModel:
    memory = cats.MemoryOptions(changes.pop("budget", BUDGET), changes.pop("covers", "weights"), **changes.pop("memory", {}))
    return cats.load(tiny.base, adapters, dtype="float32", memory=memory, **changes)


def test_the_fastest_method_is_loaded_with_exactly_the_bytes_that_were_planned(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    model = load(tiny("llama"), with_acceptance(tiny("llama"), tmp_path, CHAIN, TREE, KANGAROO, LOOKUP))
    assert model.plan is not None
    assert model.plan.choice is not None
    best = model.plan.choice.best
    assert model.plan.method == TREE.method
    assert set(model.adapters) == {"draft", "shallow"}
    plan = source_of(model).plan
    assert (plan.streamed_bytes, plan.charged, plan.ring_bytes) == (best.memory.streamed_bytes, best.memory.charged, best.memory.ring_bytes)
    assert plan.streamed == best.memory.streamed
    assert plan.streamed_bytes > 0
    config = cats.GenerationConfig(max_new_tokens=8, eos_token_ids=())
    assert cats.generate(model, [3, 4, 5], None, config).ids == cats.generate(cats.load(tiny("llama").base), [3, 4, 5], None, config).ids
    assert [label.split(":")[0] for label in model.plan.lines] == ["plan", "why"]


def test_plain_decoding_holds_no_adapters_and_says_how_to_have_them(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    adapters = with_acceptance(tiny("llama"), tmp_path, AcceptancePoint(CHAIN.method, EXITS, 1.0, 12.0))
    model = load(tiny("llama"), adapters)
    assert model.plan is not None
    assert model.plan.method == cats.AutoregressiveConfig()
    assert not model.adapters
    assert source_of(model).plan.demand.front == 0
    with pytest.raises(CatsError, match=r"left out what cascade needs .*plan=None"):
        cats.generate(model, [3, 4], "cascade", cats.GenerationConfig(max_new_tokens=4, eos_token_ids=()))
    unplanned = load(tiny("llama"), adapters, plan=None)
    assert unplanned.plan is None
    assert set(unplanned.adapters) == {"draft", "shallow"}
    assert len(measured) == 1


def test_settings_and_rings_that_are_given_stay(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    shorter = AcceptancePoint(cats.CascadeConfig(steps=2), EXITS, 2.0, 10.0)
    adapters = with_acceptance(tiny("llama"), tmp_path, CHAIN, TREE, shorter)
    for settings, expected in (({"steps": 2}, shorter.method), ({"tree_topk": 1}, CHAIN.method), ({"total_tokens": 20}, TREE.method)):
        model = load(tiny("llama"), adapters, plan=Planning(settings))
        assert model.plan is not None
        assert model.plan.method == expected
    ringed = load(tiny("llama"), adapters, memory={"ring_buffers": 5}, budget=230_000)
    assert source_of(ringed).plan.demand.ring_buffers == 5
    throttled = load(tiny("llama"), adapters, memory={"flash_bandwidth": 1e6})
    assert throttled.plan is not None
    assert throttled.plan.choice is not None
    assert throttled.plan.choice.machine.flash_bytes_per_second == 1e6


def test_what_was_not_measured_keeps_the_default_method(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    adapters = with_acceptance(tiny("llama"), tmp_path, CHAIN)
    other = load(tiny("llama"), adapters, plan=Planning({"steps": 3}))
    assert other.plan is not None
    assert other.plan.method == cats.CascadeConfig(steps=3)
    assert "no accepted length was measured with steps 3" in other.plan.lines[1]
    with pytest.raises(CatsError, match="--max-ngram does nothing for cascade"):
        load(tiny("llama"), adapters, plan=Planning({"max_ngram": 2}))
    (tmp_path / "acceptance.json").unlink()
    unknown = load(tiny("llama"), adapters)
    assert unknown.plan is not None
    assert unknown.plan.method == cats.CascadeConfig()
    assert unknown.plan.lines[0].endswith("the default of these adapters; nothing is predicted")
    assert "no acceptance.json lies beside the adapters" in unknown.plan.lines[1]
    assert not measured


def test_the_planner_takes_one_of_several_adapters(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    adapters = with_acceptance(tiny("llama"), tmp_path, KANGAROO, CHAIN)
    candidates = {"draft": [adapters["shallow"], adapters["draft"]], "shallow": [adapters["draft"], adapters["shallow"]]}
    model = load(tiny("llama"), candidates)
    assert model.plan is not None
    assert model.plan.adapters == adapters
    first = load(tiny("llama"), {"draft": candidates["draft"]}, plan=None)
    assert first.adapters["draft"].exit_layer == SHALLOW_EXIT


def test_caches_are_granted_for_the_tree_that_was_chosen(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    adapters = with_acceptance(tiny("llama"), tmp_path, TREE)
    model = load(tiny("llama"), adapters, budget=4 * 10**9, covers="process", memory={"positions": 64})
    assert source_of(model).plan.demand.nodes == cats.build_method(TREE.method).max_nodes
    assert len(cats.generate(model, [3, 4, 5], None, cats.GenerationConfig(max_new_tokens=8, eos_token_ids=())).ids) == 8
    (tmp_path / "acceptance.json").unlink()
    default = load(tiny("llama"), adapters, budget=4 * 10**9, covers="process", memory={"positions": 64})
    assert cats.generate(default, [3, 4, 5], None, cats.GenerationConfig(max_new_tokens=8, eos_token_ids=())).ids
    assert measured[0].room is not None


def test_a_budget_for_nothing_is_refused(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    with pytest.raises(CatsError, match="the weights need at least"):
        load(tiny("llama"), with_acceptance(tiny("llama"), tmp_path, CHAIN), budget=5000)


# --- the machine's profile


def test_a_machine_is_measured_once_and_again_where_the_profile_is_stale(tiny: Tiny, tmp_path: Path, measured: list[Subject]) -> None:
    adapters = with_acceptance(tiny("llama"), tmp_path, CHAIN)
    fresh, known = load(tiny("llama"), adapters), load(tiny("llama"), adapters)
    assert len(measured) == 1
    assert fresh.plan is not None
    assert known.plan is not None
    assert "machine measured just now" in fresh.plan.lines[1]
    assert "machine measured 2026-01-01" in known.plan.lines[1]
    profile, *others = (tmp_path / "cache" / "machines").iterdir()
    assert not others
    for spoilt in ("{", json.dumps({**json.loads(profile.read_text()), "format": "cats machine profile 0"})):
        profile.write_text(spoilt)
        load(tiny("llama"), adapters)
    assert len(measured) == 3
    cats.load(tiny("llama").base, adapters, dtype="float64", memory=cats.MemoryOptions(4 * BUDGET, "weights"))
    load(tiny("llama-grouped"), with_acceptance(tiny("llama-grouped"), tmp_path / "other", CHAIN))
    assert len(measured) == 5
    assert len(list((tmp_path / "cache" / "machines").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_error(
    tiny: Tiny, tmp_path: Path, measured: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("CATS_CACHE", str(tmp_path / "file"))
    adapters = with_acceptance(tiny("llama"), tmp_path, CHAIN)
    assert [load(tiny("llama"), adapters).plan is not None for _ in range(2)] == [True, True]
    assert len(measured) == 2


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
def test_a_model_is_measured(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_SECONDS", 0.05)
    monkeypatch.setattr(machine, "READ_AHEAD_SECONDS", 0.01)
    places = {"draft": [(tiny(family).draft, DRAFT_EXIT)]}
    memory = cats.MemoryOptions(BUDGET, "weights")
    loading = planned.Loading.read(tiny(family).base, places, ("float32", "auto"), cats.load(tiny(family).base).base.device, memory)
    said: list[tuple[str, float]] = []
    profile = measure(loading.subject(), lambda what, share: said.append((what, share)))
    assert [rows for rows, _ in profile.layer_seconds] == [1, 2, 6, 11, 20, 40]
    assert all(seconds > 0 for table in (profile.head_seconds, profile.exit_seconds) for _, seconds in table)
    assert sum(seconds for _, seconds in (*profile.layer_seconds, *profile.pass_seconds)) > 0
    assert profile.flash_bytes_per_second > 0
    assert 0 < profile.take_seconds < 0.1
    assert profile.step_seconds < 1
    assert [share for _, share in said] == sorted(share for _, share in said)
    assert json.loads(json.dumps(profile.subject)) == profile.subject


def test_measuring_holds_no_more_than_there_is_room_for(tiny: Tiny) -> None:
    loading = planned.Loading.read(
        tiny("llama").base, {}, ("float32", "auto"), cats.load(tiny("llama").base).base.device, cats.MemoryOptions(10**6)
    )
    subject = loading.subject()
    assert subject.room is not None
    assert subject.room < 0
    assert subject.layers == machine.FEWEST_LAYERS


# --- the command


def test_the_command_says_in_two_lines_what_was_chosen_and_why(
    speaking: TinyModel, tmp_path: Path, measured: list[Subject], capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = with_acceptance(speaking, tmp_path, CHAIN, TREE, LOOKUP)
    command = ["two words", "--model-path", str(speaking.base), "--max-new-tokens", "8"]
    command += [part for name, (place, _) in adapters.items() for part in (f"--{name}-adapter-path", str(place))]
    budget = ["--memory-budget", "1MB", "--budget-covers", "weights"]
    main([*command, *budget])
    said = capsys.readouterr()
    lines = [line for line in said.err.replace("\r", "\n").split("\n") if line.startswith(("plan: ", "why: "))]
    assert len(lines) == 2
    assert lines[0].startswith("plan: CATS tree, exits 1 and 3, 4 steps, 20 nodes: ")
    assert "plain decoding would make" in lines[1]
    main([*command, *budget, "--steps", "4", "--tree-topk", "1"])
    assert "plan: CATS chain, exits 1 and 3, 4 steps: " in capsys.readouterr().err
    main([*command, *budget, "--method", "cascade"])
    named = capsys.readouterr()
    assert "plan:" not in named.err
    assert named.out.rpartition("\n\n[")[0] == said.out.rpartition("\n\n[")[0]
    assert len(measured) == 1
    main([*command, *budget, "--measure-again", "--ledger"])
    listed = capsys.readouterr().err
    assert len(measured) == 2
    assert "tokens/s  prompt lookup, 10 tokens" in listed
    assert "memory budget" in listed
    with pytest.raises(SystemExit):
        main([*command, "--measure-again"])
    assert "give --memory-budget and no --method with it" in capsys.readouterr().err


# --- where accepted lengths come from


def test_a_table_of_accepted_lengths_becomes_a_profile(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_acceptance(tiny("llama"), tmp_path)
    chain = {"name": "cascade", "steps": 5, "threshold": 0.0, "tree_topk": 1, "total_tokens": -1, "sv_passes": 1, "verifier": "all"}
    used: dict[str, dict[str, Any]] = {"draft": {"name": "draft", "exit_layer": None}, "shallow": {"name": "elsewhere", "exit_layer": 3}}

    def cell(bench: str, method: dict[str, Any], adapters: dict[str, Any], steps: int, accepted: float) -> dict[str, Any]:
        settings = {"bench": bench, "method": method, "model": {"name": "tiny", "weights": "1"}, "adapters": adapters}
        summary = {"steps": steps, "accepted_length": accepted, "nodes_per_step": 6.0 + accepted}
        return {"settings": settings | {"dtype": "float32", "max_new_tokens": 64}, "summary": summary}

    nested = {"name": "nested", "steps": 20, "draft": "coarse", "adaptive": False, "siblings": 0, "total_tokens": -1}
    (tmp_path / "model").mkdir()
    cells = [cell("mtbench", nested, {}, 50, 11.0), cell("mtbench", {**nested, "adaptive": True}, {}, 50, 9.0)]
    cells += [cell("mtbench", {"name": "rest", "datastore": "/some/place"}, {}, 50, 1.5)]
    (tmp_path / "table.json").write_text(json.dumps({"cells": cells}))
    acceptance_profile.main([str(tmp_path / "table.json"), "--model-path", str(tmp_path / "model")])
    assert capsys.readouterr().out == "11.000  nested, 20 steps\n"
    cells[0]["settings"]["temperature"] = 0.7
    (tmp_path / "table.json").write_text(json.dumps({"cells": cells}))
    with pytest.raises(SystemExit):
        acceptance_profile.main([str(tmp_path / "table.json"), "--model-path", str(tmp_path / "model")])
    assert "sampled answers" in capsys.readouterr().err
    cells = [cell("mtbench", chain, used, 100, 3.0), cell("gsm8k", chain, used, 300, 4.0)]
    cells += [cell("mtbench", {"name": "cas_spec"}, {}, 9, 2.0)]
    cells += [cell("gsm8k", {"name": "prompt_lookup"}, {}, 9, 2.0)]  # of one bench, and not to be compared
    (tmp_path / "table.json").write_text(json.dumps({"cells": cells}))
    acceptance_profile.main([str(tmp_path / "table.json"), "--adapters", str(tmp_path)])
    assert capsys.readouterr().out == " 3.750  CATS chain, exits 1 and 3, 5 steps\n"
    assert load_acceptance(tmp_path / "acceptance.json", method_of).points == (AcceptancePoint(cats.CascadeConfig(), EXITS, 3.75, 9.75),)
    used["draft"]["name"] = "unknown"
    for spoilt, says in (({"cells": cells}, "does not say the exit"), ({"cells": [{}]}, "no table"), ({"cells": cells[2:3]}, "no method")):
        (tmp_path / "table.json").write_text(json.dumps(spoilt))
        with pytest.raises(SystemExit):
            acceptance_profile.main([str(tmp_path / "table.json"), "--adapters", str(tmp_path)])
        assert says in capsys.readouterr().err
