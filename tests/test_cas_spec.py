"""CAS-Spec: its formulas, what it learns, what its router chooses, its layer sets, its state on disk, and that the target alone decides."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal

import pytest
import torch

import cats
from cats.methods import cas_spec_tree, needs_of
from cats.methods.cas_spec import CasSpecConfig, Opened
from cats.methods.cas_spec_tree import Level
from cats.methods.estimates import PAST, START, WINDOW, Acceptance, Regression
from cats.methods.router import TARGET, Choice, Option, Router, best_choice, best_length, gain, speed_up
from cats.planning.plan import EXACT, View
from cats.planning.sparsity import Sparse, by_turns, read_sets, skipped_count, view_without
from cats.state import Cycle, DecodeState
from evaluation import router_calibration
from tests.chats import write
from tests.methods import SHAPES, memory_for
from tests.test_int8_copy import scramble
from tests.tiny_models import DRAFT_EXIT, LAYERS, SIZES, TinyModel, prompts
from training import search_layer_sets

Tiny = Callable[[str], TinyModel]
OPEN = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=())
TRAINED = Path(__file__).parents[1] / "data" / "tiny"
WIDTH = SIZES["hidden_size"]
EVERY = ("coarse", "sparse40", "sparse60", "exit", "lookup")


def tokens_expected(chances: Sequence[float]) -> float:
    """Accepted tokens of a chain, by going through everything that may happen."""
    total = 0.0
    for outcome in product((True, False), repeat=len(chances)):
        weight = 1.0
        for stands, chance in zip(outcome, chances, strict=True):
            weight *= chance if stands else 1 - chance
        total += weight * (outcome.index(False) if False in outcome else len(outcome))
    return total


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_gains_are_those_of_every_outcome(a: float, k: int) -> None:
    assert gain(a, 0.4, k, 0.6, 0.1) == pytest.approx(tokens_expected([a] * k + [0.6]) / (0.4 * k + 0.1))
    assert speed_up(a, 0.4, k) == pytest.approx((1 + tokens_expected([a] * k)) / (0.4 * k + 1))
    assert best_length(a, 0.4, 5) == max(range(6), key=lambda length: (1 + tokens_expected([a] * length)) / (0.4 * length + 1))


def test_the_obviously_best_of_two_levels_is_chosen() -> None:
    good, bad = Option("good", 0.9, 0.2, 10), Option("bad", 0.3, 0.5, 10)
    choice = best_choice([bad, good], 0.0, 0.0)
    assert choice is not None
    assert choice.level == "good"
    cheap = best_choice([good, Option("free", 0.5, 1e-3, 10)], 0.0, 0.0)
    assert cheap is not None
    assert cheap.level == "free"
    for a, c, bottom in product((0.1, 0.6, 0.95), (0.05, 0.5), (0.0, 0.5)):
        choice = best_choice([Option("one", a, c, 10)], bottom, 0.01)
        lengths = {k: gain(a, c, k, bottom, 0.01) for k in range(1, 11)}
        assert choice is not None
        assert choice.gain == pytest.approx(max(lengths.values()))
        assert lengths[choice.length] == pytest.approx(choice.gain)
    assert best_choice([Option("nothing", 0.9, 0.2, 0)], 0.0, 0.0) is None


def test_acceptance_is_a_moving_average_with_what_is_not_verified_yet() -> None:
    acceptance = Acceptance()
    assert acceptance.estimate() == START
    acceptance.draft(0.5)
    acceptance.draft(0.25)
    assert acceptance.estimate() == pytest.approx(PAST * START + (1 - PAST) * 0.375)
    acceptance.judge([(0.5, True), (0.25, False)])
    assert acceptance.average == pytest.approx(PAST * START + (1 - PAST) * 0.5)
    for _ in range(30):
        acceptance.judge([(0.95, True)] * 5)
    assert acceptance.average > 0.99
    assert acceptance.chance(0.95) > 0.99 > acceptance.chance(0.55)
    for _ in range(2 * WINDOW):
        acceptance.judge([(0.95, False)])
    assert acceptance.average < 0.05
    for _ in range(1000):
        acceptance.judge([])
    assert acceptance.average == pytest.approx(START, abs=0.01), "a level that is not tried is given another chance"


def test_the_regression_finds_known_coefficients_and_its_predictions_improve() -> None:
    chance, regression, errors = random.Random(1), Regression(), []
    for _ in range(400):
        rows, context, layers, nbytes = chance.randint(1, 64), chance.randint(10, 900), chance.randint(5, 30), chance.choice([0, 10**8])
        seconds = 2e-3 + 3e-4 * rows + 1e-6 * context + 4e-4 * layers + 1e-9 * nbytes
        errors.append(abs(regression.seconds(rows, context, layers, nbytes) - seconds))
        regression.learn(rows, context, layers, nbytes, seconds * chance.uniform(0.95, 1.05))
    assert regression.row_seconds() == pytest.approx(3e-4, rel=0.1)
    assert regression.seconds(20, 100, 30, 0) == pytest.approx(2e-3 + 6e-3 + 1e-4 + 12e-3, rel=0.05)
    assert sum(errors[-100:]) < 0.2 * sum(errors[:100])
    before = regression.seconds(20, 100, 30, 0)
    regression.learn(20, 100, 30, 0, 100.0)
    assert regression.seconds(20, 100, 30, 0) < 1.5 * before, "an interrupted pass says little"


@pytest.mark.parametrize("layers", [4, 6, 30, 32])
def test_layer_sets_nest_and_keep_the_ends(layers: int) -> None:
    views = [view_without(by_turns(layers)[: skipped_count(share, layers)]) for share in (0.4, 0.6)]
    assert views[1].follows(views[0])
    assert views[0].attention < views[1].attention or views[0].mlp < views[1].mlp
    assert not EXACT.follows(views[0])
    for view in views:
        assert not {0, layers - 1} & (view.attention | view.mlp)
    assert len(views[0].attention) + len(views[0].mlp) == min(round(0.8 * layers), 2 * layers - 4)


def sets_file(path: Path, **changes: object) -> Path:
    sets = {"0.4": {"attention": [2, 3], "mlp": [3]}, "0.6": {"attention": [2, 3], "mlp": [1, 3]}}
    path.write_text(json.dumps({"layers": LAYERS, "hidden_size": WIDTH, "sets": sets} | changes))
    return path


def test_layer_sets_are_read_from_a_file_and_checked(tmp_path: Path) -> None:
    path = sets_file(tmp_path / "sets.json")
    assert Sparse(sparsity=0.6, sets=path).in_model(LAYERS, WIDTH) == View(attention=frozenset({2, 3}), mlp=frozenset({1, 3}))
    for sentence, layers, share in (("of a model with 6 layers", LAYERS + 1, 0.4), ("none of 0.5", LAYERS, 0.5)):
        with pytest.raises(cats.CatsError, match=sentence):
            Sparse(sparsity=share, sets=path).in_model(layers, WIDTH)
    for sets, sentence in (
        ({"0.4": {"attention": [2], "mlp": []}, "0.6": {"attention": [], "mlp": [1]}}, "do not nest"),
        ({"0.4": {"attention": [0], "mlp": []}}, "first, last or missing layer"),
        ({"0.4": {"attention": [2]}}, "cannot read layer sets"),
    ):
        with pytest.raises(cats.CatsError, match=sentence):
            read_sets(sets_file(tmp_path / "sets.json", sets=sets))


def test_whatever_drafts_the_text_is_the_targets(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels at random, in every order: nodes are run by several views, and what these leave in the caches must not matter."""
    chance, kinds, drafted = random.Random(3), set[str](), set[str]()

    def any_choice(options: Sequence[Option], a: float, c: float) -> Choice | None:
        found = [option for option in options if option.longest > 0]
        option = chance.choice(found) if found else None
        drafted.update([option.level] if option else [])
        return option and Choice(option.level, chance.randint(1, option.longest), chance.choice([0.0, 1e9]))

    monkeypatch.setattr(cas_spec_tree, "best_choice", any_choice)
    model = cats.load(tiny("llama-grouped").base, tiny("llama-grouped").adapters, memory=cats.MemoryOptions(coarse="int8"))
    for seed in range(6):
        levels = tuple(level for level in EVERY if chance.random() < 0.7) or EVERY
        config = CasSpecConfig(levels, longest_draft=chance.randint(1, 5), tree_nodes=chance.randint(2, 24))  # type: ignore[arg-type]
        generation = replace(OPEN, temperature=chance.choice([0.0, 0.8]), seed=seed)
        prompt = prompts(count=1, longest=12, seed=seed)[0]
        found = cats.generate(model, prompt, config, generation)
        assert found.ids == cats.generate(model, prompt, "autoregressive", generation).ids
        kinds |= {kind for trace in found.traces for kind in trace.accepted_kinds}
    assert drafted == set(EVERY)
    assert len(kinds & drafted) >= 3, "of what they draft the target takes some"


