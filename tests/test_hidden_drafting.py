"""What drafting in the waiting time would give: arithmetic over traces."""

import pytest

from cats.planning.plan import COARSE, EXACT
from cats.trace import PassCost, StageSeconds, StepTrace
from evaluation.benchmarks.hidden_drafting import hidden_drafting, sentence


def cycle(drafted: int, accepted: int, wait: float, passes: int | None = None) -> StepTrace:
    """0.1 s a drafted token, 1 s of arithmetic in the exact pass."""
    costs = [PassCost(COARSE, 1, 9, 4, 0, 0.05)] * (drafted if passes is None else passes) + [PassCost(EXACT, drafted + 1, 9, 4, 7, 1.0)]
    seconds = StageSeconds(draft=0.1 * drafted, target=1 + wait, stream_wait=wait, total=0.1 * drafted + 1 + wait)
    return StepTrace(False, drafted + 1, accepted, accepted + 1, seconds=seconds, passes=tuple(costs))


def test_half_of_the_chains_go_on() -> None:
    found = hidden_drafting([cycle(4, 4, 0.35), cycle(4, 1, 0.35), cycle(4, 2, 9.0, passes=2)])
    assert found is not None
    assert (found["whole_share"], found["agreement"], found["continued"]) == (0.5, 5 / 6, 3)
    assert found["chance"] == pytest.approx(5 / 12)
    assert found["cycle_seconds"] == pytest.approx(1.75)
    saved = 5 / 12 * 2 * 0.1  # the third token is the next root
    assert found["speed_up_by_shorter_drafting"] == pytest.approx(1.75 / (1.75 - saved))
    gained = 5 / 12 * ((5 / 6) ** 5 + (5 / 6) ** 6)
    assert found["speed_up_by_longer_chains"] == pytest.approx((3.5 + gained) / 3.5)
    assert "3.0 tokens fit the 0.350 s" in sentence("nested", found)


def test_no_more_than_a_chain_is_saved_and_nothing_without_waiting() -> None:
    long = hidden_drafting([cycle(4, 4, 100.0)])
    assert long is not None
    assert long["speed_up_by_shorter_drafting"] == pytest.approx(101.4 / (101.4 - 0.4))
    short = hidden_drafting([cycle(4, 4, 0.05)])
    assert short is not None
    assert (short["speed_up_by_shorter_drafting"], short["speed_up_by_longer_chains"]) == (1, 1)


def test_other_methods_have_none() -> None:
    assert hidden_drafting([cycle(4, 4, 1.0, passes=0)]) is None
