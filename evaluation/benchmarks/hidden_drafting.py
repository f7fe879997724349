"""Would drafting while the exact pass streams pay? Calculated from the cycles of a chain of nested weights, as they were measured.

While the exact pass waits for its weights, the coarse form could continue the chain's last token. That is of use where the exact model
takes the whole chain and then says what the continuation began with: the next cycle's root is then known, and what followed it is already
drafted. The next cycle drafts so many tokens less, or as long as before on top of them; both are calculated. Not in it: what processor
time the continuation takes from reading, and what an adaptive chain, which ends where it doubts, says less surely behind its end.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from cats.planning.plan import COARSE
from cats.trace import StepTrace


def chains_of(traces: Sequence[StepTrace]) -> list[StepTrace]:
    """The cycles that drafted a chain and nothing else with the coarse form, one token a pass."""
    return [trace for trace in traces if 0 < sum(cost.view == COARSE for cost in trace.passes) == trace.nodes - 1]


def expected(agreement: float, length: int) -> float:
    """Tokens of a chain that are accepted, where each agrees with this chance."""
    return sum(agreement**place for place in range(1, length + 1))


def hidden_drafting(traces: Sequence[StepTrace]) -> dict[str, Any] | None:
    """What continuing the chain in the waiting time would give; None where no chains were drafted.

    Args:
        traces: of cycles, prompts left out.

    Returns:
        whole_share: cycles whose chain was accepted to its end.
        agreement: share of drafted tokens, up to the first that is not the exact model's, that are its own.
        chance: that a continuation is of use, the former times the latter.
        draft_seconds, wait_seconds, cycle_seconds: of one drafted token; of a cycle, means.
        continued: tokens that would be drafted in a cycle's waiting time, mean.
        speed_up_by_shorter_drafting, speed_up_by_longer_chains: of tokens per second.
    """
    chains = chains_of(traces)
    if not chains:
        return None
    whole = statistics.fmean(trace.accepted == trace.nodes - 1 for trace in chains)
    agreed = sum(trace.accepted for trace in chains)
    agreement = agreed / sum(trace.accepted + (trace.accepted < trace.nodes - 1) for trace in chains)
    draft = statistics.median(trace.seconds["draft"] / (trace.nodes - 1) for trace in chains)
    continued = [int(trace.seconds["stream_wait"] / draft) for trace in chains]
    chance = whole * agreement
    seconds = statistics.fmean(trace.seconds.total for trace in chains)
    known = [max(0, count - 1) for count in continued]  # the first of them is the next root
    saved = chance * draft * statistics.fmean(min(count, trace.nodes - 1) for count, trace in zip(known, chains, strict=True))
    longer = statistics.fmean(
        expected(agreement, trace.nodes - 1 + count) - expected(agreement, trace.nodes - 1)
        for count, trace in zip(known, chains, strict=True)
    )
    tokens = statistics.fmean(trace.committed for trace in chains)
    return {
        "whole_share": whole,
        "agreement": agreement,
        "chance": chance,
        "draft_seconds": draft,
        "wait_seconds": statistics.fmean(trace.seconds["stream_wait"] for trace in chains),
        "cycle_seconds": seconds,
        "continued": statistics.fmean(continued),
        "speed_up_by_shorter_drafting": seconds / (seconds - saved),
        "speed_up_by_longer_chains": (tokens + chance * longer) / tokens,
    }


def sentence(label: str, estimate: dict[str, Any]) -> str:
    """The outcome in words."""
    return (
        f"{label}, drafting while it streams: {estimate['continued']:.1f} tokens fit the {estimate['wait_seconds']:.3f} s that a cycle "
        f"waits, of use in {estimate['chance']:.0%} of the cycles ({estimate['whole_share']:.0%} of the chains are accepted whole, "
        f"{estimate['agreement']:.1%} of tokens agree): {estimate['speed_up_by_shorter_drafting']:.3f} x by shorter drafting, "
        f"{estimate['speed_up_by_longer_chains']:.3f} x by longer chains\n"
    )
