"""Result files of training on a tiny random model: curves over tokens, and the benchmark of its speed."""

import json
from pathlib import Path

import pytest

from cats.adapter import AdapterModel
from evaluation.benchmarks import training as benchmark_training
from tests.chats import write
from tests.tiny_models import TinyModel
from training import curves, train_finetune


def test_curves_of_two_blocks(speaking: TinyModel, tmp_path: Path) -> None:
    data = write(tmp_path / "chats.json", 16)
    fixed = ["--model-path", str(speaking.base), "--exit-layers", "1", "3", "--data-path", str(data), "--rows", "4", "--cpu"]
    fixed += ["--steps", "4", "--report-steps", "2", "--validation-rows", "3"]
    for block in ("attention", "decoder"):
        flags = [
            *fixed,
            "--outdir",
            str(tmp_path / block),
            "--block",
            block,
            "--steps",
            "4",
            "--report-steps",
            "2",
            "--validation-rows",
            "3",
        ]
        train_finetune.main(flags)
    logs = [str(tmp_path / block / "training_log.json") for block in ("attention", "decoder")]
    curves.main([*logs, "--output", str(tmp_path / "curves.json")])
    attention, decoder = json.loads((tmp_path / "curves.json").read_text())["runs"]
    assert (attention["block"], decoder["block"]) == ("attention", "decoder")
    points = attention["exits"]["1"]["points"]
    assert [point["step"] for point in points] == [0, 2, 4]
    assert 0 == points[0]["tokens"] < points[1]["tokens"] < points[2]["tokens"]
    assert points[2]["positions"] < points[2]["tokens"]
    held = 2 * sum(weight.numel() for weight in AdapterModel.from_pretrained(tmp_path / "attention" / "exit1").parameters())
    assert decoder["exits"]["1"]["bytes_bf16"] > attention["exits"]["1"]["bytes_bf16"] == held
    assert (tmp_path / "curves.md").read_text().count("\n| ") == 1 + 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_logs_without_points_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "training_log.json"
    for content, expected in (({"reports": []}, "no validation yet"), ({"reports": [{"step": 1}]}, "how many tokens")):
        log.write_text(json.dumps(content))
        with pytest.raises(SystemExit) as caught:
            curves.main([str(log), "--output", str(tmp_path / "curves.json")])
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err


def test_the_benchmark_times_in_turns_and_checks_the_normaliser(speaking: TinyModel, tmp_path: Path) -> None:
    data = write(tmp_path / "chats.json", 16)
    fixed = ["--model-path", str(speaking.base), "--data-path", str(data), "--exit-layers", "1", "3", "--rows", "3", "--length", "200"]
    benchmark_training.main([*fixed, "--rounds", "2", "--output", str(tmp_path / "speed.json")])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert set(found["speed"]) == {"forward", "on the fly, sampled", "on the fly, full", "stored"}
    assert found["tokens_per_step"] == 600 > found["answer_tokens_per_step"] > 0
    for figures in found["speed"].values():
        assert len(figures["seconds"]) == 2
    for figures in found["normaliser"].values():  # a vocabulary this small is always summed whole
        assert figures["difference"] == pytest.approx(0, abs=1e-5)
        assert figures["gradient_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["environment"]["torch"]