@pytest.mark.parametrize("levels", [("sparse60", "exit", "lookup"), ("exit", "lookup"), ("exit",)])
def test_where_the_target_is_dear_trees_grow_large(
    levels: tuple[Literal["sparse60", "exit", "lookup"], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a slow stream: rivals share passes, and a later pass meets nodes that an earlier one has run."""
    measured = Router.ran

    def ran(router: Router, kind: str, rows: float, context: float, layers: float, nbytes: float, seconds: float) -> None:
        measured(router, kind, rows, context, layers, nbytes, 1.0 if kind == TARGET else 1e-3)

    monkeypatch.setattr(Router, "ran", ran)
    model = cats.load(TRAINED, {"draft": TRAINED / "adapters" / "draft_exit2"})
    method, sizes = cats.build_method(CasSpecConfig(levels), model), []
    for prompt in ("Explain why the sea is salty.", "Tom has 12 apples and buys 3 bags of 5. How many apples has he now?"):
        found = model.chat(prompt, method, max_new_tokens=96)
        assert found.ids == model.chat(prompt, "autoregressive", max_new_tokens=96).ids
        sizes += [trace.nodes for trace in found.traces[1:]]
    assert max(sizes) > 16


def test_a_level_runs_again_what_another_has_claimed_and_nothing_else(tiny: Tiny) -> None:
    """Exit runs a chain, a sparse level what is above its end: then only that is run again, and read by the adapter."""
    model = cats.load(tiny("llama-grouped").base, tiny("llama-grouped").adapters)
    state = DecodeState(model, [5, 6, 7], ("draft",), capacity=20, max_nodes=8)
    state.read_prompt()
    state.tokens.append(9)
    cycle = Cycle(state, depth_limit=8)
    first = cycle.tree.add(0, 11, "exit")
    second, other = cycle.tree.add(first, 12, "exit"), cycle.tree.add(first, 13, "exit")
    exit_level = Level("exit", EXACT, DRAFT_EXIT, DRAFT_EXIT + 1)
    sparse = Level("sparse60", Sparse(sparsity=0.6).in_model(LAYERS, WIDTH), LAYERS, 2)
    assert exit_level.rows(cycle, [second]) == [0, first, second]
    before = exit_level.look(cycle, [0, first, second])
    assert exit_level.rows(cycle, [second]) == []
    sparse.look(cycle, sparse.rows(cycle, [other]))
    assert exit_level.rows(cycle, [second]) == [0, first]
    assert torch.equal(exit_level.look(cycle, [0, first]), before[:2])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.startswith("cas-spec")])
def test_scrambled_levels_change_no_text(tiny: Tiny, shape: str, tmp_path: Path) -> None:
    """Everything but the ends left out, in place of the layer sets; a scrambled copy in place of the coarse form."""
    inner = list(range(1, LAYERS - 1))
    path = sets_file(tmp_path / "sets.json", sets={share: {"attention": inner, "mlp": inner} for share in ("0.4", "0.6")})
    model = cats.load(tiny("llama").base, tiny("llama").adapters, memory=memory_for(shape))
    if memory_for(shape) is not None:
        scramble(model)
    for prompt in prompts(count=2, longest=10, seed=8):
        found = cats.generate(model, prompt, replace(SHAPES[shape], layer_sets=path), OPEN)  # type: ignore[call-arg]
        assert found.ids == cats.generate(model, prompt, "autoregressive", OPEN).ids


def test_what_was_learnt_is_saved_and_started_from(tiny: Tiny, tmp_path: Path) -> None:
    config = CasSpecConfig(tree_nodes=12, state=tmp_path / "state.json")

    def opened() -> tuple[cats.MultiAdapterCATSModel, Opened]:
        model = cats.load(tiny("llama").base)
        return model, cats.build_method(config, model).resources

    model, first = opened()
    cats.generate(model, [5, 6, 7], config, OPEN)
    assert first.router.times("target").count > 10
    assert first.router.timed
    model.close()
    model, second = opened()
    assert second.router.times("target").record == first.router.times("target").record
    assert [acceptance.record for acceptance in second.router.acceptances.values()] == [
        acceptance.record for acceptance in first.router.acceptances.values()
    ]
    with pytest.raises(cats.CatsError, match=r"learnt with levels .*'lookup'\], and here it is \['sparse60'\]; give another --state"):
        cats.build_method(replace(config, draft_levels=("sparse60",)), model)
    config.state.write_text("{}")  # type: ignore[union-attr]
    with pytest.raises(cats.CatsError, match="cannot read the state"):
        opened()


def test_a_budget_keeps_the_levels_and_a_refusal_says_what_would_fit(tiny: Tiny) -> None:
    base, config = tiny("llama").base, CasSpecConfig(tree_nodes=12)
    least = cats.MemoryOptions(10**9, "weights", pinning=False, ring_buffers=1)
    model = cats.load(base, memory=least, method=config)
    plan = model.base.source.plan
    views = [view.in_model(LAYERS, WIDTH) for view in needs_of(config).views]
    assert all(piece in plan.pinned for view in views for piece in plan.sizes.pieces if view.needs(piece))  # type: ignore[union-attr]
    fits = cats.load(base, memory=replace(least, budget_bytes=plan.charged), method=config)
    found = cats.generate(fits, [5, 6, 7], config, OPEN)
    assert found.ids == cats.generate(cats.load(base), [5, 6, 7], "autoregressive", OPEN).ids
    assert all(cost.bytes_streamed == 0 for trace in found.traces for cost in trace.passes if cost.view != EXACT)
    with pytest.raises(cats.CatsError, match=r"raise --memory-budget, or draft with fewer views \(weights without 7 sublayers: \d"):
        cats.load(base, memory=replace(least, budget_bytes=plan.charged - 1), method=config)


def test_contradictions_are_refused() -> None:
    refused = {("lookup", "sparse40"): "name it last", ("sparse60", "sparse40"): "exchange", ("exit", "exit"): "none twice"}
    for levels, sentence in refused.items():
        with pytest.raises(cats.CatsError, match=sentence):
            CasSpecConfig(levels)  # type: ignore[arg-type]


def test_the_calibration_command_compares_and_draws(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "router.json"
    flags = ["--model-path", str(speaking.base), "--questions", "2", "--max-new-tokens", "12", "--device", "cpu", "--output", str(output)]
    router_calibration.main(flags)
    result = json.loads(output.read_text())
    assert result["times"]["target"]["passes"] == result["cycles"]["cycles"] > 0
    assert 0 < result["cycles"]["decision_share"] < 1
    assert output.with_suffix(".png").stat().st_size > 1000
    assert "deciding takes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        router_calibration.main([*flags, "--method", "kangaroo"])
    assert "has no router" in capsys.readouterr().err


def test_bins_hold_what_was_expected_and_what_came_of_it() -> None:
    found = router_calibration.acceptance_of([("a", 0.25, True), ("a", 0.25, False), ("a", 0.85, True), ("b", 1.0, False)])
    assert found["a"]["bins"] == [{"tokens": 2, "expected": 0.25, "true": 0.5}, {"tokens": 1, "expected": 0.85, "true": 1.0}]
    assert found["a"]["calibration_error"] == pytest.approx((2 * 0.25 + 0.15) / 3)
    assert found["b"]["true"] == 0.0


def test_layer_sets_are_searched_taken_up_and_used(speaking: TinyModel, tmp_path: Path) -> None:
    data, output = write(tmp_path / "chats.json", 6), tmp_path / "sets.json"
    flags = ["--model-path", str(speaking.base), "--data-path", str(data), "--output", str(output), "--sequences", "3", "--tokens", "320"]
    search_layer_sets.main([*flags, "--evaluations", "130"])
    first = read_sets(output)
    assert {"0.4", "0.6"} == set(first["sets"])
    for found in first["sets"].values():
        assert found["agreement"] >= found["agreement_by_turns"]
    evaluated = output.with_suffix(".evaluated.json").read_text()
    search_layer_sets.main([*flags, "--evaluations", "130"])
    assert read_sets(output) == first
    assert output.with_suffix(".evaluated.json").read_text() == evaluated, "nothing was measured again"
    with pytest.raises(SystemExit):
        search_layer_sets.main([*flags, "--evaluations", "130", "--seed", "1"])
    model = cats.load(speaking.base)
    config = CasSpecConfig(layer_sets=output)
    assert cats.generate(model, [5, 6], config, OPEN).ids == cats.generate(model, [5, 6], "autoregressive", OPEN).ids
