"""`python -m evaluation.coarse_alone`: the coarse form by itself is the model of its numbers; what is compared, and the refusal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cats
from evaluation import coarse_alone
from evaluation.coarse_alone import coarse_answer, report, result_of
from tests.tiny_models import EOS, TinyModel, prompts
from tests.weight_kinds import of_kind, options_of, rewritten

CONFIG = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=(EOS,))


def coarse_numbers(base: Path, directory: Path) -> Path:
    """A plain checkpoint of the numbers that the coarse form of the kind "sum" has."""
    plain = rewritten(base, "plain", directory)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if ".layers." in name and name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.bfloat16).float()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    return plain


@pytest.mark.parametrize("memory", [cats.MemoryOptions(), cats.MemoryOptions(pinning=False)], ids=["resident", "streamed"])
def test_it_is_the_model_of_the_coarse_numbers(
    tiny: Callable[[str], TinyModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: cats.MemoryOptions
) -> None:
    """Prompts in several pieces, and nothing streamed."""
    monkeypatch.setattr("evaluation.coarse_alone.PREFILL_ROWS", 4)
    base = tiny("llama").base
    model, rounded = cats.load(of_kind(base, "sum"), memory=options_of("sum", memory)), cats.load(coarse_numbers(base, tmp_path))
    differing = 0
    for prompt in prompts(count=4, longest=12, seed=5):
        before = model.base.source.streamer.bytes_taken if model.base.source.streamer else 0
        found, speed = coarse_answer(model, prompt, CONFIG)
        assert found == cats.generate(rounded, prompt, "autoregressive", CONFIG).ids
        assert speed.tokens == len(found) - 1
        assert (model.base.source.streamer.bytes_taken if model.base.source.streamer else 0) == before
        differing += found != cats.generate(model, prompt, cats.NestedConfig(), CONFIG).ids
    assert differing < 4


def test_the_command_compares(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, output = tmp_path / "questions.jsonl", tmp_path / "result.json"
    asked = [{"question_id": place, "category": "talk", "turns": [f"Say {word}."]} for place, word in enumerate(("one", "two", "three"))]
    questions.write_text("".join(json.dumps(question) + "\n" for question in asked))
    flags = ["--model-path", str(speaking.base), "--prompts", str(questions), "--limit", "2", "--max-new-tokens", "8", "--device", "cpu"]
    coarse_alone.main([*flags, "--coarse", "int8", "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["answers"] == 2
    assert len(result["records"]) == 2
    assert result["settings"]["max_new_tokens"] == 8
    assert "of 2 answers differ from the exact model's" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        coarse_alone.main(flags)
    assert ended.value.code == 2
    assert "this checkpoint has none; convert it" in capsys.readouterr().err


def test_what_is_reported() -> None:
    fast, slow = {"tokens": 10, "seconds": 1.0}, {"tokens": 10, "seconds": 4.0}
    records = [{"tokens": 11, "first_difference": place, "coarse": fast, "exact": slow} for place in (None, 4, 7, None)]
    result = result_of(records)
    assert (result["share_differing"], result["median_first_difference"], result["earliest_difference"]) == (0.5, 5.5, 4)
    assert report(result).splitlines() == [
        "the coarse model alone: 10.00 tokens/s; exact answers, drafted by it: 2.50 tokens/s",
        "2 of 4 answers differ from the exact model's (50%); tokens that agree before the first that differs: "
        "5.5 (median), 4 at the earliest",
    ]
    none = {"tokens": 0, "seconds": 0.0}
    one = result_of([{"tokens": 1, "first_difference": None, "coarse": none, "exact": none}])
    assert "no tokens behind the first" in report(one)
