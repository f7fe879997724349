"""`python -m evaluation.drift`: what is counted by position, a given text is committed as it is, and interrupted runs go on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import cats
from evaluation import drift
from evaluation.drift import BIN, Forced, bins_of, repeated
from evaluation.record_file import read_records
from tests.tiny_models import TinyModel, prompts
from tests.weight_kinds import of_kind, options_of


def test_a_given_text_is_committed_and_the_models_agreement_is_counted(tiny: Callable[[str], TinyModel]) -> None:
    """The chain drafts as on any text; the rule counts where the exact model would have gone along."""
    model = cats.load(of_kind(tiny("llama").base, "sum"), memory=options_of("sum", cats.MemoryOptions(pinning=False)))
    config, method = cats.GenerationConfig(max_new_tokens=30, eos_token_ids=()), cats.NestedConfig(steps=4, adaptive=False)
    text = [token for prompt in prompts(count=8, longest=12, seed=3) for token in prompt][:60]
    own = cats.generate(model, text[:5], cats.AutoregressiveConfig(), config).ids
    for given, all_its_own in ((text, False), ([*text[:5], *own, *own], True)):
        rule = Forced(given, 5)
        found, lengths = list(given[:5]), []
        for step in cats.stream(model, given[:5], cats.build_method(method, model), config, acceptance=rule):
            found += step.tokens
            lengths.append((rule.agreed, step.trace.accepted))
        assert found == given[: len(found)]
        assert len(found) == 35
        assert any(agreed > accepted for agreed, accepted in lengths) != all_its_own
        assert all(agreed == accepted for agreed, accepted in lengths) == all_its_own


def test_figures_by_position() -> None:
    cycles = [[10, 20, 20], [40, 20, 4], [450, 20, 0], [BIN, 20, 9]]
    first, second, third = bins_of([{"cycles": cycles, "ids": [*range(500), *[7] * 20]}], 3 * BIN)
    assert (first["cycles"], first["agreement"], first["accepted_length"]) == (3, 24 / 26, 27 / 3)
    assert first["agreement_interval"][0] < first["agreement"] < first["agreement_interval"][1]
    assert (second["cycles"], second["agreement"], second["accepted_length"]) == (1, 9 / 10, 10)
    assert (first["repeated_4gram_share"], second["repeated_4gram_share"]) == (0, 16 / 20)
    assert (third["cycles"], third["agreement"], third["agreement_interval"], third["repeated_4gram_share"]) == (0, None, None, None)
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == [False, False, False, False, True]


def test_the_command_goes_on_where_it_was(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It is said, and said again."}]
    talks, output = tmp_path / "talks.json", tmp_path / "drift.json"
    talks.write_text(json.dumps([{"id": str(place), "conversations": turns} for place in range(6)]), encoding="utf-8")
    monkeypatch.setattr(drift, "BIN", 150)
    command = ["--model-path", str(speaking.base), "--coarse", "int8", "--device", "cpu", "--positions", "300", "--output", str(output)]
    command += ["--prompts", str(talks), "--text", str(talks), "--documents", "2", "--steps", "3"]
    work, done = drift.run, list[str]()

    def dying(*arguments: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append("one")
        return work(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(drift, "run", dying)
        with pytest.raises(SystemExit):
            drift.main(command)
    assert len(read_records(output.with_suffix(".records.jsonl"))) == 3
    drift.main(command)
    records = read_records(output.with_suffix(".records.jsonl"))
    assert [(record["source"], record["document"]) for record in records] == [("written", 0), ("written", 1), ("given", 0), ("given", 1)]
    assert all(len(record["ids"]) == 300 for record in records)
    result = json.loads(output.read_text())
    assert [len(found["bins"]) for found in result["sources"].values()] == [2, 2]
    assert output.with_suffix(".png").stat().st_size > 0
    capsys.readouterr()
    drift.main(["--output", str(output), "--merge"])
    assert "## A given text, 2 of 300 positions" in capsys.readouterr().out
    for change, said in (
        (["--positions", "290"], "begun with positions 300, now it is 290"),
        (["--documents", "9"], "texts of 305 tokens"),
        (["--positions", "0"], "--positions is 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            drift.main([*command, *change])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
