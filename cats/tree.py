"""The tree of tokens that one cycle drafts: tokens, parents, depths, scores, kinds. Integers and floats; no model.

Node 0 is the root, the last committed token. A node's index is larger than its parent's, and never changes.
"""

from collections.abc import Iterable, Sequence

import numpy as np

UNKNOWN = -1


class TokenTree:
    """Drafted continuations of `root`.

    Attributes:
        tokens, parents, depths: one entry a node.
        scores: cumulative log-probability of the path to the node, as its drafter sees it.
        kinds: "root", "trunk", "sibling", "correction", "continuation", "lookup", "probe", ..
        ancestors_TT: bool [capacity, capacity]; row n marks the nodes that node n sees, itself included.
    """

    def __init__(self, root: int, capacity: int):
        self.capacity = capacity
        self.tokens, self.parents, self.depths = [root], [-1], [0]
        self.scores, self.kinds = [0.0], ["root"]
        self.ancestors_TT = np.eye(capacity, dtype=bool)
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, kind: str, log_probability: float = 0.0) -> int:
        """Append a child and return its index; a child that is already there under this token is returned as it stands."""
        known = self._children.get((parent, token))
        if known is not None:
            return known
        node = self._append(parent, token, kind, self.scores[parent] + log_probability)
        self._children[parent, token] = node
        return node

    def add_unknown(self, parent: int, kind: str) -> int:
        """Append a child whose token is still on the device; `resolve` must name it before verification."""
        return self._append(parent, UNKNOWN, kind, self.scores[parent])

    def resolve(self, node: int, token: int, log_probability: float) -> None:
        """Name the token of a node that `add_unknown` made."""
        parent = self.parents[node]
        if self.tokens[node] != UNKNOWN or (parent, token) in self._children:
            raise RuntimeError(f"node {node} cannot become token {token}: it is known, or its parent {parent} has that child already")
        self.tokens[node] = token
        self.scores[node] = self.scores[parent] + log_probability
        self._children[parent, token] = node

    def add_probe(self, parent: int, token: int) -> int:
        """Append a query row that is computed like a node but can never be accepted (Lookahead's window)."""
        return self._append(parent, token, "probe", self.scores[parent])

    def _append(self, parent: int, token: int, kind: str, score: float) -> int:
        node = len(self.tokens)
        if node >= self.capacity:
            raise RuntimeError(f"the tree holds at most {self.capacity} nodes: the method's max_nodes is too small")
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.scores.append(score)
        self.kinds.append(kind)
        self.ancestors_TT[node] |= self.ancestors_TT[parent]
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The child of `parent` that carries `token`, if there is one that may be accepted."""
        return self._children.get((parent, token))

    def children(self, parent: int) -> list[int]:
        """Children of `parent` that may be accepted."""
        return [node for (above, _), node in self._children.items() if above == parent]

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = [node]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]

    def path_tokens(self, node: int) -> list[int]:
        """Tokens on the path to `node`, without the root's."""
        return [self.tokens[step] for step in self.path(node)[1:]]


def best_candidates(candidates: Iterable[tuple[float, int, int]], count: int) -> Sequence[tuple[float, int, int]]:
    """The `count` candidates (score, parent, token) of highest score; ties go to the one offered first."""
    return sorted(candidates, key=lambda candidate: -candidate[0])[: max(0, count)]
