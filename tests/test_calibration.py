"""Calibration: identity where none is stored; log-odds; its file; the command that fits it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import cats
from cats.adapter import AdapterModel
from cats.calibration import AS_IS, CALIBRATION_FILE, Calibration, calibration_in, save_calibration
from evaluation import calibrate
from tests.tiny_models import TinyModel

Tiny = Callable[[str], TinyModel]
SOME = Calibration(draft_exit=2, drafted=(0.5, 0.8), checked=(-0.1, 0.2, 0.9))
SAID = torch.tensor([-0.01, -1.0, -9.0, 0.0])


def test_scores_are_taken_as_they_are_without_a_calibration(tmp_path: Path) -> None:
    assert calibration_in(tmp_path) == AS_IS
    assert AS_IS.after_draft(SAID[:3]).tolist() == pytest.approx(SAID[:3].tolist(), rel=1e-4)
    assert AS_IS.after_check(SAID[:3] - 3, SAID[:3]).tolist() == pytest.approx(SAID[:3].tolist(), rel=1e-4)


def test_scores_are_log_probabilities_whatever_the_weights() -> None:
    scores = SOME.after_check(SAID, SAID)
    assert bool((scores <= 0).all())
    assert bool(scores.isfinite().all())
    odds = torch.log(torch.tensor(0.25 / 0.75))
    half = Calibration(checked=(0.0, 0.0, 0.5)).after_check(SAID[:1], torch.tensor([0.25]).log())
    assert float(half) == pytest.approx(float(torch.nn.functional.logsigmoid(odds / 2)))


def test_a_calibration_holds_for_the_draft_it_was_fitted_with() -> None:
    assert SOME.for_draft(2) is SOME
    assert SOME.for_draft(3) is AS_IS


def test_it_is_found_beside_the_weights_and_goes_with_them(tiny: Tiny, tmp_path: Path) -> None:
    adapter = AdapterModel.from_pretrained(tiny("llama").shallow)
    assert adapter.calibration == AS_IS
    adapter.save_pretrained(tmp_path)
    save_calibration(SOME, tmp_path, {"prompts": 3})
    assert AdapterModel.from_pretrained(tmp_path).calibration == SOME
    adapter.save_pretrained(tmp_path)
    assert AdapterModel.from_pretrained(tmp_path).calibration == AS_IS


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": "cats calibration 0"}, "its format is"),
        ({"drafted": [1.0]}, "2 and 3 finite weights"),
        ({"checked": [0.0, 1.0, float("nan")]}, "2 and 3 finite weights"),
        ({"checked": "abc"}, "could not convert"),
        ({"draft_exit": None}, "int"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    path = save_calibration(SOME, tmp_path, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(cats.CatsError, match=f"calibration.json cannot be used: .*{fault}.*fit it again, or remove it"):
        calibration_in(tmp_path)
    path.write_text('{"format": "cats calibration 1"}')
    with pytest.raises(cats.CatsError, match="lacks 'drafted'"):
        calibration_in(tmp_path)


def test_fitting_finds_the_weights_that_made_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    odds = 3 * torch.randn(20000, 2, generator=generator, dtype=torch.float64)
    columns = torch.cat([torch.ones(20000, 1, dtype=torch.float64), odds], dim=1)
    weights = torch.tensor([-1.0, 0.3, 0.7], dtype=torch.float64)
    accepted = torch.rand(20000, generator=generator, dtype=torch.float64) < torch.sigmoid(columns @ weights)
    assert calibrate.fitted(columns, accepted.double()) == pytest.approx(weights.tolist(), abs=0.06)


def test_the_command_stores_a_calibration_that_the_next_load_uses(
    speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shallow, talks = tmp_path / "shallow", tmp_path / "talks.json"
    AdapterModel.from_pretrained(speaking.shallow).save_pretrained(shallow)
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]
    talks.write_text(json.dumps([{"id": str(place), "conversations": turns} for place in range(4)]))
    places = ["--model-path", str(speaking.base), "--draft-adapter-path", str(speaking.draft), "--shallow-adapter-path", str(shallow)]
    asked = ["--prompts", str(talks), "--limit", "3", "--max-new-tokens", "12", "--device", "cpu"]
    calibrate.main([*places, *asked])
    found = json.loads((shallow / CALIBRATION_FILE).read_text())
    assert found["prompts"] == 3
    assert found["tokens"] >= 3
    assert str(shallow / CALIBRATION_FILE) in capsys.readouterr().out
    assert AdapterModel.from_pretrained(shallow).calibration.draft_exit == found["draft_exit"] > 0
