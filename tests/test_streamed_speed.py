"""`python -m evaluation.streamed_speed`: methods by speed, plain decoding first, what was not measured as a dash; the picture."""

import json
from pathlib import Path

import pytest

from evaluation import streamed_speed


def result(path: Path, link: str, **speeds: float) -> str:
    methods = {
        label: {"accepted_length": 2 * speed, "tokens_per_second": speed, "tokens_per_second_interval": [speed - 0.1, speed + 0.1]}
        for label, speed in speeds.items()
    }
    path.write_text(json.dumps({"link": link, "methods": methods}))
    return str(path)


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = result(tmp_path / "disk.json", "this disk, 2.63 GB/s", autoregressive=9.0, kangaroo=8.0, medusa=7.0)
    slow = result(tmp_path / "slow.json", "emulated 0.10 GB/s", autoregressive=1.0, kangaroo=1.5, medusa=1.25)
    nested = result(tmp_path / "nested.json", "this disk, 2.58 GB/s", autoregressive=10.0, nested=20.0)
    picture = tmp_path / "picture.png"
    streamed_speed.main(["--published", disk, slow, "--nested", nested, "--picture", str(picture)])
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert head == ["weights", "method", "accepted length", "this disk", "emulated 0.10 GB/s"]
    assert rows == [
        ["published", "plain decoding", "18.00", "9.00", "1.00"],
        ["published", "Medusa", "14.00", "7.00", "1.25"],
        ["published", "Kangaroo", "16.00", "8.00", "1.50"],
        ["nested", "plain decoding", "20.00", "10.00", "-"],
        ["nested", "nested, chain of 20", "40.00", "20.00", "-"],
    ]
    assert picture.stat().st_size > 0


def test_a_file_of_another_command_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    with pytest.raises(SystemExit) as stopped:
        streamed_speed.main(["--published", str(other)])
    assert stopped.value.code == 2
    assert "other.json is no result of evaluation.benchmarks.streaming" in capsys.readouterr().err
