"""The command that times a second turn: it runs the rows that are new, and only conversations of two turns will do."""

import json
from pathlib import Path

import pytest

from evaluation import second_turn
from tests.tiny_models import TinyModel


def test_kept_caches_leave_the_new_rows(speaking: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "second.json"
    flags = ["--model-path", str(speaking.base), "--limit", "2", "--max-new-tokens", "6", "--device", "cpu", "--output", str(output)]
    second_turn.main(flags)
    result = json.loads(output.read_text())
    assert result["from_nothing"]["rows"] == result["prompt"]
    assert 0 < result["kept"]["rows"] < result["prompt"] / 2 + 60
    assert "x sooner" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        second_turn.main([*flags, "--bench", "gsm8k"])
    assert "no question of gsm8k has a second turn" in capsys.readouterr().err
