"""Medusa heads: what they learn and where, training and resuming, and what is written and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from cats.errors import CatsError
from cats.medusa_heads import HeadsShape, MedusaHeads, read_accuracy
from tests.chats import write
from tests.tiny_models import TinyModel
from training import ge_data, train_heads
from training.dataset import Batch
from training.frozen_head import FrozenHead
from training.head_objective import HeadObjective, reaching_positions
from training.head_trainer import HeadTrainer


class KilledError(Exception):
    """What ends a run in the middle of an epoch here."""


def arguments(model: TinyModel, outdir: Path, *more: str) -> list[str]:
    fixed = ["--model-path", str(model.base), "--outdir", str(outdir), "--rows", "4", "--length", "320", "--heads", "3"]
    return [*fixed, "--warmup", "2", "--validation-rows", "3", "--cpu", "--lr", "0.02", *more]


def built(model: TinyModel, outdir: Path, *more: str) -> HeadTrainer:
    parsed = train_heads.arguments_parser().parse_args(arguments(model, outdir, *more))
    return train_heads.build_trainer(parsed, train_heads.run_of(parsed), Accelerator(cpu=True))


def log_of(outdir: Path) -> dict[str, Any]:
    return json.loads((outdir / "training_log.json").read_text())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.json", 24)


@pytest.mark.parametrize("own", [(), ("--own-head",)], ids=["shared", "own"])
def test_training_lowers_every_heads_loss_and_writes_them(speaking: TinyModel, data: Path, tmp_path: Path, own: tuple[str, ...]) -> None:
    train_heads.main(arguments(speaking, tmp_path / "out", "--data-path", str(data), "--epochs", "4", *own))
    log = log_of(tmp_path / "out")
    for head in "123":
        losses = [entry["loss"][head] for entry in log["steps"]]
        assert sum(losses[-4:]) < sum(losses[:4])
    figures = log["reports"][-1]["validation"]
    assert list(figures) == ["1", "2", "3"]
    assert figures["1"]["top1"] <= figures["1"]["top10"] <= 1
    assert figures["1"]["positions"] > figures["2"]["positions"] > figures["3"]["positions"] > 0
    tensors = load_file(tmp_path / "out" / "heads" / "model.safetensors")
    names = {"heads", "lm_heads"} if own else {"heads"}
    assert tensors.keys() == {f"{name}.{place}.weight" for name in names for place in range(3)}
    table = read_accuracy(tmp_path / "out" / "heads", 3)
    assert table is not None
    assert [sum(row) for row in table] == pytest.approx([figures[head]["top10"] for head in "123"])
    assert str(tmp_path) not in (tmp_path / "out" / "heads" / "PROVENANCE.json").read_text()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_ends_with_the_bits_of_the_straight_one(speaking: TinyModel, data: Path, tmp_path: Path, optimizer: str) -> None:
    flags = ["--data-path", str(data), "--epochs", "2", "--save-minutes", "0", "--optimizer", optimizer, "--samples", "4"]
    train_heads.main(arguments(speaking, tmp_path / "straight", *flags))

    def kill(entry: dict[str, Any]) -> None:
        if entry["step"] == 3:
            raise KilledError

    killed = built(speaking, tmp_path / "killed", *flags)
    assert killed.steps_per_epoch > 3
    with pytest.raises(KilledError):
        killed.train(kill)
    train_heads.main(arguments(speaking, tmp_path / "killed", *flags))
    ends = [(tmp_path / run / "heads" / "model.safetensors").read_bytes() for run in ("straight", "killed")]
    assert ends[0] == ends[1]
    with pytest.raises(CatsError, match="another decay"):
        built(speaking, tmp_path / "killed", *flags, "--decay", "0.5")


def test_stored_states_teach_what_the_base_teaches_on_the_fly(speaking: TinyModel, data: Path, tmp_path: Path) -> None:
    stored = ["--model-path", str(speaking.base), "--data-path", str(data), "--length", "320", "--exit-layers", "1", "--cpu"]
    ge_data.main([*stored, "--outdir", str(tmp_path / "states"), "--store-dtype", "float32"])
    train_heads.main(arguments(speaking, tmp_path / "stored", "--data-home", str(tmp_path / "states"), "--steps", "4"))
    flying = ["--data-path", str(data), "--rows-from", "conversations", "--steps", "4"]
    train_heads.main(arguments(speaking, tmp_path / "fly", *flying))
    losses = [[entry["loss"]["2"] for entry in log_of(tmp_path / run)["steps"]] for run in ("stored", "fly")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_head_counts_where_all_tokens_up_to_its_own_are_answers() -> None:
    counted_BN = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0]], dtype=torch.bool)
    reach = reaching_positions(counted_BN, (1, 2))
    assert reach[0][0].nonzero()[:, 0].tolist() == [1, 2, 3, 5]
    assert reach[1][0].nonzero()[:, 0].tolist() == [1, 2]
    assert reach[2][0].nonzero()[:, 0].tolist() == [1]


def test_loss_and_targets_are_those_of_a_plain_cross_entropy() -> None:
    torch.manual_seed(0)
    frozen = FrozenHead(torch.rand(8) + 0.5, 1e-5, torch.randn(40, 8))
    heads = MedusaHeads(HeadsShape(2, 8, 40))
    for head in heads.heads:
        torch.nn.init.normal_(head.weight)  # type: ignore[arg-type]
    ids, final = torch.randint(0, 40, (1, 9)), torch.randn(1, 9, 8)
    counted = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    objective = HeadObjective(heads, frozen, "fp32", samples=0)
    lesson = objective.lesson(Batch({}, final, counted, ids_BN=ids), samples=0)
    x = torch.nn.functional.rms_norm(final[0, 2:5], (8,), frozen.norm_D, 1e-5)  # before the answer's tokens 3, 4, 5, each with one more
    logits = (x + torch.nn.functional.silu(heads.heads[0](x))) @ frozen.lm_head_VD.T
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, 4:7], reduction="sum")
    assert float(objective.learning_loss(1, lesson).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert lesson.targets[2].tolist() == ids[0, 5:7].tolist()


def test_heads_that_are_not_what_their_configuration_says_are_refused(tmp_path: Path) -> None:
    heads = MedusaHeads(HeadsShape(2, 8, 40))
    heads.save_pretrained(tmp_path, torch.float32)
    assert MedusaHeads.from_pretrained(tmp_path).shape == heads.shape
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, said in (
        ({"heads": 3}, r"heads\.2\.weight"),
        ({"hidden_size": 16}, r"heads\.0\.weight"),
        ({"heads": "two"}, "whole numbers"),
        ({"own_head": True}, r"lm_heads\.0\.weight"),
        ({"own_head": True, "vocab_size": None}, "whole numbers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CatsError, match=said):
            MedusaHeads.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CatsError, match=r"config\.json"):
        MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("table", [[[0.5]], [[0.5], []], [[0.5], [1.5]], "no"])
def test_a_damaged_accuracy_table_is_refused(tmp_path: Path, table: object) -> None:
    assert read_accuracy(tmp_path, 2) is None
    (tmp_path / "accuracy.json").write_text(json.dumps({"accuracy": table}))
    with pytest.raises(CatsError, match="each of the 2 heads"):
        read_accuracy(tmp_path, 2)
