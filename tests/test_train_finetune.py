"""Adapter training: stored and on the fly, resuming, accumulation, guards, and what it writes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from cats.adapter import AdapterModel
from cats.errors import CatsError
from tests.chats import write
from tests.tiny_models import TinyModel
from training import fine_tune_adapter, ge_data, train_finetune
from training.adapter_run import AdapterRun
from training.adapter_trainer import AdapterTrainer
from training.adapter_update import SKIPPED_IN_A_ROW, AdapterUpdate
from training.dataset import batch_order

ROOT = Path(__file__).resolve().parent.parent


def arguments(tiny: TinyModel, outdir: Path, *more: str) -> list[str]:
    fixed = ["--model-path", str(tiny.base), "--exit-layers", "1", "3", "--outdir", str(outdir), "--rows", "4", "--length", "320"]
    return [*fixed, "--warmup", "2", "--validation-rows", "3", "--cpu", *more]


def log_of(outdir: Path) -> dict[str, Any]:
    return json.loads((outdir / "training_log.json").read_text())


def losses(outdir: Path, exit_layer: int = 1) -> list[float]:
    return [entry["loss"][str(exit_layer)] for entry in log_of(outdir)["steps"]]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AdapterModel.from_pretrained(directory).state_dict()


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended with the same bits."""
    for name in ("exit1", "exit3"):
        assert (one / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.json", 24)


def built(tiny: TinyModel, outdir: Path, *more: str) -> AdapterTrainer:
    """A trainer as the command line builds it."""
    parsed = train_finetune.arguments_parser().parse_args(arguments(tiny, outdir, *more))
    return train_finetune.build_trainer(parsed, train_finetune.run_of(parsed), Accelerator(cpu=True))


def test_training_lowers_the_loss_and_writes_loadable_adapters(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    argv = arguments(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "30", "--names", "draft", "shallow", "--bin")
    argv += ["--save-dtype", "bfloat16"]
    train_finetune.main(argv)
    found = losses(tmp_path / "out")
    assert len(found) == 30
    assert sum(found[-5:]) < sum(found[:5])
    log = log_of(tmp_path / "out")
    assert log["reports"][-1]["step"] == 30
    figures = log["reports"][-1]["validation"]["3"]
    assert set(figures) == {"loss", "acceptance", "top1", "top2", "top3", "top5", "accepted_length", "positions"}
    assert 0 < figures["acceptance"] <= 1 <= figures["accepted_length"] <= 6
    assert AdapterModel.from_pretrained(tmp_path / "out" / "draft").exit_layer == 1
    stored = torch.load(tmp_path / "out" / "shallow" / "pytorch_model.bin", weights_only=True)
    assert stored.keys() == weights(tmp_path / "out" / "shallow").keys()
    assert {tensor.dtype for tensor in (*stored.values(), *weights(tmp_path / "out" / "shallow").values())} == {torch.bfloat16}
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    assert str(tmp_path) not in (tmp_path / "out" / "draft" / "PROVENANCE.json").read_text()


def test_reports_on_the_way_change_nothing_and_survive_a_kill(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    flags = ["--data-path", str(data), "--steps", "5"]
    train_finetune.main(arguments(speaking, tmp_path / "plain", *flags))

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        built(speaking, tmp_path / "often", *flags, "--report-steps", "2").train(kill)
    train_finetune.main(arguments(speaking, tmp_path / "often", *flags, "--report-steps", "2"))
    assert_same(tmp_path / "plain", tmp_path / "often")
    log = log_of(tmp_path / "often")
    assert [report["step"] for report in log["reports"]] == [0, 2, 4, 5]
    for report in log["reports"]:
        done = log["steps"][: report["step"]]
        assert (report["tokens"], report["positions"]) == tuple(sum(step[name] for step in done) for name in ("tokens", "positions"))
    assert 0 < log["reports"][-1]["positions"] < log["reports"][-1]["tokens"] <= 5 * 4 * 320


def test_the_log_counts_stored_tokens_alike(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    common = ["--model-path", str(speaking.base), "--data-path", str(data), "--length", "320", "--exit-layers", "1", "3", "--cpu"]
    ge_data.main([*common, "--outdir", str(tmp_path / "states"), "--shard-rows", "5"])
    train_finetune.main(arguments(speaking, tmp_path / "stored", "--data-home", str(tmp_path / "states"), "--epochs", "1"))
    train_finetune.main(arguments(speaking, tmp_path / "fly", "--data-path", str(data), "--rows-from", "conversations", "--epochs", "1"))
    seen = [{name: log_of(tmp_path / kind)["reports"][-1][name] for name in ("tokens", "positions")} for kind in ("stored", "fly")]
    assert seen[0] == seen[1]
    assert log_of(tmp_path / "fly")["adapter_parameters"]["1"] == sum(
        tensor.numel() for tensor in weights(tmp_path / "fly" / "exit1").values()
    )


def test_stored_and_on_the_fly_give_the_same_losses(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    common = ["--model-path", str(speaking.base), "--data-path", str(data), "--length", "320", "--exit-layers", "1", "3", "--cpu"]
    ge_data.main([*common, "--outdir", str(tmp_path / "states"), "--store-dtype", "float32", "--shard-rows", "5"])
    ge_data.main([*common, "--outdir", str(tmp_path / "halves")])
    bound = ["--steps", "8", "--init", "fresh"]  # a fitted norm magnifies the last bits in which the two sources differ
    train_finetune.main(arguments(speaking, tmp_path / "stored", "--data-home", str(tmp_path / "states"), *bound))
    train_finetune.main(arguments(speaking, tmp_path / "half", "--data-home", str(tmp_path / "halves"), *bound))
    flying = ["--data-path", str(data), "--rows-from", "conversations", *bound]
    train_finetune.main(arguments(speaking, tmp_path / "fly", *flying))
    for exit_layer in (1, 3):
        assert losses(tmp_path / "stored", exit_layer) == pytest.approx(losses(tmp_path / "fly", exit_layer), abs=1e-5)
        assert losses(tmp_path / "half", exit_layer) == pytest.approx(losses(tmp_path / "fly", exit_layer), abs=0.02)
    reports = [log_of(tmp_path / name)["reports"][-1]["validation"]["1"] for name in ("stored", "fly")]
    assert reports[0] == pytest.approx(reports[1], abs=1e-5)


class KilledError(Exception):
    """What ends a run in the middle of an epoch here."""


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_ends_with_the_bits_of_the_straight_one(speaking: TinyModel, data: Path, tmp_path: Path, optimizer: str) -> None:
    flags = ["--data-path", str(data), "--epochs", "2", "--optimizer", optimizer, "--save-minutes", "0", "--clip", "0.5"]
    train_finetune.main(arguments(speaking, tmp_path / "straight", *flags))

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            raise KilledError

    killed = built(speaking, tmp_path / "killed", *flags)
    assert killed.steps_per_epoch > 3
    with pytest.raises(KilledError):
        killed.train(kill)
    train_finetune.main(arguments(speaking, tmp_path / "killed", *flags))
    assert_same(tmp_path / "straight", tmp_path / "killed")
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")


def test_epoch_by_epoch_is_the_straight_run(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    flags = ["--data-path", str(data), "--epochs", "2"]
    train_finetune.main(arguments(speaking, tmp_path / "straight", *flags))
    for epoch in ("1", "2"):
        train_finetune.main(arguments(speaking, tmp_path / "pieces", *flags, "--stop-epoch", epoch))
        assert len(log_of(tmp_path / "pieces")["reports"]) == int(epoch)
    assert_same(tmp_path / "straight", tmp_path / "pieces")


def test_accumulation_is_a_bigger_batch(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    flags = ["--data-path", str(data), "--epochs", "2", "--optimizer", "muon"]
    train_finetune.main(arguments(speaking, tmp_path / "big", *flags))
    train_finetune.main(arguments(speaking, tmp_path / "small", *flags, "--rows", "1", "--accumulate", "4"))
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "big"), abs=1e-4)
    one, other = (weights(tmp_path / name / "exit3") for name in ("big", "small"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=1e-2)


def test_exits_together_train_as_each_alone(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    flags = ["--data-path", str(data), "--steps", "4"]
    train_finetune.main(arguments(speaking, tmp_path / "both", *flags))
    train_finetune.main([*arguments(speaking, tmp_path / "alone", *flags), "--exit-layers", "3"])
    one, other = (weights(tmp_path / name / "exit3") for name in ("both", "alone"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_given_adapters_are_the_start(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    flags = ["--data-path", str(data), "--steps", "1", "--lr", "0", "--init-adapter", str(speaking.draft), str(speaking.shallow)]
    train_finetune.main(arguments(speaking, tmp_path / "out", *flags))
    one, other = weights(tmp_path / "out" / "exit3"), weights(speaking.shallow)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_float32(speaking: TinyModel, data: Path, tmp_path: Path, precision: str) -> None:
    flags = ["--data-path", str(data), "--steps", "4"]
    train_finetune.main(arguments(speaking, tmp_path / "whole", *flags))
    train_finetune.main(arguments(speaking, tmp_path / "half", *flags, "--precision", precision))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "half" / "exit1").values())


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(speaking: TinyModel) -> None:
    adapter = AdapterModel.from_pretrained(speaking.draft).requires_grad_(True)
    update = AdapterUpdate(adapter, AdapterRun((1,), steps=1), Accelerator(cpu=True), "exit 1")
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}

    def step(value: float) -> float:
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, value)
        return update.step(1.0, 1.0)

    for _ in range(SKIPPED_IN_A_ROW - 1):
        assert not math.isfinite(step(math.nan))
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state_dict().items())
    with pytest.raises(CatsError, match="not finite for 25 steps"):
        step(math.inf)
    update.skipped = 0
    assert math.isfinite(step(1.0))
    assert not torch.equal(before["norm.weight"], adapter.norm.weight)


def test_batches_are_of_rows_of_like_length_and_hold_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 1001)
    order = batch_order(lengths, 12, epoch=3, seed=5)
    assert sorted(order) == list(range(1001))
    batches = [lengths[order[start : start + 12]] for start in range(0, 1001, 12)]
    assert sum(len(batch) * batch.max() for batch in batches) < 1.1 * lengths.sum()  # rows as they come: 1.72 times as much
    firsts = [int(batch[0]) for batch in batches]
    assert firsts != sorted(firsts)
    assert (order == batch_order(lengths, 12, 3, 5)).all()
    assert (order != batch_order(lengths, 12, 4, 5)).any()


def test_the_schedule_counts_optimizer_steps() -> None:
    run = AdapterRun((1,), steps=10, warmup=4, schedule="linear")
    scales = [run.lr_scale(step, run.progress(step, 0.0, 5)) for step in range(10)]
    assert scales[:4] == pytest.approx([0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7])
    assert scales[-1] == pytest.approx(0.1)
    assert run.progress(3, 1e9, 5) == 0.3
    assert AdapterRun((1,), epochs=3).last_step(7) == 21
    assert AdapterRun((1,), hours=1.0).progress(5, 1800.0, 7) == 0.5
    assert AdapterRun((1,), steps=4, schedule="cosine", warmup=0).lr_scale(2, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", "1"], "--data-path"),
        (["--data-path", "{data}", "--data-home", "x", "--steps", "1"], "either --data-path"),
        (["--data-path", "{data}"], "no end"),
        (["--data-path", "missing.json", "--steps", "1"], "missing.json"),
        (["--data-path", "{data}", "--steps", "1", "--exit-layers", "6"], "below the 6 layers"),
        (["--data-path", "{data}", "--steps", "1", "--exit-layers", "2", "2"], "distinct"),
        (["--data-path", "{data}", "--steps", "1", "--length", "2000"], "1024 positions"),
        (["--data-path", "{data}", "--steps", "1", "--names", "one"], "1 names for 2 exits"),
        (["--data-path", "{data}", "--steps", "1", "--lr", "nan"], "--lr"),
        (["--data-path", "{data}", "--steps", "1", "--init-adapter", "{draft}"], "1 directories for 2 exits"),
        (["--data-path", "{data}", "--steps", "1", "--init-adapter", "{shallow}", "{shallow}"], "trained at exit 3, not 1"),
        (["--data-path", "{data}", "--steps", "1", "--configpath", "data/vicuna_7B_config.json", "--init", "fresh"], "4096 wide"),
        (["--data-home", "nowhere", "--steps", "1"], "no stored states"),
        (["--data-home", "nowhere", "--template", "llama-2", "--steps", "1"], "--template was decided"),
    ],
)
def test_bad_input_is_one_sentence(
    speaking: TinyModel,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(ROOT)
    filled = [flag.format(data=data, draft=speaking.draft, shallow=speaking.shallow) for flag in flags]
    with pytest.raises(SystemExit) as caught:
        train_finetune.main(arguments(speaking, tmp_path / "out", *filled))
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_checkpoint_of_another_run_is_refused(
    speaking: TinyModel, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_finetune.main(arguments(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "2"))
    with pytest.raises(SystemExit):
        train_finetune.main(arguments(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "2", "--topk", "5", "--lr", "0.1"))
    assert "another topk, lr" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_finetune.main(arguments(speaking, tmp_path / "out", "--data-path", str(data), "--steps", "2", "--block", "decoder"))
    assert "another block" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters", "context", "epsilon"),
    [
        ("vicuna_7B", 67_117_056, 2048, 1e-6),
        ("vicuna_13B", 104_867_840, 2048, 1e-6),
        ("llama2_7B", 67_117_056, 4096, 1e-5),
        ("llama2_13B", 104_867_840, 4096, 1e-5),
    ],
)
def test_templates_describe_the_published_models(name: str, parameters: int, context: int, epsilon: float) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_json_file(ROOT / "data" / f"{name}_config.json")
    with torch.device("meta"):
        adapter = AdapterModel(config, 3)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == parameters
    assert (config.num_hidden_layers, config.vocab_size) == (1, 32000)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (context, epsilon)
    assert config.rope_parameters is not None
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_the_driver_refuses_before_it_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--exit_layer", "1", "--model-path", "m", "--outdir", str(tmp_path)]
    for flags, expected in (
        ([], "nothing to train on"),
        (["--data_home", "d", "--start_epoch", "3", "--end_epoch", "3"], "below --end_epoch"),
        (["--data_home", "d", "--start_epoch", "1"], "start from epoch 0"),
        (["--data_home", "d", "--num_machines", "2"], "MASTER_ADDR"),
        (["--data_home", "d", "--stages", "store"], "stage store needs --data_path"),
    ):
        with pytest.raises(SystemExit) as caught:
            fine_tune_adapter.main([*common, *flags])
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(speaking: TinyModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver, from another directory, through `accelerate launch` with gloo; then its curves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train_finetune.main(
        arguments(speaking, tmp_path / "one", "--data-path", str(data), "--epochs", "1", "--rows", "2", "--accumulate", "2")
    )
    driver = ["--exit_layer", "1", "3", "--model-path", str(speaking.base), "--data-path", "chats.json", "--cpu", "--end_epoch", "1"]
    extra = ["--rows", "2", "--length", "320", "--warmup", "2", "--validation-rows", "3"]
    fine_tune_adapter.main([*driver, "--outdir", "two", "--num_processes", "2", "--", *extra])
    assert log_of(tmp_path / "two")["processes"] == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert (tmp_path / "two" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_driver_honours_the_exit_status(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--exit_layer", "1", "--model-path", str(speaking.base), "--outdir", str(tmp_path / "out"), "--cpu", "--end_epoch", "1"]
    with pytest.raises(SystemExit) as caught:
        fine_tune_adapter.main([*common, "--data-path", str(tmp_path / "missing.json")])
    assert caught.value.code == 2
    assert "training of epoch 0 ended with exit status" in capsys.readouterr().err
