"""Averages and ratios over answer records: one definition for every method. Pure functions of dictionaries; no torch, no files.

A record is a line of an answer file (see eval.py). Records with the key `failed` are left out of everything but the count
of failures. A quantity whose denominator is zero is None, never 0.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class ModelShape:
    """What the cost formulas need to know of a run.

    Attributes:
        layers: decoder layers L.
        draft_exit: layers d that a drafting pass runs; 0 for methods that draft without the model.
        draft_passes: drafting passes n in a full cycle.
        bytes_per_layer: weights of one decoder layer in the run's dtype.
        bytes_per_coarse_layer: of its coarse form, on average over the layers; 0 where there is none.
    """

    layers: int
    draft_exit: int
    draft_passes: int
    bytes_per_layer: int
    bytes_per_coarse_layer: int = 0


def ratio(numerator: float, denominator: float) -> float | None:
    """Quotient, None over zero."""
    return numerator / denominator if denominator else None


def answered(records: Iterable[Record]) -> list[Record]:
    """Records of questions that did not fail."""
    return [record for record in records if "failed" not in record]


def steps_of_turns(records: Iterable[Record]) -> Iterator[Mapping[str, Any]]:
    """The step lists of every turn of every answered question."""
    for record in answered(records):
        yield from record["choices"][0]["steps"]


def turn_values(records: Iterable[Record], name: str) -> list[Any]:
    """A per-turn value (`new_tokens`, `wall_time`, `finish`, `ids`) of every turn of every answered question."""
    return [value for record in answered(records) for value in record["choices"][0][name]]


def per_step(records: Iterable[Record], name: str) -> list[int]:
    """A per-step list (`committed`, `accepted`, `layer_passes`, ...) over all turns; prefill steps are not among them."""
    return [value for steps in steps_of_turns(records) for value in steps[name] if value is not None]


def accepted_length(records: Iterable[Record]) -> float | None:
    """Tokens committed per target pass, the target's own next token included, prefill excluded: plain decoding has exactly 1."""
    committed = per_step(records, "committed")
    return ratio(sum(committed), len(committed))


def committed_and_passes(records: Iterable[Record]) -> list[tuple[int, int]]:
    """Per answered question, the tokens that it committed and the target passes that it took, prefill excluded."""
    return [(sum(committed), len(committed)) for record in answered(records) for committed in [per_step([record], "committed")]]


def tokens_and_seconds(records: Iterable[Record]) -> list[tuple[int, float]]:
    """Per answered question, the tokens that its cycles committed and the seconds that they took, prefill excluded."""
    return [(sum(per_step([record], "committed")), stage_seconds([record]).get("total", 0.0)) for record in answered(records)]


def cycles_and_seconds(records: Iterable[Record]) -> list[tuple[int, float]]:
    """Per answered question, its cycles and the seconds that they took, prefill excluded."""
    return [(len(per_step([record], "committed")), stage_seconds([record]).get("total", 0.0)) for record in answered(records)]


def ratio_interval(groups: Sequence[Sequence[tuple[float, float]]], level: float = 0.9, draws: int = 1000) -> tuple[float, float] | None:
    """The bootstrap interval of a ratio of sums, or of its mean over several groups: of the accepted length, of tokens per second; the same
    for the same counts.

    Args:
        groups: of each group, the two counts of every question (`committed_and_passes`); questions are drawn with replacement within their
            group.
        level: share of the draws that lie in the interval.

    Returns:
        lower and upper bound; None where a group has no pass.
    """
    if not all(sum(passes for _, passes in group) for group in groups):
        return None
    drawn = random.Random(0)
    means: list[float] = []
    while len(means) < draws:
        samples = [drawn.choices(group, k=len(group)) for group in groups]
        lengths = [ratio(sum(tokens for tokens, _ in sample), sum(passes for _, passes in sample)) for sample in samples]
        known = [length for length in lengths if length is not None]
        if len(known) == len(groups):
            means.append(sum(known) / len(known))
    means.sort()
    cut = round((1 - level) / 2 * draws)
    return means[cut], means[draws - 1 - cut]


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return ratio(sum(values), len(values))


