"""The planner with weights that have a coarse form: it drafts where the wire is slow; a length that was not measured is called assumed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cats
from cats import machine
from cats.cli.ask import main
from cats.errors import CatsError
from cats.machine import COARSE_ROWS, Subject, measure
from cats.planned import ASSUMED, Loading, Planning
from cats.planning.plan import COARSE
from cats.planning.profile import AcceptancePoint, AcceptanceProfile, MachineProfile, save_acceptance
from tests.test_planned_load import CHAIN, LOOKUP, source_of, with_acceptance
from tests.tiny_models import DRAFT_EXIT, TinyModel
from tests.weight_kinds import of_kind

Tiny = Callable[[str], TinyModel]
COMPUTING = ((1, 1e-4),)
SCRIPTED = MachineProfile({}, "2026-01-01", 1e6, 1e-6, 1e-5, ((1, 1e-6),), COMPUTING, COMPUTING, COMPUTING, ((1, 8e-5),))
"""A machine whose coarse layers are hardly faster than exact ones, and a flash of 1 MB/s."""
BUDGET, PLENTY = 90_000, 10**9
"""Of weights: the coarse form fits and the residuals are streamed; everything fits."""
PUBLISHED = 60_000
"""Of weights: plain ones stream, beside an int8 copy."""
ELSEWHERE = AcceptancePoint(cats.NestedConfig(steps=8, adaptive=False), (), 4.0, 9.0)


@pytest.fixture
def nested(tiny: Tiny, tmp_path: Path) -> Path:
    """A nested checkpoint of its own, into which a test may write."""
    return Path(shutil.copytree(of_kind(tiny("llama").base, "nested"), tmp_path / "nested"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Subject]:
    """What was measured: in place of the clock, the machine `SCRIPTED`."""
    subjects: list[Subject] = []

    def instead(subject: Subject, report: Any) -> MachineProfile:
        subjects.append(subject)
        return MachineProfile(**{**vars(SCRIPTED), "subject": subject.key})

    monkeypatch.setenv("CATS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "measure", instead)
    return subjects


def load(place: Path, budget: int, adapters: dict[str, Any] | None = None, plan: Planning | None = None, **memory: Any) -> cats.CatsModel:
    options = cats.MemoryOptions(budget, "weights", **memory)
    return cats.load(place, adapters, dtype="float32", memory=options, plan=plan or Planning())


def plan_of(model: cats.CatsModel) -> Any:
    assert model.plan is not None
    return model.plan


def text_of(model: cats.CatsModel) -> list[int]:
    return cats.generate(model, [3, 4, 5], None, cats.GenerationConfig(max_new_tokens=8, eos_token_ids=())).ids


@pytest.mark.usefixtures("scripted")
def test_a_slow_wire_drafts_with_the_coarse_form_and_says_that_its_length_is_assumed(nested: Path) -> None:
    slow = load(nested, BUDGET)
    assert plan_of(slow).method == ASSUMED.method
    assert source_of(slow).plan.streamed
    assert {piece.part for piece in source_of(slow).plan.streamed} == {"residual"}
    assert plan_of(slow).lines[0].startswith("plan: nested, 20 steps: ")
    assert "(its 11 tokens a cycle are assumed, not measured)" in plan_of(slow).lines[1]
    assert "plain decoding would make" in plan_of(slow).lines[1]
    resident = load(nested, PLENTY)
    assert plan_of(resident).method == cats.AutoregressiveConfig()
    assert "nested, 20 steps would make" in plan_of(resident).reason
    assert "assumed, not measured" in plan_of(resident).reason
    assert text_of(slow) == text_of(resident)


@pytest.mark.usefixtures("scripted")
def test_lengths_measured_beside_the_checkpoint_go_before(tiny: Tiny, nested: Path, tmp_path: Path) -> None:
    adapters = with_acceptance(tiny("llama"), tmp_path / "adapters", LOOKUP, CHAIN)
    resident = load(nested, PLENTY, adapters)
    assert plan_of(resident).method in (LOOKUP.method, CHAIN.method)
    assert plan_of(load(nested, PLENTY)).method == cats.AutoregressiveConfig()
    save_acceptance(AcceptanceProfile((ELSEWHERE, LOOKUP)), nested / "acceptance.json")
    assert plan_of(load(nested, PLENTY)).method == LOOKUP.method
    measured = plan_of(load(nested, BUDGET))
    assert measured.method == ELSEWHERE.method
    assert "assumed" not in measured.reason
    both = plan_of(load(nested, PLENTY, adapters))
    assert {candidate.option.point for candidate in both.choice.candidates} >= {ELSEWHERE, LOOKUP, CHAIN}


@pytest.mark.usefixtures("scripted")
def test_what_is_given_stays(nested: Path) -> None:
    assert plan_of(load(nested, BUDGET, plan=Planning({"steps": 20}))).method == ASSUMED.method
    shorter = plan_of(load(nested, BUDGET, plan=Planning({"steps": 6})))
    assert (shorter.method, shorter.choice) == (cats.NestedConfig(steps=6), None)
    assert "no accepted length was measured with steps 6" in shorter.reason
    with pytest.raises(CatsError, match="--window does nothing for prompt_lookup"):
        load(nested, BUDGET, plan=Planning({"window": 3}))
    named = cats.load(nested, memory=cats.MemoryOptions(BUDGET, "weights"), method="autoregressive")
    assert named.plan is None


def test_an_int8_copy_is_planned_and_resident_only_where_it_drafts(tiny: Tiny, scripted: list[Subject]) -> None:
    slow = load(tiny("llama").base, PUBLISHED + 65_000, coarse="int8")
    assert plan_of(slow).method == ASSUMED.method
    assert any(piece.part == "codes" for piece in source_of(slow).plan.pinned)
    resident = load(tiny("llama").base, PLENTY, coarse="int8")
    assert plan_of(resident).method == cats.AutoregressiveConfig()
    assert not any(COARSE.needs(piece) for piece in source_of(resident).plan.pinned)
    assert plan_of(resident).reason.endswith("the int8 copy is not resident")
    with pytest.raises(CatsError, match=r"chose autoregressive and left out what nested needs \(a coarse form of the weights\)"):
        cats.generate(resident, [3, 4], "nested", cats.GenerationConfig(max_new_tokens=4, eos_token_ids=()))
    asked = load(tiny("llama").base, PLENTY, coarse="int8", views=(COARSE,))
    assert any(piece.part == "codes" for piece in source_of(asked).plan.pinned)
    assert text_of(slow) == text_of(resident)
    assert [subject.key["coarse"] for subject in scripted] == ["int8"]


def test_without_a_coarse_form_nothing_is_assumed(tiny: Tiny, scripted: list[Subject]) -> None:
    model = load(tiny("llama").base, PUBLISHED)
    assert plan_of(model).method == cats.PromptLookupConfig()
    assert plan_of(model).choice is None
    assert not scripted


@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_the_coarse_form_is_measured(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_SECONDS", 0.05)
    monkeypatch.setattr(machine, "READ_AHEAD_SECONDS", 0.01)
    base = of_kind(tiny("llama").base, kind)
    memory = cats.MemoryOptions(BUDGET, "weights", coarse="int8" if kind == "int8" else None)
    places = {"draft": [(tiny("llama").draft, DRAFT_EXIT)]}
    subject = Loading.read(base, places, ("float32", "auto"), cats.load(base).base.device, memory).subject()
    assert {name.rpartition(".")[2] for name in (streamed.name for streamed in subject.streamed)} == {
        "residual" if kind == "nested" else "weight"
    }
    profile = measure(subject)
    assert [rows for rows, _ in profile.coarse_layer_seconds] == list(COARSE_ROWS)
    assert all(seconds >= 0 for _, seconds in profile.coarse_layer_seconds)
    assert sum(seconds for _, seconds in (*profile.layer_seconds, *profile.pass_seconds)) > 0


@pytest.mark.usefixtures("scripted")
def test_the_command_plans_for_a_copy(speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["two words", "--model-path", str(speaking.base), "--max-new-tokens", "8", "--no-fallback"]
    main([*command, "--memory-budget", "1GB", "--budget-covers", "weights", "--coarse", "int8"])
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.startswith(("plan: ", "why: "))]
    assert said[0].startswith("plan: plain decoding: ")
    assert "nested, 20 steps would make" in said[1]
