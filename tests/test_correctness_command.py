"""`python -m evaluation.correctness`: agreement is found, a difference is shown with its place, tokens and logit gap, status 1."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cats import AutoregressiveConfig
from cats.methods import PRESETS
from cats.nested import conversion
from evaluation import correctness
from evaluation.correctness import Difference, compare_prompt, first_difference
from evaluation.presets import runnable_presets
from evaluation.record_file import read_records, rewrite_records
from evaluation.subject import Subject, load_subject, load_text
from evaluation.transformers_reference import Reference
from tests import speaking_model
from tests.tiny_models import TinyModel
from tests.weight_kinds import rewritten

CPU = torch.device("cpu")


def flags(tiny: TinyModel, *more: str) -> list[str]:
    adapters = ["--draft-adapter-path", str(tiny.draft), "--shallow-adapter-path", str(tiny.shallow)]
    return ["--model-path", str(tiny.base), *adapters, "--device", "cpu", "--limit", "2", *more]


def reference_for(subject: Subject, directory: Path, ends: tuple[int, ...]) -> Reference:
    base = subject.model.base
    return Reference(directory, base.weight_dtype, base.dtype, base.device, ends)


def sharegpt(folder: Path) -> str:
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]
    path = folder / "talks.json"
    path.write_text(json.dumps([{"id": str(place), "conversations": turns} for place in range(3)]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], Difference(1, 2, 5)),
        ([1, 2, 3], [1, 2], Difference(2, 3, None)),
        ([1], [1, 2], Difference(1, None, 2)),
        ([], [], None),
    ],
)
def test_first_difference(expected: list[int], actual: list[int], difference: Difference | None) -> None:
    assert first_difference(expected, actual) == difference


def test_all_methods_agree_and_the_result_says_what_was_compared(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    more = ["--all-methods", "--prompts", sharegpt(tmp_path), "--max-new-tokens", "1", "2", "9", "--output", str(output)]
    correctness.main(flags(speaking, *more))
    result = json.loads(output.read_text())
    shown, runnable = capsys.readouterr(), runnable_presets(speaking.base)
    assert "medusa is left out:" in shown.err, "there are no heads of this model"
    assert runnable.keys() <= PRESETS.keys() - {"medusa"}
    assert result["comparisons"] == 2 * 3 * len(runnable)
    assert result["differences"] == 0
    assert result["settings"]["dtype"] == "float32"
    assert result["arithmetic"] == {"weights": "float32", "computed": "float32"}
    lengths = result["accepted_length"]
    assert set(lengths) == set(runnable)
    assert lengths["autoregressive"] == 1
    assert lengths["cascade_tree"] > 1
    assert {"cpu", "torch", "transformers", "command"} <= result["environment"].keys()
    assert "0 differ" in shown.out


def test_a_recorded_difference_is_reported_with_status_1_and_nothing_is_compared_twice(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    command = flags(speaking, "--methods", "kangaroo", "autoregressive", "--prompts", "mtbench", "--output", str(output))
    with pytest.raises(SystemExit) as ended:
        correctness.main([*command, "--shallow-layer", "3"])
    assert ended.value.code == 2
    assert "does nothing for kangaroo and autoregressive" in capsys.readouterr().err
    command = [flag for flag in command if flag not in ("--shallow-adapter-path", str(speaking.shallow))]
    correctness.main([*command, "--max-new-tokens", "4"])
    records = read_records(output.with_suffix(".records.jsonl"))
    found = {"method": "kangaroo", "max_new_tokens": 4, "position": 2, "expected": 7, "actual": None, "logit_gap": 0.25}
    rewrite_records(output.with_suffix(".records.jsonl"), [{**records[0], "differences": [found]}, records[1]])
    with pytest.raises(SystemExit) as ended:
        correctness.main([*command, "--max-new-tokens", "4"])
    assert ended.value.code == 1
    assert "position 2, expected 7, found None, logit gap 0.25" in capsys.readouterr().out
    assert json.loads(output.read_text())["differences"] == 1
    with pytest.raises(SystemExit) as ended:
        correctness.main([*command, "--max-new-tokens", "5"])
    assert ended.value.code == 2


def test_another_model_differs_where_its_logits_do(tmp_path: Path, speaking: TinyModel) -> None:
    other = speaking_model.build(tmp_path, seed=1)
    subject = load_subject(str(speaking.base), {}, load_text(str(speaking.base), None), "float32", CPU)
    reference = reference_for(subject, other.base, subject.text.end_token_ids)
    prompt = subject.text.prompt_ids("Hi.")
    outcome = compare_prompt(subject, reference, prompt, {"plain": AutoregressiveConfig()}, [3, 20])
    assert outcome["comparisons"] == 2
    found = outcome["differences"][0]
    assert (found["method"], found["max_new_tokens"]) == ("plain", 3)
    expected = reference.greedy(prompt, 20)
    assert found["expected"] == expected[found["position"]]
    assert found["logit_gap"] > 0


def test_answers_end_where_the_context_does(speaking: TinyModel) -> None:
    subject = load_subject(str(speaking.base), {}, load_text(str(speaking.base), None), "float32", CPU)
    reference = reference_for(subject, speaking.base, ())
    methods = {"plain": AutoregressiveConfig(), "lookup": PRESETS["prompt_lookup"]}
    prompt = [5 + place % 200 for place in range(subject.model.base.context - 3)]
    assert compare_prompt(subject, reference, prompt, methods, [1, 3, 50])["differences"] == []
    assert compare_prompt(subject, reference, [*prompt, 5, 5, 5], methods, [1])["skipped"]


def test_half_precision_and_bad_prompts_are_refused(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        (["--compute-dtype", "float16", "--prompts", "mtbench"], "compare with --compute-dtype float32 or float64"),
        (["--prompts", str(tmp_path / "absent.json")], "cannot read conversations"),
        (["--prompts", str(tmp_path / "absent.jsonl")], "cannot read the question file"),
        (["--prompts", "mtbench", "--max-new-tokens", "0"], "max-new-tokens is 0"),
    ]
    for more, complaint in wrong:
        with pytest.raises(SystemExit) as ended:
            correctness.main(flags(speaking, "--all-methods", *more))
        assert ended.value.code == 2
        assert complaint in capsys.readouterr().err


def test_other_prompts_of_the_same_name_or_other_exits_are_not_gone_on_with(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, output = tmp_path / "asked.jsonl", tmp_path / "result.json"
    asked.write_text(json.dumps({"question_id": 1, "category": "x", "turns": ["Hi."]}) + "\n")
    command = flags(speaking, "--methods", "kangaroo", "--prompts", str(asked), "--max-new-tokens", "3", "--output", str(output))
    command = [flag for flag in command if flag not in ("--shallow-adapter-path", str(speaking.shallow))]
    correctness.main(command)
    correctness.main([*command, "--draft-layer", "1"])  # which is what the adapter says itself
    upstream = shutil.copytree(speaking.draft, tmp_path / "draft")
    config = json.loads((upstream / "config.json").read_text())
    del config["exit_layer"]
    (upstream / "config.json").write_text(json.dumps(config))
    for turn, change, said in (
        ("Hi.", ["--draft-adapter-path", str(upstream), "--draft-layer", "2"], "adapters.draft.exit_layer 1, now it is 2"),
        ("Ho.", [], "prompts.sha256"),
    ):
        asked.write_text(json.dumps({"question_id": 1, "category": "x", "turns": [turn]}) + "\n")
        with pytest.raises(SystemExit) as ended:
            correctness.main([*command, *change])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def published_and_nested(speaking: TinyModel, folder: Path) -> tuple[Path, Path]:
    """The speaking model in bfloat16, and the nested checkpoint made of it, both with the tokenizer."""
    published = rewritten(speaking.base, "plain", folder / "published", torch.bfloat16)
    for path in speaking.base.iterdir():
        if not (published / path.name).exists():
            shutil.copy(path, published)
    conversion.convert(conversion.conversion_of(published, folder / "nested"))
    return published, folder / "nested"


def test_nested_weights_are_compared_with_what_they_were_made_of(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And transformers answers once, for every method and budget, even for shorter answers."""
    published, nested = published_and_nested(speaking, tmp_path)
    command = ["--model-path", str(nested), "--device", "cpu", "--prompts", sharegpt(tmp_path), "--limit", "2"]
    answers = ["--reference-model", str(published), "--reference-answers", str(tmp_path / "answers.jsonl")]
    methods = ["--methods", "nested", "nested_adaptive", "nested_siblings", "--max-new-tokens"]
    budget = ["--memory-budget", "1MB", "--budget-covers", "weights"]
    correctness.main([*command, *answers, *methods, "9", *budget, "--output", str(tmp_path / "first.json")])
    result = json.loads((tmp_path / "first.json").read_text())
    assert (result["comparisons"], result["differences"]) == (6, 0)
    assert result["reference"]["name"] == "published"
    assert "SHA-256 of all" in capsys.readouterr().out
    kept = read_records(tmp_path / "answers.jsonl")
    assert [record["max_new_tokens"] for record in kept] == [9]  # both prompts are the same

    monkeypatch.setattr("evaluation.transformers_reference.AutoModelForCausalLM", None)  # which is not needed again
    for length in ("9", "4"):
        correctness.main([*command, *answers, *methods, length, "--output", str(tmp_path / f"again{length}.json")])
    assert json.loads((tmp_path / "again4.json").read_text())["differences"] == 0
    assert read_records(tmp_path / "answers.jsonl") == kept
    for change, said in (
        (["--compute-dtype", "float64", *answers], "begun with compute 'float32', now it is 'float64'"),
        ([], "give the checkpoint that they were made of by --reference-model"),
        (["--reference-model", str(tmp_path / "absent")], "there is no directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            correctness.main([*command, *methods, "4", *change])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_another_model_is_no_reference_of_nested_weights(
    tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    published, nested = published_and_nested(speaking, tmp_path)
    other, _ = published_and_nested(speaking_model.build(tmp_path / "seed1", seed=1), tmp_path / "seed1")
    command = ["--methods", "nested", "--prompts", sharegpt(tmp_path), "--device", "cpu", "--limit", "1", "--max-new-tokens", "2"]

    def refused(reference: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            correctness.main([*command, "--model-path", str(nested), "--reference-model", str(reference)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert f"is not the tensor that {nested} was made of" in refused(other)
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "config.json says another rms_norm_eps" in refused(published)
    (published / "config.json").write_text(json.dumps(config))
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    assert "or other end tokens" in refused(published)
    (published / "generation_config.json").unlink()
    plain = ["--methods", "autoregressive", *command[2:], "--model-path", str(published)]
    copied = shutil.copytree(published, tmp_path / "copied")
    correctness.main([*plain, "--reference-model", str(copied)])
    assert "nothing records what these weights were made of" in capsys.readouterr().out
