"""The demo through its whole code path, on the test model: every method under its budget, the promised figures, and a loud end."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cats import Generation, GenerationConfig, MethodConfig
from cats.cli import default_model
from evaluation.benchmarks import demo
from evaluation.subject import Subject


def rows_of(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if line.startswith(tuple(demo.METHODS)) and " x " in line]


@pytest.fixture
def one_prompt(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    return demo.PROMPTS


def test_it_shows_every_method_under_the_same_budget_and_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--max-new-tokens", "8"])
    shown, said = capsys.readouterr()
    assert "cannot be fetched" in said, "tests have no network"
    assert "8.6 MB of them in memory" in shown, "the share of the weights that the budget of the real model is"
    rows = rows_of(shown)
    assert [row.split("  ")[0].strip() for row in rows] == list(demo.METHODS)
    assert all("yes" in row and "-" not in row for row in rows), "no figure is missing"
    assert rows[0].split()[1] == "1.00"
    assert float(rows[0].split(" x ")[1].split()[0]) > 1, "megabytes are streamed for a token"
    assert "\033" not in shown, "colour is for terminals"
    assert shown.strip().splitlines()[-1], "the text of one answer comes last"


def test_everything_in_memory(one_prompt: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--max-new-tokens", "8", "--resident"])
    shown = capsys.readouterr().out
    assert "all of them in memory" in shown
    assert all(" 0 MB " in row for row in rows_of(shown)), "nothing is read"


def test_a_text_that_differs_ends_it_with_an_error(
    one_prompt: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.forward

    def wrong(subject: Subject, method: MethodConfig, prompt_ids: list[int], config: GenerationConfig) -> Generation:
        answer = right(subject, method, prompt_ids, config)
        if method.name == "kangaroo":
            answer.ids[-1] += 1
        return answer

    monkeypatch.setattr(demo, "forward", wrong)
    with pytest.raises(SystemExit) as leaving:
        demo.main(["--max-new-tokens", "8", "--resident"])
    assert leaving.value.code == 2
    shown, said = capsys.readouterr()
    assert [row.split("  ")[0].strip() for row in rows_of(shown) if "NO" in row] == ["Kangaroo"]
    assert "error: answers of Kangaroo differ from plain decoding's" in said


def test_a_checkout_without_adapters_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "default_model", lambda: default_model.DefaultModel(tmp_path, {}))
    with pytest.raises(SystemExit) as leaving:
        demo.main([])
    assert leaving.value.code == 2
    assert "error: the adapters of SmolLM2-135M-Instruct are missing" in capsys.readouterr().err


def test_a_budget_beside_resident_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        demo.main(["--resident", "--memory-budget", "8MB"])
    assert leaving.value.code == 2
    assert "--memory-budget does nothing" in capsys.readouterr().err
