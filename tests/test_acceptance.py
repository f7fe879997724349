"""The three acceptance rules as pure functions: hand-made trees, hand-made logits, and a slow rewriting of each rule."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cats.acceptance import Greedy, Sampling, Typical, build_acceptance, picked, warped_probabilities
from cats.config import GenerationConfig
from cats.errors import CatsError
from cats.tree import TokenTree

CPU = torch.device("cpu")
VOCAB = 8
FALSE_ALARM = 1e-6


def hand_made_tree() -> TokenTree:
    """Root 0 -> 1 (token 3) -> 3 (token 4), 4 (token 1); root -> 2 (token 2) -> 5 (token 6)."""
    tree = TokenTree(5, capacity=8)
    first = tree.add(0, 3, "trunk")
    second = tree.add(0, 2, "sibling")
    tree.add(first, 4, "trunk")
    tree.add(first, 1, "correction")
    tree.add(second, 6, "continuation")
    return tree


def random_tree(generator: np.random.Generator, nodes: int) -> TokenTree:
    tree = TokenTree(0, nodes)
    while len(tree) < nodes:
        tree.add(int(generator.integers(len(tree))), int(generator.integers(VOCAB)), "trunk")
    return tree


def choosing(*tokens: int) -> torch.Tensor:
    """Logits [T, V] whose argmax at row i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float()


@pytest.mark.parametrize(
    ("choices", "path", "next_token"),
    [
        ((7, 0, 0, 0, 0, 0), (0,), 7),  # never
        ((3, 4, 0, 7, 0, 0), (0, 1, 3), 7),  # the trunk to its end
        ((3, 1, 0, 0, 5, 0), (0, 1, 4), 5),  # a correction
        ((3, 5, 0, 0, 0, 0), (0, 1), 5),  # the path breaks off
        ((2, 0, 6, 0, 0, 1), (0, 2, 5), 1),  # a sibling and its continuation
    ],
)
def test_greedy_walks_to_the_argmax(choices: tuple[int, ...], path: tuple[int, ...], next_token: int) -> None:
    verdict = Greedy().judge(hand_made_tree(), range(6), choosing(*choices))
    assert (verdict.path, verdict.next_token) == (path, next_token)


def test_greedy_verdicts_cover_every_node_whether_on_the_path_or_not() -> None:
    verdict = Greedy().judge(hand_made_tree(), range(6), choosing(3, 5, 6, 0, 0, 0))
    assert verdict.accepted == {1: True, 2: False, 3: False, 4: False, 5: True}


def test_nodes_that_were_not_verified_are_never_accepted() -> None:
    verdict = Greedy().judge(hand_made_tree(), [0, 1, 4], choosing(3, 4, 0))
    assert (verdict.path, verdict.next_token, verdict.accepted) == ((0, 1), 4, {1: True, 4: False})


def test_probes_are_never_accepted() -> None:
    tree = hand_made_tree()
    probe = tree.add_probe(0, 7)
    verdict = Greedy().judge(tree, range(7), choosing(7, 0, 0, 0, 0, 0, 0))
    assert verdict.path == (0,)
    assert verdict.next_token == 7
    assert probe not in verdict.accepted


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_longest_path_of_argmaxes(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tree = random_tree(generator, 24)
    logits = torch.from_numpy(generator.normal(size=(24, VOCAB)))
    best = logits.argmax(-1).tolist()
    standing = [node for node in range(24) if all(tree.tokens[step] == best[tree.parents[step]] for step in tree.path(node)[1:])]
    verdict = Greedy().judge(tree, range(24), logits)
    assert list(verdict.path) == tree.path(max(standing, key=lambda node: tree.depths[node]))
    assert verdict.next_token == best[verdict.path[-1]]


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.8, 0), (0.7, 1.0, 3), (1.3, 0.6, 5)])
def test_probabilities_are_those_of_transformers(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    config = GenerationConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    torch.testing.assert_close(warped_probabilities(logits, config), expected.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3)])
def test_sampled_paths_have_exactly_the_targets_probability(top_p: float, top_k: int) -> None:
    """Chi-square over every (path, next token) that can happen; false alarm once in a million."""
    tree, draws = hand_made_tree(), 4000
    config = GenerationConfig(temperature=0.9, top_p=top_p, top_k=top_k, seed=3)
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2))
    chance = warped_probabilities(logits, config).double().numpy()
    expected: dict[tuple[tuple[int, ...], int], float] = {}
    for node, token in product(range(6), range(VOCAB)):
        if tree.child(node, token) is None:
            path = tuple(tree.path(node))
            walked = math.prod(chance[tree.parents[step], tree.tokens[step]] for step in path[1:])
            expected[path, token] = draws * walked * chance[node, token]
    assert sum(expected.values()) == pytest.approx(draws)
    rule = Sampling(config)
    seen = dict.fromkeys(expected, 0)
    for _ in range(draws):
        verdict = rule.judge(tree, range(6), logits)
        seen[verdict.path, verdict.next_token] += 1
    assert all(seen[outcome] == 0 for outcome, count in expected.items() if count == 0)
    common = [outcome for outcome, count in expected.items() if count >= 5]
    cells = [(seen[outcome], expected[outcome]) for outcome in common]
    cells.append((draws - sum(seen[outcome] for outcome in common), max(1e-9, draws - sum(expected[outcome] for outcome in common))))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells if mean > 1)
    assert statistic < chi2.isf(FALSE_ALARM, len(cells) - 1)


