"""The comparison of starts on a tiny random model: its figures, going on, and what it refuses."""

import json
import math
from pathlib import Path

import pytest

from tests.chats import write
from tests.tiny_models import TinyModel
from training import compare_starts, ge_data
from training.adapter_run import INITS

EXTRA = ["--", "--rows", "4", "--length", "320", "--warmup", "1", "--validation-rows", "3", "--cpu"]


@pytest.fixture
def flags(speaking: TinyModel, tmp_path: Path) -> list[str]:
    data = write(tmp_path / "chats.json", 16)
    shared = ["--model-path", str(speaking.base), "--exit-layers", "1", "3"]
    ge_data.main([*shared, "--data-path", str(data), "--outdir", str(tmp_path / "states"), "--length", "320", "--targets", "20", "--cpu"])
    work = ["--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "starts.json"), "--at", "0", "2", "4"]
    return [*shared, "--data-home", str(tmp_path / "states"), *work]


def test_every_start_at_every_step_and_again(speaking: TinyModel, flags: list[str], tmp_path: Path) -> None:
    compare_starts.main([*flags, "--starts", "fitted", *EXTRA])
    log = tmp_path / "work" / "fitted" / "training_log.json"
    stamp = log.stat().st_mtime_ns
    compare_starts.main([*flags, *EXTRA])
    assert log.stat().st_mtime_ns == stamp
    found = json.loads((tmp_path / "starts.json").read_text())
    assert list(found["starts"]) == list(INITS)
    assert found["uniform_loss"] == pytest.approx(math.log(json.loads((speaking.base / "config.json").read_text())["vocab_size"]))
    for reports in found["starts"].values():
        assert [report["step"] for report in reports] == [0, 2, 4]
        assert all(1 <= report["validation"]["3"]["accepted_length"] <= 6 for report in reports)
    lines = (tmp_path / "starts.md").read_text().splitlines()
    assert sum(line.startswith(("| 1 | ", "| 3 | ")) for line in lines) == 2 * len(INITS)
    assert str(tmp_path) not in (tmp_path / "starts.json").read_text()


def test_what_would_make_the_comparison_unfair_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in (
        ([*flags, *EXTRA, "--steps", "9"], "--steps is decided by this command"),
        ([*flags, "--data-path", "x.json", *EXTRA], "either --data-home"),
        ([*flags, "--at", "0", *EXTRA], "one of them above 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            compare_starts.main(argv)
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err
    compare_starts.main([*flags, "--starts", "fresh", *EXTRA])
    with pytest.raises(SystemExit):
        compare_starts.main([*flags, "--starts", "fresh", *EXTRA, "--lr", "0.1"])
    assert "was begun with" in capsys.readouterr().err