def confusion(records: Iterable[Record]) -> dict[str, float | None]:
    """The shallow verifier's verdicts against the target's, summed, with precision, recall and F1; positive means accepted."""
    total: Counter[str] = Counter()
    for steps in steps_of_turns(records):
        total.update(steps["confusion"] or {})
    tp, fp, fn, tn = (total[name] for name in ("tp", "fp", "fn", "tn"))
    return {
        "TP": tp,
        "TN": tn,
        "FP": fp,
        "FN": fn,
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
    }


def tokens_per_second(records: Iterable[Record]) -> float | None:
    """New tokens per wall-clock second of generation, prefill included, over all turns."""
    records = list(records)
    return ratio(sum(turn_values(records, "new_tokens")), sum(turn_values(records, "wall_time")))


def both_answered(records: Iterable[Record], baseline: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Records of the questions that both runs answered, in the same order."""
    plain = {record["question_id"]: record for record in answered(baseline)}
    kept = [record for record in answered(records) if record["question_id"] in plain]
    return kept, [plain[record["question_id"]] for record in kept]


def speed_up(records: Iterable[Record], baseline: Iterable[Record]) -> float | None:
    """Tokens per second over the baseline's, on the questions that both answered."""
    kept, plain = both_answered(records, baseline)
    fast, slow = tokens_per_second(kept), tokens_per_second(plain)
    return None if fast is None or not slow else fast / slow


def identical_answers(records: Iterable[Record], baseline: Iterable[Record]) -> int:
    """Questions whose answers equal the baseline's token for token in every turn."""
    kept, plain = both_answered(records, baseline)
    return sum(mine["choices"][0]["ids"] == theirs["choices"][0]["ids"] for mine, theirs in zip(kept, plain, strict=True))


def layer_passes_per_token(records: Iterable[Record]) -> float | None:
    """Decoder layer executions, counted, per committed token; prefill excluded."""
    records = list(records)
    return ratio(sum(per_step(records, "layer_passes")), sum(per_step(records, "committed")))


def coarse_layer_passes(turns: Iterable[Mapping[str, Any]]) -> int:
    """Layer passes of the coarse form, over the step lists of turns."""
    return sum(sum(steps["coarse_layer_passes"]) for steps in turns)


def layer_bytes_per_token(records: Iterable[Record], shape: ModelShape) -> float | None:
    """Weight bytes of decoder layers that passes read, streamed or not, per committed token; prefill, head and adapters left out.

    Every layer pass counts with the bytes of the form that ran.
    """
    turns = list(steps_of_turns(records))
    coarse = coarse_layer_passes(turns)
    exact = sum(sum(steps["layer_passes"]) for steps in turns) - coarse
    read = exact * shape.bytes_per_layer + coarse * shape.bytes_per_coarse_layer
    return ratio(read, sum(sum(steps["committed"]) for steps in turns))


def bytes_streamed_per_token(records: Iterable[Record]) -> float | None:
    """Weight bytes taken from the stream, counted, per committed token; prefill excluded; 0 where all weights were resident.

    None where some of the records do not say it.
    """
    turns = list(steps_of_turns(records))
    if not all("bytes_streamed" in steps for steps in turns):
        return None
    return ratio(sum(sum(steps["bytes_streamed"]) for steps in turns), sum(sum(steps["committed"]) for steps in turns))


def formula_layer_passes(shape: ModelShape) -> int:
    """Layer passes of one full cycle, n*d + (L - d), without what corrections cost."""
    return shape.draft_passes * shape.draft_exit + (shape.layers - shape.draft_exit)


def paper_bytes_per_token(shape: ModelShape, length: float | None) -> float | None:
    """The paper's bytes per token, ((n - 1)*d + L) layers by the accepted length (its table 5, to four digits).

    It charges every drafting pass as if its layers were read again, and leaves lm_head and adapters out.
    """
    passes = max(shape.draft_passes - 1, 0) * shape.draft_exit + shape.layers
    return None if not length else passes * shape.bytes_per_layer / length


def repeated_ngrams(ids: Sequence[int], size: int = 4) -> tuple[int, int]:
    """How many n-grams of one answer occurred earlier in it, and how many it has."""
    ngrams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return len(ngrams) - len(set(ngrams)), len(ngrams)


def repeated_ngram_share(answers: Iterable[Sequence[int]], size: int = 4) -> float | None:
    """Repeated n-grams of all answers by all n-grams: loops inflate acceptance, so this stands beside every accepted length."""
    counts = [repeated_ngrams(ids, size) for ids in answers]
    return ratio(sum(repeated for repeated, _ in counts), sum(total for _, total in counts))


def stage_seconds(records: Iterable[Record]) -> dict[str, float]:
    """Seconds by stage, and what was measured across stages, summed over all steps but the prefill; whatever names the records have."""
    total: dict[str, float] = {}
    for steps in steps_of_turns(records):
        for stage, seconds in steps["seconds"].items():
            total[stage] = total.get(stage, 0.0) + sum(seconds)
    return total


def accepted_kinds(records: Iterable[Record]) -> dict[str, int]:
    """Accepted nodes by kind (trunk, sibling, correction, ...)."""
    total: Counter[str] = Counter()
    for steps in steps_of_turns(records):
        total.update(steps["accepted_kinds"])
    return dict(sorted(total.items()))


def summarise(records: Iterable[Record], shape: ModelShape) -> dict[str, Any]:
    """Every metric of one run, or of several runs put together."""
    records = list(records)
    length = accepted_length(records)
    committed = per_step(records, "committed")
    by_coarse = coarse_layer_passes(steps_of_turns(records)) > 0  # which the formula knows nothing of
    return {
        "questions": len(answered(records)),
        "failed": len(records) - len(answered(records)),
        "new_tokens": sum(turn_values(records, "new_tokens")),
        "finish": dict(sorted(Counter(turn_values(records, "finish")).items())),
        "steps": len(committed),
        "accepted_length": length,
        "nodes_per_step": mean(per_step(records, "nodes")),
        "mean_accepted_tokens_per_step": mean(per_step(records, "accepted")),
        "mean_shallow_accepted_tokens_per_step": mean(per_step(records, "shallow_accepted")),
        "accepted_kinds": accepted_kinds(records),
        "confusion": confusion(records),
        "tokens_per_second": tokens_per_second(records),
        "layer_passes_per_token": layer_passes_per_token(records),
        "layer_passes_per_token_formula": None if by_coarse else ratio(formula_layer_passes(shape), length or 0),
        "layer_bytes_per_token": layer_bytes_per_token(records, shape),
        "bytes_streamed_per_token": bytes_streamed_per_token(records),
        "paper_bytes_per_token": paper_bytes_per_token(shape, length),
        "repeated_4gram_share": repeated_ngram_share(turn_values(records, "ids")),
        "seconds": stage_seconds(records),
        "committed_per_step": committed,
    }


def compare(records: Iterable[Record], baseline: Iterable[Record], shape: ModelShape, greedy: bool) -> dict[str, Any]:
    """The run beside plain decoding of the same questions; `identical` is None where answers are drawn at random."""
    records, baseline = list(records), list(baseline)
    kept, plain = both_answered(records, baseline)
    return {
        "compared": len(kept),
        "identical": identical_answers(kept, plain) if greedy else None,
        "tokens_per_second": tokens_per_second(plain),
        "speed_up": speed_up(kept, plain),
        "layer_passes_per_token": layer_passes_per_token(plain),
        "failed": len(baseline) - len(answered(baseline)),
    }
