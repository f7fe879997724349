"""The tree of tokens that one cycle drafts: tokens, parents, depths, scores, kinds. Integers and floats; no model.

Node 0 is the root, the last committed token. A node's index is larger than its parent's, and never changes.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from cats.errors import ContractError

UNKNOWN = -1


class TokenTree:
    """Drafted continuations of `root`.

    Args:
        capacity: nodes at most, root included; one more raises `ContractError`.
        depth_limit: depth of the deepest node that may be added, a probe included; a deeper one raises `ContractError`. None: any.

    Attributes:
        tokens, parents, depths: one entry a node.
        scores: cumulative log-probability of the path to the node, as its drafter sees it.
        kinds: "root", "trunk", "sibling", "correction", "continuation", "lookup", "probe", ..
        ancestors_TT: bool [capacity, capacity]; row n marks the nodes that node n sees, itself included.
    """

    def __init__(self, root: int, capacity: int, depth_limit: int | None = None):
        self.capacity, self.depth_limit = capacity, depth_limit
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
        node, depth = len(self.tokens), self.depths[parent] + 1
        if node >= self.capacity:
            raise ContractError(f"the tree holds at most {self.capacity} nodes: the method's max_nodes is too small")
        if self.depth_limit is not None and depth > self.depth_limit:
            raise ContractError(f"a {kind} node at depth {depth} is below the cycle's depth_limit {self.depth_limit}")
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth)
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

    def check_choice(self, nodes: Sequence[int]) -> None:
        """Raise `ContractError` unless `nodes` can be verified: root first, ascending, parents among them, no token unknown."""
        if not nodes or nodes[0] != 0:
            raise ContractError(f"the proposed nodes {list(nodes)} do not begin with the root, node 0")
        chosen = set(nodes)
        for before, node in pairwise(nodes):
            if node <= before:
                raise ContractError(f"the proposed nodes are not in ascending order: {node} follows {before}")
            if node >= len(self.tokens):
                raise ContractError(f"the proposed node {node} is not in the tree, which has {len(self.tokens)} nodes")
            if self.parents[node] not in chosen:
                raise ContractError(f"the proposed node {node} comes without its parent {self.parents[node]}")
            if self.tokens[node] == UNKNOWN:
                raise ContractError(f"the token of the proposed node {node} was never named; call resolve")


def best_candidates(candidates: Iterable[tuple[float, int, int]], count: int) -> Sequence[tuple[float, int, int]]:
    """The `count` candidates (score, parent, token) of highest score; ties go to the one offered first."""
    return sorted(candidates, key=lambda candidate: -candidate[0])[: max(0, count)]
