"""At T > 0 every method's text is distributed as the target's own samples: chi-square against exact probabilities.

The scripted target is a second-order Markov chain with known transition probabilities, so that in a long text the count of
each successor after each pair of tokens is a multinomial draw, and Pearson's statistic, summed over the pairs, is
chi-square distributed. The seeds are fixed; for fresh seeds, a correct engine fails one test with probability FALSE_ALARM.
"""

from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

import cats
from cats.methods.lookahead import LookaheadConfig
from cats.methods.medusa import MedusaConfig
from cats.methods.rest import RestConfig
from tests.datastores import store_of
from tests.heads import heads_of
from tests.methods import SHAPES as EVERY
from tests.scripted_model import Script, random_script, scripted_model

FALSE_ALARM = 1e-6
VOCAB = 4
TEXTS, TEXT_LENGTH = 6, 100
PROMPT = [0, 1]
LEAST_EXPECTED = 3.0
SHORT: dict[str, cats.MethodConfig] = {  # a text of short cycles shows as much of the acceptance rule in less time
    "autoregressive": cats.AutoregressiveConfig(),
    "cascade-chain": cats.CascadeConfig(steps=2),
    "cascade-tree": cats.CascadeConfig(steps=2, tree_topk=2, total_tokens=10),
    "cascade-rounds": cats.CascadeConfig(steps=1, tree_topk=2, sv_passes=2),
    "kangaroo": cats.KangarooConfig(steps=2, threshold=0.3),
    "eagle-chain": cats.EagleSelfConfig(steps=2),
    "eagle-tree": cats.EagleSelfConfig(steps=2, tree_topk=3, total_tokens=8),
    "prompt-lookup": cats.PromptLookupConfig(max_ngram=2, continuation=3),
    "lookahead": LookaheadConfig(window=2, levels=3, guesses=3),
    "medusa": MedusaConfig(heads_of(6 * VOCAB), nodes=6, depth=2),
    "rest": RestConfig(store_of(VOCAB), longest_match=4, shortest_match=1, continuation=3, total_tokens=6),
}
SHAPES = SHORT | {name: config for name, config in EVERY.items() if config.name not in {known.name for known in SHORT.values()}}
VARIANTS = {"T=0.7": {"temperature": 0.7}, "T=1": {"temperature": 1.0}}
TRUNCATED = {"top-p": {"temperature": 1.0, "top_p": 0.75}, "top-k": {"temperature": 0.7, "top_k": 3}}
TARGET = random_script(VOCAB, seed=13, spread=1.2)


def blurred(script: Script, seed: int, amount: float) -> Script:
    """A script that is right often and wrong often about the target."""
    noise = random_script(VOCAB, seed, spread=amount)
    return Script(script.current_VV + noise.current_VV, script.previous_VV + noise.previous_VV)


@cache
def model() -> cats.MultiAdapterCATSModel:
    return scripted_model(TARGET, blurred(TARGET, 11, 0.6), blurred(TARGET, 12, 0.3), context=TEXT_LENGTH + len(PROMPT))


def exact_probabilities(text: tuple[int, ...], temperature: float, top_p: float = 1.0, top_k: int = 0) -> np.ndarray:
    """The distribution [V] of the token after `text`, by the definitions of temperature, top-k and top-p."""
    weights = np.exp(TARGET.logits(list(text)) / temperature)
    order = np.argsort(-weights)
    if top_k:
        weights[order[top_k:]] = 0.0
    ordered = weights[order] / weights.sum()
    weights[order[ordered.cumsum() - ordered >= top_p]] = 0.0
    return weights / weights.sum()


def texts(shape: str, count: int, length: int, **fields: Any) -> list[tuple[int, ...]]:
    method = cats.build_method(SHAPES[shape], model())
    configs = [cats.GenerationConfig(max_new_tokens=length, eos_token_ids=(), seed=seed, **fields) for seed in range(count)]
    return [(*PROMPT, *cats.generate(model(), PROMPT, method, config).ids) for config in configs]


