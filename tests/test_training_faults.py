"""Training commands that are killed, and training commands that are given bad files: same bits, one sentence."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.chats import items, write
from tests.tiny_models import TinyModel
from training import fine_tune_adapter, ge_data, train_finetune

ROOT = Path(__file__).resolve().parent.parent
KILLED_BETWEEN_MICRO_BATCHES = """
from training.adapter_trainer import AdapterTrainer
plain, calls = AdapterTrainer.backward, []
def backward(self, rows, sums):
    calls.append(rows)
    if len(calls) == 8:  # the second micro-batch of step 4
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, rows, sums)
AdapterTrainer.backward = backward
"""
KILLED_WHILE_SAVING = """
import torch
plain, calls = torch.save, []
def save(state, path):
    plain(state, path)
    calls.append(path)
    if len(calls) == 4:
        path.write_bytes(path.read_bytes()[:5000])
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""


def training_flags(tiny: TinyModel, outdir: Path, *more: str) -> list[str]:
    fixed = ["--model-path", str(tiny.base), "--exit-layers", "1", "3", "--outdir", str(outdir), "--length", "320"]
    return [*fixed, "--warmup", "2", "--validation-rows", "3", "--cpu", *more]


def storing_flags(tiny: TinyModel, data: Path, outdir: Path, *more: str) -> list[str]:
    fixed = ["--model-path", str(tiny.base), "--data-path", str(data), "--outdir", str(outdir), "--exit-layers", "1", "3"]
    return [*fixed, "--length", "320", "--shard-rows", "3", "--cpu", *more]


