"""Tree, masks and cache on their own: small cases by hand, and the rules that hold for every tree."""

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from cats.kv_cache import KVCache
from cats.masks import causal_bias, tree_bias
from cats.tree import TokenTree, best_candidates

CPU = torch.device("cpu")


def random_tree(size: int, seed: int) -> TokenTree:
    generator = np.random.default_rng(seed)
    tree = TokenTree(1, size)
    while len(tree) < size:
        tree.add(int(generator.integers(len(tree))), int(generator.integers(50)), "trunk", -float(generator.random()))
    return tree


def test_a_child_is_added_once_and_found_again() -> None:
    tree = TokenTree(7, 4)
    child = tree.add(0, 5, "trunk", -0.5)
    assert tree.add(0, 5, "sibling", -9.0) == child
    assert (tree.kinds[child], tree.scores[child], len(tree)) == ("trunk", -0.5, 2)
    assert tree.child(0, 5) == child
    assert tree.child(child, 5) is None


def test_probes_are_rows_but_no_children() -> None:
    tree = TokenTree(7, 4)
    probe = tree.add_probe(0, 5)
    assert tree.child(0, 5) is None
    assert tree.children(0) == []
    assert tree.ancestors_TT[probe].nonzero()[0].tolist() == [0, probe]


def test_unknown_tokens_are_resolved_once() -> None:
    tree = TokenTree(7, 4)
    node = tree.add_unknown(0, "trunk")
    tree.resolve(node, 3, -1.0)
    assert tree.child(0, 3) == node
    with pytest.raises(RuntimeError, match="cannot become token 4"):
        tree.resolve(node, 4, -1.0)
    twin = tree.add_unknown(0, "trunk")
    with pytest.raises(RuntimeError, match="has that child already"):
        tree.resolve(twin, 3, -1.0)


def test_a_full_tree_says_so() -> None:
    tree = TokenTree(7, 2)
    tree.add(0, 1, "trunk")
    with pytest.raises(RuntimeError, match="at most 2 nodes"):
        tree.add(0, 2, "trunk")


@pytest.mark.parametrize("seed", range(5))
def test_ancestors_are_paths(seed: int) -> None:
    tree = random_tree(30, seed)
    for node in range(len(tree)):
        path = tree.path(node)
        assert tree.ancestors_TT[node].nonzero()[0].tolist() == sorted(path)
        assert tree.depths[node] == len(path) - 1
        assert all(tree.scores[later] <= tree.scores[earlier] for earlier, later in itertools.pairwise(path))


def test_best_candidates_keep_the_order_of_ties() -> None:
    offers = [(-1.0, 0, 1), (-0.5, 0, 2), (-1.0, 0, 3), (-2.0, 0, 4)]
    assert list(best_candidates(offers, 3)) == [(-0.5, 0, 2), (-1.0, 0, 1), (-1.0, 0, 3)]
    assert list(best_candidates(offers, -1)) == []


@pytest.mark.parametrize(("prefix", "before"), [(0, 0), (5, 0), (5, 3)])
def test_tree_bias_shows_prefix_and_ancestors_only(prefix: int, before: int) -> None:
    tree = random_tree(12, 3)
    rows = [2, 5, 6, 11]
    bias = tree_bias(tree.ancestors_TT[rows], prefix, torch.float32, CPU, before)
    assert bias is not None
    visible = (bias[0, 0] == 0).numpy()
    for row, node in enumerate(rows):
        expected = [True] * prefix + tree.ancestors_TT[node].tolist()
        assert visible[before + row].tolist() == expected
    for row in range(before):
        seen = prefix - before + row + 1
        assert visible[row].tolist() == [True] * seen + [False] * (prefix + 12 - seen)


def test_no_bias_where_nothing_is_hidden() -> None:
    assert tree_bias(np.ones((1, 4), dtype=bool), 3, torch.float32, CPU) is None
    assert tree_bias(np.array([[True, False]]), 3, torch.float32, CPU) is not None
    assert causal_bias(1, 9, torch.float32, CPU) is None
    assert causal_bias(9, 0, torch.float32, CPU) is None


def test_causal_bias_continues_a_prefix() -> None:
    bias = causal_bias(3, 2, torch.float32, CPU)
    assert bias is not None
    assert (bias[0, 0] == 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]


def cache_of(capacity: int) -> KVCache:
    config = LlamaConfig(hidden_size=8, num_attention_heads=4, num_key_value_heads=2)
    return KVCache(config, 2, capacity, torch.float32, CPU)


def write(cache: KVCache, slots: slice | torch.Tensor, values: list[float], end: int) -> None:
    entries = torch.tensor(values)[None, None, :, None].expand(1, 2, -1, 2)
    for layer in range(2):
        with cache.writing(slots, end):
            keys, _ = cache.update(entries, -entries, layer)
            assert keys.shape == (1, 2, end, 2)


def test_the_cache_keeps_exactly_the_path() -> None:
    cache = cache_of(10)
    write(cache, slice(0, 2), [10.0, 11.0], 2)
    cache.length = 2
    write(cache, slice(2, 4), [20.0, 21.0], 4)
    write(cache, torch.tensor([5, 4, 6]), [23.0, 22.0, 24.0], 7)
    cache.keep([0, 2, 4])
    assert cache.get_seq_length() == 5
    assert cache.storage[1, 0, 0, 0, :5, 0].tolist() == [10, 11, 20, 22, 24]
    assert cache.storage[1, 1, 0, 1, :5, 0].tolist() == [-10, -11, -20, -22, -24]
    cache.crop(3)
    assert cache.length == 3


def test_a_cache_that_is_too_small_says_so() -> None:
    cache = cache_of(4)
    with pytest.raises(RuntimeError, match="beyond the cache's 4 slots"), cache.writing(slice(0, 5), 5):
        pass
    assert cache.nbytes == 2 * 2 * 2 * 4 * 2 * 4
