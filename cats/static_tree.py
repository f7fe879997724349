"""The best static tree of N nodes where a node's guess of rank r at depth k is right with a known probability. Arithmetic only, no model.

A node of a static tree is a path of ranks, (0,) for the best guess at depth 1, (0, 2) for the third best guess at depth 2 below it. A
path is accepted with the product of its ranks' probabilities, and the expected number of accepted tokens is the sum over all nodes.
"""

from collections.abc import Sequence

Path = tuple[int, ...]


def best_tree(accuracy: Sequence[Sequence[float]], nodes: int) -> list[Path]:
    """The tree of at most `nodes` nodes, root left out, with the most expected accepted tokens, by Sequoia's dynamic programme.

    Args:
        accuracy: for depth 1, 2, .. the probabilities of the guesses of rank 0, 1, ..; its length bounds the depth.

    Returns:
        paths of ranks, by depth and then in the order of the ranks, so that a parent comes before its children.
    """
    return sorted(_Forests(accuracy, nodes).paths(0, nodes), key=lambda path: (len(path), path))


def expected_tokens(accuracy: Sequence[Sequence[float]], paths: Sequence[Path]) -> float:
    """Tokens that a tree has accepted on average, the target's own next one not counted."""
    total = 0.0
    for path in paths:
        share = 1.0
        for depth, rank in enumerate(path):
            share *= accuracy[depth][rank]
        total += share
    return total


class _Forests:
    """For every depth and size the best forest of children below one node, from the deepest level up.

    `worth[d][m]`: expected accepted tokens of the best m nodes below a node of depth d, given that this one is accepted.
    `sizes[d][j][m]`: how many of m nodes, shared among the guesses of rank 0 .. j, the one of rank j and what is below it take.
    """

    def __init__(self, accuracy: Sequence[Sequence[float]], nodes: int):
        self.worth = [[0.0] * (nodes + 1) for _ in range(len(accuracy) + 1)]
        self.sizes: list[list[list[int]]] = [[] for _ in accuracy]
        for depth in reversed(range(len(accuracy))):
            for share in accuracy[depth]:
                self.worth[depth], taken = self._with_one_more(self.worth[depth], self.worth[depth + 1], share)
                self.sizes[depth].append(taken)

    @staticmethod
    def _with_one_more(others: list[float], below: list[float], share: float) -> tuple[list[float], list[int]]:
        """Best worth of each number of nodes when one more guess, right with probability `share`, may take some of them, and how many."""
        worth, taken = [], []
        for count in range(len(others)):
            # A guess that takes t nodes is one itself and has t - 1 below it; of equals, the smallest t leaves most to earlier ranks.
            values = [others[count]] + [others[count - t] + share * (1 + below[t - 1]) for t in range(1, count + 1)]
            best = max(range(count + 1), key=values.__getitem__)
            worth.append(values[best])
            taken.append(best)
        return worth, taken

    def paths(self, depth: int, count: int) -> list[Path]:
        """The forest of `count` nodes below a node of this depth, as paths of ranks from there."""
        forest: list[Path] = []
        if depth == len(self.sizes):
            return forest
        for rank in reversed(range(len(self.sizes[depth]))):
            taken = self.sizes[depth][rank][count]
            if taken:
                forest.append((rank,))
                forest += [(rank, *path) for path in self.paths(depth + 1, taken - 1)]
            count -= taken
        return forest
