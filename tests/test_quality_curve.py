"""`python -m evaluation.quality_curve`: what the exact model finds in an answer, what is counted, and interrupted runs go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import cats
from evaluation import quality_curve
from evaluation.quality_curve import points_of, read_answer
from evaluation.record_file import read_records
from tests.answer_records import write_lines
from tests.tiny_models import TinyModel

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"


@pytest.mark.parametrize("pinning", [True, False])
def test_an_answer_is_read_as_transformers_reads_it(tiny: Callable[[str], TinyModel], pinning: bool) -> None:
    """Streamed weights too; the likelihood of a text does not depend on who wrote it."""
    place = tiny("llama").base
    model = cats.load(place, memory=None if pinning else cats.MemoryOptions(pinning=False))
    prompt, ids = [3, 9, 4, 12], [7, 7, 30, 5, 2]
    theirs: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    with torch.no_grad():
        chances = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    expected = sum(float(chances[place, token]) for place, token in enumerate(ids))
    log_probability, _ = read_answer(model.base, prompt, ids)
    assert abs(log_probability - expected) < 1e-4
    greedy = cats.generate(model, prompt, cats.AutoregressiveConfig(), cats.GenerationConfig(max_new_tokens=6, eos_token_ids=())).ids
    assert read_answer(model.base, prompt, greedy)[1] == 6
    assert read_answer(model.base, prompt, [*greedy[:3], (greedy[3] + 1) % 32])[1] == 3
    assert read_answer(model.base, prompt, []) == (0.0, 0)


def test_points_are_sums_over_questions() -> None:
    def record(method: str, rule: str, place: int, ids: list[int], **figures: float) -> dict[str, Any]:
        return {"method": method, "rule": rule, "question_id": place, "ids": ids, **figures}

    typical = {"temperature": 0.7, "typical_tau": 0.1, "typical_alpha": 0.3}
    lossless = {"temperature": 0, "typical_tau": 0, "typical_alpha": 0}
    settings = {"methods": {"autoregressive": {}, "kangaroo": {}}, "rules": {"greedy": lossless, "typical": typical}}
    records = [
        record("autoregressive", "greedy", 1, [5, 6, 7], committed=2, passes=2, log_probability=-1.0, best=3),
        record("autoregressive", "greedy", 2, [8], committed=0, passes=0, log_probability=-0.5, best=1),
        record("kangaroo", "greedy", 1, [5, 6, 7], committed=2, passes=1, log_probability=-1.0, best=3),
        record("kangaroo", "greedy", 2, [9], committed=0, passes=0, log_probability=-2.0, best=0),
        record("kangaroo", "typical", 1, [5, 4], committed=1, passes=1, log_probability=-3.0, best=1),
    ]
    plain, plain_typical, greedy, relaxed = points_of(records, settings)
    assert (plain["as_plain"], plain["answers"], plain["accepted_length"], plain["best_share"]) == (2, 2, 1, 1)
    assert (plain_typical["answers"], plain_typical["accepted_length"], plain_typical["log_probability"]) == (0, None, None)
    assert (greedy["as_plain"], greedy["accepted_length"], greedy["log_probability"], greedy["greedy_share"]) == (1, 2, -0.75, 0.75)
    assert (relaxed["as_plain"], relaxed["lossless"], relaxed["best_share"], relaxed["greedy_share"]) == (None, False, 0.5, 0.5)


def command(folder: Path) -> list[str]:
    prompts = write_lines(
        folder / "questions.jsonl", [{"question_id": place, "turns": [f"Tell me of the {place} seas."]} for place in range(2)]
    )
    adapters = [word for name, exit_layer in (("draft", 2), ("shallow", 6)) for word in adapter_flag(name, exit_layer)]
    model = ["--model-path", str(TINY), *adapters, "--device", "cpu", "--methods", "cascade_tree", "--typical", "0.05:0.2"]
    return [*model, "--prompts", str(prompts), "--questions", "2", "--max-new-tokens", "12", "--output", str(folder / "curve.json")]


def adapter_flag(name: str, exit_layer: int) -> list[str]:
    return [f"--{name}-adapter-path", str(TINY / "adapters" / f"{name}_exit{exit_layer}")]


def test_lossless_rules_write_plain_text_and_an_interrupted_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, done = quality_curve.write_answer, list[str]()

    def dying(*arguments: Any) -> Any:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append("one")
        return work(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(quality_curve, "write_answer", dying)
        with pytest.raises(SystemExit):
            quality_curve.main(command(tmp_path))
    assert len(read_records(tmp_path / "curve.records.jsonl")) == 5
    quality_curve.main(command(tmp_path))
    assert len(read_records(tmp_path / "curve.records.jsonl")) == 2 * 2 * 3
    points = {(point["method"], point["rule"]): point for point in json.loads((tmp_path / "curve.json").read_text())["points"]}
    assert len(points) == 6
    assert [points["cascade_tree", rule]["as_plain"] for rule in ("greedy", "sampling, T=0.7")] == [2, 2]
    assert points["cascade_tree", "greedy"]["best_share"] == points["cascade_tree", "greedy"]["greedy_share"] == 1
    assert points["cascade_tree", "greedy"]["accepted_length"] > points["autoregressive", "greedy"]["accepted_length"] == 1
    relaxed = points["cascade_tree", "typical 0.05:0.2, T=0.7"]
    assert relaxed["as_plain"] is None
    assert relaxed["log_probability"] < points["cascade_tree", "greedy"]["log_probability"]
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    assert "| not lossless |" in (tmp_path / "curve.md").read_text()
    capsys.readouterr()
    for change, said in (
        (["--max-new-tokens", "9"], "begun with max_new_tokens 12, now it is 9"),
        (["--typical", "0.1"], "write TAU:ALPHA"),
        (["--typical", "0:0"], "is not relaxed"),
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--compute-dtype", "bfloat16"], "--compute-dtype float32"),
    ):
        with pytest.raises(SystemExit) as ended:
            quality_curve.main([*command(tmp_path), *change])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
