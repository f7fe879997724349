"""A method that is one file outside the package: opened once per model, charged, closed; its flags, presets and needs are found."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cats
from cats.acceptance import Verdict
from cats.cli.ask import main
from cats.cli.method_flags import add_method_flags, chosen_method
from cats.errors import ContractError
from cats.methods import METHODS, PRESETS, needs_of, with_needs
from cats.methods.base import Method
from cats.planning.plan import BY_METHODS, EXACT, View
from cats.resources import Resources, bytes_of
from cats.state import Cycle, DecodeState
from cats.trace import PassCost
from tests.methods import SHAPES
from tests.scripted_model import follow, scripted_model
from tests.tiny_models import VOCAB, TinyModel, prompts
from tests.toy_method import Successor, SuccessorConfig, Table

Tiny = Callable[[str], TinyModel]
CONFIG = cats.GenerationConfig(max_new_tokens=12, eos_token_ids=())
CIRCLE = follow([(token + 1) % 8 for token in range(8)])


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "successors.npy"
    np.save(path, np.arange(VOCAB, dtype=np.int64)[::-1])
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    tables: list[Table] = []
    monkeypatch.setattr(Table, "made", tables)
    return tables


def taken(model: cats.MultiAdapterCATSModel) -> int:
    return model.base.source.ledger.taken.get(BY_METHODS, 0)


def test_what_it_holds_is_made_once_per_model_charged_and_closed_with_it(tiny: Tiny, made: list[Table]) -> None:
    models = [cats.load(tiny("llama").base) for _ in range(2)]
    for model in models:
        for prompt in prompts(count=3, longest=10, seed=8):
            assert cats.generate(model, prompt, "successor", CONFIG).ids == cats.generate(model, prompt, "autoregressive", CONFIG).ids
    assert len(made) == 2
    assert [taken(model) for model in models] == [8 * VOCAB] * 2
    models[0].close()
    assert [table.closed for table in made] == [True, False]
    assert [taken(model) for model in models] == [0, 8 * VOCAB]
    cats.build_method(SuccessorConfig(twice=False), models[1])
    assert (len(made), taken(models[1])) == (3, 16 * VOCAB), "other settings hold something else"


def test_it_drafts_and_its_passes_are_told(made: list[Table]) -> None:
    model = scripted_model(CIRCLE, CIRCLE, CIRCLE)
    found = cats.generate(model, [0, 1], cats.build_method(SuccessorConfig(), model), CONFIG)
    assert [trace.committed for trace in found.traces[1:4]] == [3, 3, 3]
    assert found.traces[1].seconds.stages == ["table", "target", "accept"]
    (cost,) = found.traces[1].passes
    assert (cost.view, cost.rows, cost.context, cost.layers, cost.adapter) == (EXACT, 3, 2 + 3, model.base.layer_count, None)
    assert 0 < cost.seconds <= found.traces[1].seconds["compute"]


class Learner(Method):
    """Decodes plainly, with one draft by a part of the model, and notes what its passes cost."""

    max_nodes = 2

    def start(self, state: DecodeState) -> None:
        self.costs: list[PassCost] = []

    def propose(self, cycle: Cycle) -> list[int]:
        node = cycle.tree.add(0, 1, "trunk") if cycle.depth_limit else 0
        cycle.target_logits([0], PART)
        return sorted({0, node})

    def observe(self, cycle: Cycle, nodes: Sequence[int], logits_TV: torch.Tensor, verdict: Verdict) -> None:
        self.costs += cycle.passes


PART = View(mlp=frozenset({1}))


def test_a_method_can_learn_from_what_its_passes_cost(tiny: Tiny) -> None:
    model, method = cats.load(tiny("llama").base, memory=cats.MemoryOptions(pinning=False, views=(PART,))), Learner(SuccessorConfig())
    found = cats.generate(model, [5, 6, 7], method, CONFIG)
    told = [cost for trace in found.traces for cost in trace.passes]
    assert method.costs == told
    assert [(cost.view, cost.rows) for cost in told[:2]] == [(PART, 1), (EXACT, 2)]
    for trace in found.traces[1:]:
        assert sum(cost.layers for cost in trace.passes) == trace.layer_passes
        streamed = [cost.bytes_streamed for cost in trace.passes]
        assert streamed[0] == 0 < streamed[1]


def test_adapters_passes_are_told_too(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    costs = cats.generate(model, [5, 6, 7], cats.CascadeConfig(steps=2), CONFIG).traces[1].passes
    assert {cost.adapter for cost in costs} == {None, "draft", "shallow"}
    assert all(cost.layers == 1 for cost in costs if cost.adapter)


def test_a_budget_grants_what_it_holds_and_refuses_it_before_it_is_made(tiny: Tiny, stored: Path, made: list[Table]) -> None:
    config = SuccessorConfig(stored)
    assert needs_of(config).resident_bytes == 8 * VOCAB
    memory = cats.MemoryOptions(2 * 10**9, positions=64)
    assert with_needs(memory, config, cats.CascadeConfig(steps=2)).nodes == cats.build_method(cats.CascadeConfig(steps=2)).max_nodes
    model = cats.load(tiny("llama").base, memory=memory, method=config)
    assert dict(model.base.source.plan.charges)[BY_METHODS] == 8 * VOCAB
    assert model.plan is None
    assert len(cats.generate(model, [5, 6], None, CONFIG).ids) == len(cats.generate(model, [5, 6], config, CONFIG).ids)
    assert (len(made), taken(model)) == (1, 8 * VOCAB)
    without = cats.load(tiny("llama").base, memory=cats.MemoryOptions(2 * 10**9, positions=64, nodes=3), plan=None)
    with pytest.raises(cats.CatsError, match=f"{BY_METHODS} would take 384 bytes and the memory plan grants 0 bytes"):
        cats.build_method(config, without)
    assert (len(made), taken(without)) == (1, 0)


def test_views_that_a_method_drafts_with_are_resident_where_a_load_names_it(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    needs = needs_of(SuccessorConfig())
    monkeypatch.setattr(Successor, "needs", classmethod(lambda cls, config: type(needs)(views=(PART,))))
    model = cats.load(tiny("llama").base, memory=cats.MemoryOptions(pinning=False), method="successor")
    assert {piece.layer for piece in model.base.source.plan.streamed if piece.matrix.startswith("mlp")} == {1}


def test_one_that_was_built_without_its_model_is_refused(tiny: Tiny) -> None:
    model, other = (cats.load(tiny("llama").base) for _ in range(2))
    config = SuccessorConfig()
    for method, said in ((cats.build_method(config), "without a model"), (cats.build_method(config, other), "for another model")):
        with pytest.raises(cats.CatsError, match=rf"the method Successor .* was built .*{said}.*build_method\(config, model\)"):
            cats.generate(model, [5, 6], method, CONFIG)


def test_its_flags_and_presets_are_found(stored: Path) -> None:
    parser = argparse.ArgumentParser()
    add_method_flags(parser)
    assert chosen_method("successor", parser.parse_args([])) == SuccessorConfig()
    flags = ["--successors", str(stored), "--no-twice"]
    assert chosen_method("successor", parser.parse_args(flags)) == SuccessorConfig(stored, False)
    assert "--twice | --no-twice" in parser.format_help()
    assert PRESETS["successor"] == SuccessorConfig()
    assert {"successor", "successor-once"} <= SHAPES.keys()


def test_the_command_runs_it_with_a_file(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["two words", "--model-path", str(speaking.base), "--max-new-tokens", "8", "--method"]
    main([*command, "autoregressive"])
    plain = capsys.readouterr().out.rpartition("\n\n[")[0]
    path = tmp_path / "table.npy"
    np.save(path, np.zeros(cats.load(speaking.base).base.config.vocab_size, dtype=np.int64))
    main([*command, "successor", "--successors", str(path), "--memory-budget", "2GB"])
    assert capsys.readouterr().out.rpartition("\n\n[")[0] == plain


def test_every_method_is_listed_in_a_line(capsys: pytest.CaptureFixture[str], stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = needs_of(SuccessorConfig(stored))
    monkeypatch.setattr(Successor, "needs", classmethod(lambda cls, config: needs))
    with pytest.raises(SystemExit) as ended:
        main(["--list-methods"])
    assert ended.value.code == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(lines) == set(METHODS)
    for part in ("weights of its own", "384 bytes", "lossless", "A toy: the token that most often follows"):
        assert part in lines["successor"]
    assert "draft adapter, shallow adapter" in lines["cascade"]
    expected = {"rest": "a datastore ", "medusa": "heads ", "nested": "a coarse form of the weights ", "lookahead": "nothing "}
    for name, needed in expected.items():
        assert lines[name].split(maxsplit=1)[1].startswith(needed), lines[name]
    assert "its datastore" in lines["rest"]


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "a name": ({"name": "successor", "Config": type("Other", (cats.MethodConfig,), {})}, "called successor, as another one is"),
    "a configuration": ({"name": "second", "Config": SuccessorConfig}, "SuccessorConfig belongs to the method successor"),
}


@pytest.mark.parametrize("case", CLASHES)
def test_methods_do_not_share_names_nor_configurations(case: str) -> None:
    members, sentence = CLASHES[case]
    with pytest.raises(ContractError, match=sentence):
        type("Second", (Method,), dict(members))
    assert "second" not in METHODS


def test_limits_of_a_setting_are_checked_and_said() -> None:
    with pytest.raises(cats.CatsError, match="steps is 0; it must be at least 1"):
        cats.KangarooConfig(steps=0)
    with pytest.raises(cats.CatsError, match="tree-topk is 1001; it must lie between 1 and 1000"):
        cats.CascadeConfig(tree_topk=1001)


def test_bytes_of_resources() -> None:
    table = Table(torch.zeros(3))
    assert bytes_of({"a": [table, table.tokens], "b": None}) == 24
    with pytest.raises(ContractError, match="a method holds a object with the model, which does not say its size"):
        bytes_of(object())


def test_what_fails_to_open_leaves_no_charge() -> None:
    charged: list[int] = []
    resources = Resources(charged.append)

    def broken() -> object:
        raise cats.CatsError("no such table")

    with pytest.raises(cats.CatsError, match="no such table"):
        resources.get("key", broken, promised=100)
    assert sum(charged) == 0