def test_the_seed_decides_the_draws() -> None:
    tree, logits = hand_made_tree(), torch.zeros(6, VOCAB)
    first, again, other = (
        [rule.judge(tree, range(6), logits).next_token for _ in range(20)]
        for rule in (Sampling(GenerationConfig(temperature=1.0, seed=seed)) for seed in (4, 4, 5))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution_pick_what_can_happen(number: float) -> None:
    chances = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0], [1e-8, 0.0, 1.0, 0.0, 0.0]])
    found = picked(chances, torch.full((2,), number, dtype=torch.float64)).tolist()
    assert found == ([1, 0] if number == 0 else [3, 2])


def test_the_parts_are_as_wide_as_the_probabilities() -> None:
    chances = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).expand(1000, 4)
    found = picked(chances, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert torch.bincount(found, minlength=4).tolist() == [200, 0, 500, 300]


def slow_typical(tree: TokenTree, logits: np.ndarray, config: GenerationConfig) -> tuple[list[int], set[int]]:
    """Medusa's rule, node by node: the accepted path, and the tokens that may come next."""
    weights = np.exp(logits / config.temperature - (logits / config.temperature).max(1, keepdims=True))
    chance = weights / weights.sum(1, keepdims=True)
    floor = [min(config.typical_tau, config.typical_alpha * math.exp(sum(p * math.log(p) for p in row))) for row in chance]

    def stands(node: int) -> bool:
        return all(chance[tree.parents[step], tree.tokens[step]] > floor[tree.parents[step]] for step in tree.path(node)[1:])

    def likelihood(node: int) -> float:
        return math.prod(chance[tree.parents[step], tree.tokens[step]] for step in tree.path(node)[1:])

    end = max(filter(stands, range(len(tree))), key=lambda node: (tree.depths[node], likelihood(node)))
    passing = {token for token in range(VOCAB) if chance[end, token] > floor[end]}
    return tree.path(end), passing or {int(chance[end].argmax())}


@pytest.mark.parametrize(("tau", "alpha"), [(0.09, 0.3), (0.3, 1.0), (1.0, 5.0), (0.001, 0.001)])
def test_typical_is_medusas_rule(tau: float, alpha: float) -> None:
    for seed in range(25):
        generator = np.random.default_rng(seed)
        tree, logits = random_tree(generator, 20), 2 * generator.normal(size=(20, VOCAB))
        config = GenerationConfig(temperature=0.7, typical_tau=tau, typical_alpha=alpha)
        path, passing = slow_typical(tree, logits, config)
        verdict = Typical(config, CPU).judge(tree, range(20), torch.from_numpy(logits))
        assert list(verdict.path) == path
        assert verdict.next_token in passing


def test_typical_rejects_a_chance_that_only_equals_the_floor() -> None:
    tree = TokenTree(0, 2)
    tree.add(0, 1, "trunk")
    config = GenerationConfig(temperature=1.0, typical_tau=0.125, typical_alpha=100.0)
    assert Typical(config, CPU).judge(tree, range(2), torch.zeros(2, 8)).path == (0,)


def test_typical_judges_the_root_alone() -> None:
    config = GenerationConfig(temperature=1.0, typical_tau=0.09, typical_alpha=0.3)
    verdict = Typical(config, CPU).judge(TokenTree(0, 1), [0], choosing(6) * 20)
    assert (verdict.path, verdict.next_token, verdict.accepted) == ((0,), 6, {})


def test_the_configuration_names_the_rule() -> None:
    assert isinstance(build_acceptance(GenerationConfig(), CPU), Greedy)
    assert isinstance(build_acceptance(GenerationConfig(temperature=0.7), CPU), Sampling)
    assert isinstance(build_acceptance(GenerationConfig(temperature=0.7, typical_tau=0.09, typical_alpha=0.3), CPU), Typical)


@pytest.mark.parametrize(
    "fields",
    [
        {"typical_tau": 0.09, "temperature": 0.7},
        {"typical_alpha": 0.3, "temperature": 0.7},
        {"typical_tau": 0.09, "typical_alpha": 0.3},
        {"typical_tau": 0.09, "typical_alpha": 0.3, "temperature": 0.7, "top_p": 0.9},
        {"temperature": -1.0},
        {"top_p": 0.0, "temperature": 1.0},
        {"top_k": 5},
        {"max_new_tokens": 0},
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CatsError):
        GenerationConfig(**fields)
