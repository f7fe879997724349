"""Every metric on records small enough to count by hand."""

from typing import Any

import pytest

from evaluation import metrics
from evaluation.metrics import ModelShape

SHAPE = ModelShape(layers=32, draft_exit=3, draft_passes=5, bytes_per_layer=404_770_000)


def turn(committed: list[int], **more: Any) -> dict[str, Any]:
    steps = len(committed)
    zeros = {stage: [0.5] * steps for stage in ("draft", "shallow", "target", "accept", "total", "compute", "stream_wait")}
    return {
        "nodes": [6] * steps,
        "accepted": [count - 1 for count in committed],
        "committed": committed,
        "shallow_accepted": [None] * steps,
        "layer_passes": [44] * steps,
        "coarse_layer_passes": [0] * steps,
        "accepted_kinds": {},
        "confusion": None,
        "seconds": zeros,
        **more,
    }


def record(question_id: object, steps: list[dict[str, Any]], ids: list[list[int]], seconds: list[float]) -> dict[str, Any]:
    choice = {"ids": ids, "new_tokens": [len(answer) for answer in ids], "wall_time": seconds, "finish": ["eos"] * len(ids), "steps": steps}
    return {"question_id": question_id, "choices": [{"index": 0, "turns": ["x"] * len(ids), **choice}]}


FAILED: dict[str, Any] = {"question_id": 9, "failed": "out of memory"}
TWO_TURNS = record(1, [turn([3, 1]), turn([2])], [[1, 2, 3, 4, 5], [1, 2, 3]], [2.0, 1.0])
ONE_TURN = record(2, [turn([6])], [[7, 7, 7, 7, 7, 7, 7]], [1.0])


def test_accepted_length_is_committed_tokens_by_steps() -> None:
    assert metrics.accepted_length([TWO_TURNS, ONE_TURN, FAILED]) == (3 + 1 + 2 + 6) / 4
    assert metrics.per_step([TWO_TURNS, ONE_TURN], "committed") == [3, 1, 2, 6]
    assert metrics.accepted_length([FAILED]) is None


def test_failures_are_counted_and_left_out() -> None:
    summary = metrics.summarise([TWO_TURNS, FAILED], SHAPE)
    assert (summary["questions"], summary["failed"]) == (1, 1)
    assert summary["tokens_per_second"] == 8 / 3


def test_confusion_sums_counts_before_it_divides() -> None:
    first = turn([2], confusion={"tp": 3, "fp": 1, "fn": 0, "tn": 2})
    second = turn([2], confusion={"tp": 1, "fp": 1, "fn": 4, "tn": 0})
    found = metrics.confusion([record(1, [first, second, turn([1])], [[1], [1], [1]], [1.0, 1.0, 1.0])])
    assert found == {"TP": 4, "TN": 2, "FP": 2, "FN": 4, "precision": 4 / 6, "recall": 0.5, "f1": 8 / 14}


def test_undefined_ratios_are_none() -> None:
    assert metrics.confusion([ONE_TURN]) == {"TP": 0, "TN": 0, "FP": 0, "FN": 0, "precision": None, "recall": None, "f1": None}
    empty = metrics.summarise([], SHAPE)
    undefined = ("accepted_length", "tokens_per_second", "layer_passes_per_token", "paper_bytes_per_token", "repeated_4gram_share")
    assert all(empty[name] is None for name in undefined)
    assert empty["layer_passes_per_token_formula"] is None
    assert empty["mean_shallow_accepted_tokens_per_step"] is None


def test_speed_up_compares_tokens_per_second_on_questions_that_both_answered() -> None:
    plain = [record(1, [], [[1, 2, 3, 4, 5], [1, 2, 3]], [4.0, 2.0]), {"question_id": 2, "failed": "no room"}]
    assert metrics.speed_up([TWO_TURNS, ONE_TURN], plain) == pytest.approx((8 / 3) / (8 / 6))
    assert metrics.speed_up([ONE_TURN], plain) is None


def test_identical_answers_are_equal_in_every_turn() -> None:
    other = record(1, [], [[1, 2, 3, 4, 5], [1, 2, 4]], [1.0, 1.0])
    assert metrics.identical_answers([TWO_TURNS, ONE_TURN], [TWO_TURNS, ONE_TURN]) == 2
    assert metrics.identical_answers([TWO_TURNS, ONE_TURN], [other, ONE_TURN]) == 1
    assert metrics.compare([TWO_TURNS], [other], SHAPE, greedy=False)["identical"] is None


def test_layer_passes_counted_and_by_the_formula() -> None:
    assert metrics.layer_passes_per_token([TWO_TURNS, ONE_TURN]) == 4 * 44 / 12
    assert metrics.formula_layer_passes(SHAPE) == 5 * 3 + 29 == 44
    assert metrics.formula_layer_passes(ModelShape(32, 0, 0, 1)) == 32


def test_streamed_bytes_are_counted_by_committed_tokens_or_not_known() -> None:
    streamed = record(4, [turn([3, 1], bytes_streamed=[500, 300]), turn([4], bytes_streamed=[400])], [[1], [2]], [1.0, 1.0])
    assert metrics.bytes_streamed_per_token([streamed, FAILED]) == 1200 / 8
    assert metrics.bytes_streamed_per_token([streamed, ONE_TURN]) is None
    assert metrics.summarise([streamed], SHAPE)["bytes_streamed_per_token"] == 150


@pytest.mark.parametrize(
    ("steps", "length", "gigabytes"), [(3, 2.7077, 5.6805), (5, 3.052, 5.8354), (7, 3.2343, 6.2574), (10, 3.3332, 7.1646)]
)
def test_bytes_per_token_are_those_of_the_papers_table_5(steps: int, length: float, gigabytes: float) -> None:
    found = metrics.paper_bytes_per_token(ModelShape(32, 3, steps, 404_770_000), length)
    assert found == pytest.approx(gigabytes * 1e9, rel=5e-5)


def test_repeated_ngrams_by_brute_force() -> None:
    ids = [1, 2, 1, 2, 1, 2, 1, 3, 1, 2, 1, 2]
    grams = [ids[start : start + 4] for start in range(len(ids) - 3)]
    repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
    assert metrics.repeated_ngrams(ids) == (repeated, len(grams))
    assert metrics.repeated_ngrams([1, 2, 3]) == (0, 0)
    assert metrics.repeated_ngram_share([[7] * 7, [1, 2, 3, 4]]) == 3 / 5


def test_stage_seconds_and_kinds_add_up() -> None:
    kinds = record(
        3, [turn([2], accepted_kinds={"trunk": 1}), turn([3], accepted_kinds={"trunk": 1, "correction": 1})], [[1], [2]], [1.0, 1.0]
    )
    assert metrics.accepted_kinds([kinds]) == {"correction": 1, "trunk": 2}
    assert metrics.stage_seconds([TWO_TURNS])["draft"] == 1.5
    early = record(4, [turn([2], seconds={"draft": [0.25]})], [[1]], [1.0])
    assert metrics.stage_seconds([TWO_TURNS, early])["stream_wait"] == 1.5


def test_stages_are_whatever_the_records_name() -> None:
    own = record(3, [turn([2, 2], seconds={"lookup": [0.25, 0.5], "total": [1.0, 1.0]})], [[1, 2, 3, 4, 5]], [2.0])
    assert metrics.stage_seconds([own, ONE_TURN]) == {
        **{"lookup": 0.75, "total": 2.5},
        **dict.fromkeys(("draft", "shallow", "target", "accept", "compute", "stream_wait"), 0.5),
    }
