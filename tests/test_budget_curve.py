"""`evaluation.benchmarks.budget_curve`: methods that fit are measured at each budget, once, the others left out by name; the picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cats.nested import conversion
from evaluation.benchmarks import budget_curve
from evaluation.record_file import read_records
from tests.tiny_models import TinyModel
from tests.weight_kinds import rewritten


@pytest.fixture(scope="module")
def published(speaking: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speaking model in bfloat16; the nested one made of it lies beside it."""
    folder = tmp_path_factory.mktemp("curve")
    published = rewritten(speaking.base, "plain", folder / "published", torch.bfloat16)
    for path in speaking.base.iterdir():
        if not (published / path.name).exists():
            shutil.copy(path, published)
    conversion.convert(conversion.conversion_of(published, folder / "nested"))
    return published


def test_budgets_are_measured_once_and_drawn(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "curve.json"
    nested = ["--nested-model-path", str(published.parent / "nested")]
    command = ["--model-path", str(published), "--methods", "prompt_lookup", "nested_adaptive", "--questions", "2", "--max-new-tokens", "6"]
    command += ["--output", str(output), "--flash-bandwidth", "20MB/s"]
    work, made = budget_curve.measured, list[int]()

    def counting(args: Any, field: Any, budget: int) -> Any:
        made.append(budget)
        return work(args, field, budget)

    monkeypatch.setattr(budget_curve, "measured", counting)
    budget_curve.main([*command, *nested, "--budgets", "60KB", "1MB"])
    budget_curve.main([*command, *nested, "--budgets", "1MB", "60KB", "70KB"])
    assert made == [60_000, 1_000_000, 70_000]
    budgets = json.loads(output.read_text())["budgets"]
    assert [record["budget_bytes"] for record in budgets] == [60_000, 70_000, 1_000_000]
    assert {label for record in budgets for label in record["left_out"]} == {"nested_adaptive"}
    assert "the weights need at least" in budgets[0]["left_out"]["nested_adaptive"]
    whole = budgets[-1]["methods"]
    assert list(whole) == ["autoregressive", "prompt_lookup", "nested_adaptive"]
    assert budgets[0]["methods"]["autoregressive"]["streamed_bytes_per_cycle"] > 0
    assert whole["autoregressive"]["streamed_bytes_per_cycle"] == 4096  # the page of a token's row of the table
    assert all(0 < row["tokens_per_second"] <= row["bound_tokens_per_second"] * 1.001 for row in whole.values())
    assert whole["nested_adaptive"]["hidden_drafting"]["speed_up_by_longer_chains"] == 1, "nothing waits"
    assert whole["autoregressive"]["hidden_drafting"] is None
    assert output.with_suffix(".png").stat().st_size > 0
    assert len(read_records(output.with_suffix(".records.jsonl"))) == 3
    capsys.readouterr()
    budget_curve.main(["--output", str(output), "--merge"])
    assert "| does not fit |" in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model-path", str(published), "--output", str(tmp_path / "curve.json")]
    for more, said in (
        (["--methods", "nested", "--budgets", "1MB"], "and --nested-model-path belong together"),
        (["--methods", "prompt_lookup"], "give --budgets"),
        (["--methods", "prompt_lookup", "--budgets", "1KB"], "plain decoding does not fit 1 KB"),
        (["--merge"], "holds no budget yet"),
    ):
        with pytest.raises(SystemExit) as ended:
            budget_curve.main([*command, *more])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