def pearson(seen: list[float], expected: list[float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom, for one multinomial; rare outcomes are pooled, or left out if still rare."""
    assert all(count == 0 for count, mean in zip(seen, expected, strict=True) if mean == 0), "a token came that cannot come"
    common = [(count, mean) for count, mean in zip(seen, expected, strict=True) if mean >= LEAST_EXPECTED]
    rest = sum(seen) - sum(count for count, _ in common), sum(expected) - sum(mean for _, mean in common)
    cells = [*common, rest] if rest[1] >= LEAST_EXPECTED else common
    scale = sum(count for count, _ in cells) / max(1e-9, sum(mean for _, mean in cells))
    return sum((count - scale * mean) ** 2 / (scale * mean) for count, mean in cells), max(0, len(cells) - 1)


def transition_excess(samples: list[tuple[int, ...]], **variant: float) -> float:
    """How far the statistic of all transitions lies beyond its critical value at FALSE_ALARM; negative is a pass."""
    seen: Counter[tuple[int, ...]] = Counter(triple for text in samples for triple in zip(text, text[1:], text[2:], strict=False))
    statistic, freedom = 0.0, 0
    for pair in product(range(VOCAB), repeat=2):
        counts = [float(seen[*pair, token]) for token in range(VOCAB)]
        if sum(counts):
            part = pearson(counts, list(sum(counts) * exact_probabilities(pair, **variant)))  # type: ignore[arg-type]
            statistic, freedom = statistic + part[0], freedom + part[1]
    assert freedom >= 5, "the texts are too short to test anything"
    return float(statistic - chi2.isf(FALSE_ALARM, freedom))


def test_every_method_has_a_shape() -> None:
    assert {config.name for config in SHAPES.values()} == set(cats.METHODS)


@pytest.mark.parametrize("variant", ["T=0.7", pytest.param("T=1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES)
def test_transitions_are_the_targets(shape: str, variant: str) -> None:
    assert transition_excess(texts(shape, TEXTS, TEXT_LENGTH, **VARIANTS[variant]), **VARIANTS[variant]) < 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", TRUNCATED)
@pytest.mark.parametrize("shape", SHAPES)
def test_transitions_are_the_truncated_targets(shape: str, variant: str) -> None:
    assert transition_excess(texts(shape, TEXTS // 2, TEXT_LENGTH, **TRUNCATED[variant]), **TRUNCATED[variant]) < 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_gives_one_text_whatever_drafts_it(shape: str) -> None:
    assert texts(shape, 2, TEXT_LENGTH, temperature=0.7) == texts("autoregressive", 2, TEXT_LENGTH, temperature=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["cascade-tree", "cascade-rounds", "eagle-tree"])
def test_first_tokens_are_jointly_the_targets(shape: str) -> None:
    """Whole short texts, so that a dependence between the draws of one step would show as well."""
    count, length = 400, 3
    seen = Counter(text[len(PROMPT) :] for text in texts(shape, count, length, temperature=1.0))
    sequences = list(product(range(VOCAB), repeat=length))
    chances = [
        np.prod([exact_probabilities((*PROMPT, *sequence[:place])[-2:], 1.0)[token] for place, token in enumerate(sequence)])
        for sequence in sequences
    ]
    assert sum(chances) == pytest.approx(1)
    statistic, freedom = pearson([float(seen[sequence]) for sequence in sequences], [count * float(chance) for chance in chances])
    assert freedom >= 12
    assert statistic < chi2.isf(FALSE_ALARM, freedom)


@pytest.mark.parametrize("wrong", [{"temperature": 0.5}, {"temperature": 2.0}, {"temperature": 1.0, "top_p": 0.75}])
def test_another_distribution_is_told_apart(wrong: dict[str, float]) -> None:
    assert transition_excess(texts("autoregressive", TEXTS, TEXT_LENGTH, **wrong), temperature=1.0) > 0


def test_a_relaxed_rule_is_told_apart() -> None:
    """Typical acceptance commits what the drafts like: exactly the fault that this file looks for."""
    samples = texts("cascade-tree", TEXTS, TEXT_LENGTH, temperature=1.0, typical_tau=0.09, typical_alpha=0.3)
    assert transition_excess(samples, temperature=1.0) > 0


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "autoregressive"])
def test_drafts_are_both_accepted_and_rejected(shape: str) -> None:
    """Otherwise the distribution would say nothing about the acceptance rule. Three answers: CAS-Spec's router follows the clock."""
    configs = [cats.GenerationConfig(TEXT_LENGTH, eos_token_ids=(), temperature=1.0, seed=seed) for seed in range(3)]
    traces = [trace for config in configs for trace in cats.generate(model(), PROMPT, SHAPES[shape], config).traces[1:-1]]
    depths = [trace.accepted for trace in traces]
    assert min(depths) < max(depths)
    assert 0 < sum(depths) < sum(trace.nodes - 1 for trace in traces)
