"""The dynamic programme of static trees against every tree there is."""

import random
from itertools import combinations, product

import pytest

from cats.static_tree import Path, best_tree, expected_tokens

Table = list[list[float]]


def table(depth: int, ranks: int, seed: int, ordered: bool) -> Table:
    """Shares of each rank at each depth that sum to at most 1."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(depth):
        shares = [drawn.random() for _ in range(ranks)]
        row = [share / (sum(shares) + drawn.random()) for share in shares]
        rows.append(sorted(row, reverse=True) if ordered else row)
    return rows


def every_path(accuracy: Table) -> list[Path]:
    return [path for depth in range(1, len(accuracy) + 1) for path in product(*(range(len(row)) for row in accuracy[:depth]))]


def every_tree(accuracy: Table, nodes: int) -> list[tuple[Path, ...]]:
    """All sets of so many paths that hold the parent of each of them."""
    return [chosen for chosen in combinations(every_path(accuracy), nodes) if all(len(path) == 1 or path[:-1] in chosen for path in chosen)]


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("depth", "ranks", "nodes"), [(1, 4, 3), (2, 3, 5), (3, 2, 6), (2, 4, 4), (4, 2, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_no_tree_is_better(depth: int, ranks: int, nodes: int, seed: int, ordered: bool) -> None:
    accuracy = table(depth, ranks, seed, ordered)
    best = max(expected_tokens(accuracy, tree) for tree in every_tree(accuracy, nodes))
    found = best_tree(accuracy, nodes)
    assert len(set(found)) == len(found) == nodes
    assert all(len(path) == 1 or path[:-1] in found for path in found)
    assert expected_tokens(accuracy, found) == pytest.approx(best)


def test_the_full_size_takes_the_most_likely_paths() -> None:
    """A path is never more likely than its parent, so the best tree is that of the likeliest paths: the same worth, another way."""
    accuracy = table(4, 10, 7, ordered=True)
    likely = sorted((expected_tokens(accuracy, [path]) for path in every_path(accuracy)), reverse=True)[:63]
    found = best_tree(accuracy, 63)
    assert len(found) == 63
    assert expected_tokens(accuracy, found) == pytest.approx(sum(likely))
    assert found == sorted(found, key=lambda path: (len(path), path))


def test_nodes_that_are_never_right_are_left_out() -> None:
    assert best_tree([[0.5, 0.0], [0.3]], 5) == [(0,), (0, 0)]
    assert best_tree([[0.5]], 0) == []
