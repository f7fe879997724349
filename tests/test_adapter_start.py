"""Where adapters start: never worse than chance, whatever the exit; and both kinds of block train, save, load and draft."""

import json
import math
from pathlib import Path

import pytest
import torch

import cats
from cats.adapter import BLOCK_FIELD, BLOCKS, AdapterModel
from cats.earlyexit import read_config
from cats.errors import CatsError
from tests.tiny_models import TinyModel
from training import train_finetune
from training.adapter_start import FITTED, fit_norms, starting_adapters
from training.dataset import Batch
from training.frozen_head import FrozenHead
from training.objective import Objective


@pytest.fixture
def objective(speaking: TinyModel) -> Objective:
    return Objective(FrozenHead.read(speaking.base, torch.float32, "cpu"), 5, "fp32")


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_fitted_norm_is_never_worse_than_chance(speaking: TinyModel, objective: Objective, scale: float) -> None:
    """States of an early exit in the worst case: noise, of any size; norms of ones start far above chance there."""
    torch.manual_seed(0)
    vocabulary = len(objective.head.lm_head_VD)
    objective.head.lm_head_VD = 3 * objective.head.lm_head_VD / objective.head.lm_head_VD.std()
    batch = Batch({1: scale * torch.randn(2, 60, 32)}, torch.randn(2, 60, 32), torch.ones(2, 60, dtype=torch.bool))
    losses = {}
    for init in ("fresh", *FITTED):
        adapters = starting_adapters(speaking.base, [1], init, [], 0, None)
        if init in FITTED:
            fit_norms(objective, adapters, batch, FITTED[init])
        lesson = objective.learning_target(batch)
        losses[init] = float(objective.learning_loss(adapters[1], batch.hidden[1], lesson).detach()) / len(lesson.target.probabilities)
        assert all(parameter.grad is None for parameter in adapters[1].parameters())
    assert losses["fresh"] > 1.5 * math.log(vocabulary)
    assert losses["fitted"] <= losses["fitted-prior"] <= math.log(vocabulary)
    assert losses["base-fitted"] <= math.log(vocabulary)


def test_a_decoder_block_is_llamas_and_survives_the_disk(speaking: TinyModel, tmp_path: Path) -> None:
    adapter = starting_adapters(speaking.base, [1], "fresh", [], 0, None, "decoder")[1]
    names = set(adapter.state_dict())
    assert {"layers.0.mlp.gate_proj.weight", "layers.0.post_attention_layernorm.weight"} <= names
    hidden = torch.randn(1, 7, 32)
    with torch.no_grad():
        torch.testing.assert_close(adapter(hidden), adapter.norm(hidden))  # output matrices start at zero
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        adapter.save_pretrained(tmp_path)
        again = AdapterModel.from_pretrained(tmp_path)
        torch.testing.assert_close(again(hidden), adapter(hidden), rtol=0, atol=0)
    assert again.nbytes == adapter.nbytes > AdapterModel(AdapterModel.config_for(read_config(speaking.base)), 1).nbytes


def test_a_decoder_block_drafts_losslessly(speaking: TinyModel, tmp_path: Path) -> None:
    starting_adapters(speaking.base, [1], "fresh", [], 0, None, "decoder")[1].save_pretrained(tmp_path)
    model = cats.load(speaking.base, {"draft": (tmp_path, None)})
    limits = cats.GenerationConfig(max_new_tokens=24, eos_token_ids=())
    plain, drafted = (
        cats.generate(model, [5, 6, 7, 8], cats.build_method(config), limits).ids
        for config in (cats.AutoregressiveConfig(), cats.KangarooConfig(threshold=0.0))
    )
    assert plain == drafted


def test_an_unknown_block_and_one_that_would_do_nothing_are_refused(speaking: TinyModel, tmp_path: Path) -> None:
    starting_adapters(speaking.base, [1], "fresh", [], 0, None)[1].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert BLOCK_FIELD not in json.loads(path.read_text())
    with pytest.raises(CatsError, match="--block would do nothing"):
        starting_adapters(speaking.base, [1], "fresh", [str(tmp_path)], 0, None, "decoder")
    path.write_text(json.dumps(json.loads(path.read_text()) | {BLOCK_FIELD: "moe"}))
    with pytest.raises(CatsError, match=f"must be {' or '.join(BLOCKS)}"):
        AdapterModel.from_pretrained(tmp_path)


def test_a_prior_keeps_the_gain_smaller(speaking: TinyModel, objective: Objective) -> None:
    torch.manual_seed(0)
    batch = Batch({1: torch.randn(1, 12, 32)}, torch.randn(1, 12, 32), torch.ones(1, 12, dtype=torch.bool))
    sizes = {}
    for prior in (False, True):
        adapters = starting_adapters(speaking.base, [1], "fitted", [], 0, None)
        fit_norms(objective, adapters, batch, prior)
        sizes[prior] = float(adapters[1].norm.weight.detach().norm())
    assert 0 < sizes[True] < 0.9 * sizes[False]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--topk", "0", "--samples", "64"], "--topk 0 sums over the whole vocabulary"),
        (["--init", "fresh", "--init-adapter", "somewhere"], "--init would do nothing"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    fixed = ["--model-path", str(speaking.base), "--exit-layers", "1", "--data-path", "none.json", "--outdir", str(tmp_path), "--cpu"]
    with pytest.raises(SystemExit) as refused:
        train_finetune.main([*fixed, "--steps", "1", *flags])
    assert refused.value.code == 2
    assert expected in capsys.readouterr().err