def sentence(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], argv: list[str]) -> str:
    """The one line with which a command refuses, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(KILLED_BETWEEN_MICRO_BATCHES, id="between micro-batches"),
        pytest.param(KILLED_WHILE_SAVING, id="while saving", marks=pytest.mark.slow),
    ],
)
def test_a_run_under_kill_9_ends_with_the_bits_of_the_straight_one(speaking: TinyModel, tmp_path: Path, moment: str) -> None:
    """SIGKILL in the middle of the first epoch, then the same command again."""
    data = write(tmp_path / "chats.json", 24)
    flags = ["--data-path", str(data), "--epochs", "2", "--rows", "2", "--accumulate", "2", "--save-minutes", "0", "--threads", "1"]
    train_finetune.main(training_flags(speaking, tmp_path / "straight", *flags))
    argv = training_flags(speaking, tmp_path / "killed", *flags)
    child = f"import os, signal\n{moment}\nfrom training import train_finetune\ntrain_finetune.main({argv!r})"
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    assert not (tmp_path / "killed" / "training_log.json").exists(), "the kill came after the first epoch"
    train_finetune.main(argv)
    for name in ("exit1", "exit3"):
        straight, resumed = (tmp_path / run / name / "model.safetensors" for run in ("straight", "killed"))
        assert straight.read_bytes() == resumed.read_bytes()
    logs = [json.loads((tmp_path / run / "training_log.json").read_text()) for run in ("straight", "killed")]
    assert [step["loss"] for step in logs[0]["steps"]] == [step["loss"] for step in logs[1]["steps"]]


BAD_CONVERSATIONS = {
    "[{": "cannot read conversations",
    "[]": "no conversation with a user turn and an answer",
    json.dumps([{"id": "a", "conversations": []}]): "no conversation with a user turn and an answer",
    json.dumps([{"id": "a", "conversations": [{"from": role, "value": "x"} for role in ("human", "human", "gpt")]}]): "roles out of order",
}


@pytest.mark.parametrize(("text", "expected"), BAD_CONVERSATIONS.items(), ids=["broken", "none", "empty", "order"])
def test_bad_conversations(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str) -> None:
    data = tmp_path / "bad.json"
    data.write_text(text)
    assert expected in sentence(capsys, ge_data.main, storing_flags(speaking, data, tmp_path / "states"))
    assert expected in sentence(
        capsys, train_finetune.main, training_flags(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "1")
    )


def test_empty_conversations_among_others_are_passed_over(speaking: TinyModel, tmp_path: Path) -> None:
    data = tmp_path / "some.json"
    data.write_text(json.dumps([{"id": "empty", "conversations": []}, *items(3)]))
    ge_data.main(storing_flags(speaking, data, tmp_path / "states"))
    assert len(list((tmp_path / "states").rglob("*.safetensors"))) == 1


def test_a_shard_that_is_cut_short_or_no_shard(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.json", 8)
    ge_data.main(storing_flags(speaking, data, tmp_path / "states"))
    flags = training_flags(speaking, tmp_path / "out", "--data-home", str(tmp_path / "states"), "--steps", "1")
    shard = min((tmp_path / "states").rglob("*.safetensors"))
    whole = shard.read_bytes()
    for damaged in (whole[:-100], whole[:20], b""):
        shard.write_bytes(damaged)
        assert f"{shard.name} is damaged or cut short" in sentence(capsys, train_finetune.main, flags)


def test_a_disk_that_is_too_small(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int = 10**6
        used: int = 10**6 - 1000
        free: int = 1000

    data = write(tmp_path / "chats.json", 8)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage())
    message = sentence(capsys, ge_data.main, storing_flags(speaking, data, tmp_path / "states"))
    assert "the states need 0.00 GB" in message
    assert "--outdir" in message
    assert not list((tmp_path / "states").rglob("*.safetensors"))


def test_missing_and_foreign_models_and_exits_beyond_them(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.json", 8)
    training = ["--data-path", str(data), "--steps", "1"]
    for flags, expected in (
        (["--model-path", str(tmp_path / "nowhere")], "there is no directory"),
        (["--exit-layers", "6"], "6 layers"),
        (["--template", "no_such_template"], "unknown chat template 'no_such_template'"),
    ):
        assert expected in sentence(capsys, train_finetune.main, training_flags(speaking, tmp_path / "out", *training, *flags))
    for flags, expected in (
        (["--model-path", str(tmp_path / "nowhere")], "there is no directory"),
        (["--exit-layers", "6"], "6 layers"),
        (["--template", "no_such_template"], "unknown chat template 'no_such_template'"),
    ):
        assert expected in sentence(capsys, ge_data.main, storing_flags(speaking, data, tmp_path / "states", *flags))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "there is no adapter template"),
        ({"hidden_size": 64}, "is 64 wide"),
        ({"num_key_value_heads": 4}, "asks for [32, 32]"),
        ({"model_type": "bert"}, "not a Llama configuration"),
        ("{", "cannot read the adapter template"),
    ],
    ids=["missing", "width", "heads", "family", "broken"],
)
def test_adapter_templates_that_do_not_fit(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], template: dict[str, object] | str | None, expected: str
) -> None:
    data, path = write(tmp_path / "chats.json", 8), tmp_path / "template.json"
    if template is not None:
        own = json.loads((speaking.draft / "config.json").read_text())
        path.write_text(template if isinstance(template, str) else json.dumps(own | template))
    flags = ["--data-path", str(data), "--steps", "1", "--configpath", str(path), "--init", "base"]
    assert expected in sentence(capsys, train_finetune.main, training_flags(speaking, tmp_path / "out", *flags))


def test_templates_of_the_repository_are_found_from_anywhere(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.json", 8)
    flags = ["--data-path", "chats.json", "--steps", "1", "--configpath", "data/vicuna_13B_config.json"]
    assert "is 5120 wide" in sentence(capsys, train_finetune.main, training_flags(speaking, tmp_path / "out", *flags))


def test_an_adapter_of_another_width_as_the_start(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, tiny = write(tmp_path / "chats.json", 8), ROOT / "data" / "tiny" / "adapters" / "draft_exit2"
    flags = ["--data-path", str(data), "--steps", "1", "--exit-layers", "2", "--init-adapter", str(tiny)]
    assert "is 192 wide" in sentence(capsys, train_finetune.main, training_flags(speaking, tmp_path / "out", *flags))


def test_a_template_beside_given_adapters_is_refused(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.json", 8)
    flags = ["--data-path", str(data), "--steps", "1", "--exit-layers", "1", "--init-adapter", str(speaking.draft)]
    refused = training_flags(speaking, tmp_path / "out", *flags, "--configpath", "data/vicuna_7B_config.json")
    assert "--configpath would do nothing" in sentence(capsys, train_finetune.main, refused)


def test_a_damaged_checkpoint(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "chats.json", 8)
    flags = training_flags(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "1")
    train_finetune.main(flags)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    for damaged in (whole[:-1000], b"", b"not a checkpoint"):
        checkpoint.write_bytes(damaged)
        assert "is damaged" in sentence(capsys, train_finetune.main, flags)


def test_the_driver_reads_addresses_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
        ("NUM_MACHINES", "2"),
        ("NUM_PROCESSES", "4"),
        ("NODE_RANK", "1"),
    ):
        monkeypatch.setenv(name, value)
    arguments = fine_tune_adapter.arguments_parser().parse_args(["--exit_layer", "3", "15", "--outdir", str(tmp_path), "--data_home", "d"])
    fine_tune_adapter.check_arguments(arguments)
    command = " ".join(fine_tune_adapter.launch_command(arguments, "training.train_finetune", []))
    for expected in ("--num_processes 4", "--num_machines 2", "--machine_rank 1", "--main_process_ip node0", "--main_process_port 29500"):
        assert expected in command
    monkeypatch.setenv("NODE_RANK", "2")
    flags = ["--exit_layer", "3", "--outdir", str(tmp_path), "--data_home", "d"]
    assert "do not fit" in sentence(capsys, fine_tune_adapter.main, flags)
    monkeypatch.setenv("NUM_MACHINES", "two")
    with pytest.raises(SystemExit) as caught:
        fine_tune_adapter.main(flags)
    assert caught.value.code == 2


def test_curves_alone_need_neither_model_nor_data(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CATS_BASE_MODEL", raising=False)
    data, plot = write(tmp_path / "chats.json", 8), ["--exit_layer", "1", "3", "--outdir", str(tmp_path / "out"), "--stages", "plot"]
    assert "training_log.json" in sentence(capsys, fine_tune_adapter.main, plot)
    train_finetune.main(training_flags(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "1"))
    fine_tune_adapter.main(plot)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
