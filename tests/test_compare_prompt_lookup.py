"""Prompt lookup beside transformers': the same text, and with its rule as many passes; the command goes on where it stopped."""

import json
from pathlib import Path

import pytest
import torch

from cats import PromptLookupConfig
from evaluation import compare_prompt_lookup
from evaluation.compare_prompt_lookup import compare_prompt, earliest_continuation
from evaluation.record_file import read_records, rewrite_records
from evaluation.subject import load_subject, load_text
from evaluation.transformers_reference import Reference
from tests.tiny_models import TinyModel

CPU = torch.device("cpu")


def test_the_earliest_place_of_the_longest_ngram_is_copied() -> None:
    text = [1, 2, 3, 4, 9, 2, 3, 5, 6, 2, 3]
    assert earliest_continuation(text, 3, 4) == [4, 9, 2, 3]
    assert earliest_continuation(text, 1, 2) == [4, 9]
    assert earliest_continuation([7, 7], 3, 9) == [7]
    assert earliest_continuation([1, 2], 3, 9) == []
    assert earliest_continuation([1], 3, 9) == []


@pytest.mark.parametrize("method", [PromptLookupConfig(), PromptLookupConfig(max_ngram=1, continuation=3)])
def test_with_its_rule_ours_makes_the_passes_of_transformers(speaking: TinyModel, method: PromptLookupConfig) -> None:
    text = load_text(speaking.base, None)
    subject = load_subject(speaking.base, {}, text, "float32", CPU)
    base, gained = subject.model.base, 0
    for ends in ((), text.end_token_ids):
        reference = Reference(speaking.base, base.weight_dtype, base.dtype, base.device, ends)
        for words in ("one two one two one two", "three words one two three words", "two"):
            found = compare_prompt(subject, reference, text.prompt_ids(words), method, 40)
            assert found["identical"] == {"latest": True, "earliest": True}
            assert found["tokens"]["earliest"] == found["tokens"]["transformers"]
            assert found["passes"]["earliest"] == found["passes"]["transformers"]
            gained += found["tokens"]["earliest"] - found["passes"]["earliest"]
    assert gained > 0


def test_the_command(tmp_path: Path, speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lookup.json"
    common = ["--model-path", str(speaking.base), "--device", "cpu", "--prompts", "mtbench", "--max-new-tokens", "12"]
    command = [*common, "--output", str(output), "--limit"]
    compare_prompt_lookup.main([*command, "2"])
    first = read_records(tmp_path / "lookup.records.jsonl")
    compare_prompt_lookup.main([*command, "3"])
    records = read_records(tmp_path / "lookup.records.jsonl")
    assert records[:2] == first
    result = json.loads(output.read_text())
    assert result["prompts"] == result["prompts_of_equal_passes"] == 3
    assert result["identical"] == {"latest": 3, "earliest": 3}
    assert result["passes"] == {name: sum(record["passes"][name] for record in records) for name in result["passes"]}
    assert result["accepted_length"]["earliest"] == result["accepted_length"]["transformers"]
    shown = output.with_suffix(".md").read_text()
    assert "as many passes as transformers on 3 of 3 prompts" in shown
    assert "| ours (`prompt_lookup`) |" in shown
    capsys.readouterr()
    rewrite_records(tmp_path / "lookup.records.jsonl", [{**records[0], "identical": {"latest": False, "earliest": True}}, *records[1:]])
    with pytest.raises(SystemExit) as differs:
        compare_prompt_lookup.main([*command, "3"])
    assert differs.value.code == 1
    for more, said in ((["3", "--max-ngram", "2"], "max_ngram"), (["3", "--continuation", "0"], "continuation is 0")):
        with pytest.raises(SystemExit) as ended:
            compare_prompt_lookup.main([*command, *more])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
