"""CATS with EAGLE's branches: the draft's dynamic tree inside the tree that the target verifies, within one budget of nodes.

    draft       level by level, the k best nodes by cumulative log-probability run through [0, d) and the
                draft adapter (EAGLE-2's tree); the greedy chain is always among them                    the trunk
    check       every node that was run, siblings too, through [d, s) in one batch; the shallow adapter
                rescores what may follow each and adds its own best tokens; where its best is not the
                trunk's, that token is                                                                   a correction
    ..          further rounds of both, from the k best nodes that were not run yet
    continue    the draft looks behind the k best that are open then                                     continuations
    choose      trunk and corrections, then the best of everything, as many as the budget holds

All of it runs in resident layers. Scores are log-probabilities of acceptance (cats/calibration.py): by both adapters where the shallow
verifier has been, by the draft's alone where it has not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from cats.calibration import Calibration
from cats.tree import best_candidates

if TYPE_CHECKING:
    from cats.state import Cycle

Candidate = tuple[float, int, int]
"""Score, parent, token."""


class Growth:
    """The tree of one cycle while it grows.

    Args:
        topk: nodes run in a level, and tokens that each adapter offers after a node.

    Attributes:
        trunk, corrections: nodes that are chosen whatever their score; the trunk begins with the root.
        offers: after every node that was run, log-probabilities of acceptance by token.
        verdicts: the shallow verifier's best token after every node that it has checked.
    """

    def __init__(self, cycle: "Cycle", topk: int, calibration: Calibration):
        self.cycle, self.tree, self.topk, self.calibration = cycle, cycle.tree, topk, calibration
        self.trunk, self.corrections = [0], list[int]()
        self.offers: dict[int, dict[int, float]] = {}
        self.verdicts: dict[int, int] = {}
        self._drafted: dict[int, tuple[list[int], list[float]]] = {}

    def draft_trunk(self, steps: int, threshold: float) -> None:
        """Draft the trunk of `steps` tokens and the best branches beside it; all end where its next token falls below `threshold`."""
        level = [0]
        while True:
            self._run(level)
            tip = self.trunk[-1]
            token, said = self._drafted[tip][0][0], self._drafted[tip][1][0]
            if len(self.trunk) > steps or (len(self.trunk) > 1 and math.exp(said) < threshold):
                return
            self.trunk.append(self.tree.add(tip, token, "trunk", self.offers[tip][token]))
            if self.tree.depths[self.trunk[-1]] == self.cycle.depth_limit:
                return
            beside = [offer for offer in self._open(level) if offer[1:] != (tip, token)]
            level = [self.trunk[-1], *self._make(beside, self.topk - 1)]

    def draft_branches(self, steps: int) -> None:
        """Draft on from the best nodes of the whole tree that were not run yet, and up to `steps` levels below them."""
        level = self._make(self._open(self.offers), self.topk)
        for _ in range(steps):
            self._run(level)
            level = self._make(self._open(level), self.topk)
        self._run(level)

    def check(self) -> None:
        """Let the shallow verifier rescore and extend what may follow every node that it has not checked yet."""
        nodes = self._unchecked(self.offers)
        if nodes:
            norm_T1, logits_TV, best = self._shallow(nodes)
            drafted, said = ([self._drafted[node][part] for node in nodes] for part in (0, 1))
            places_TK, said_TK = (torch.tensor(values, device=logits_TV.device) for values in (drafted, said))
            theirs_TK = logits_TV.gather(1, places_TK) - norm_T1
            rescored = self.calibration.after_check(said_TK, theirs_TK).tolist()
            least_TK = said_TK[:, -1:].expand_as(best.values)
            added = self.calibration.after_check(least_TK, best.values - norm_T1).tolist()
            for place, (node, tokens) in enumerate(zip(nodes, best.indices.tolist(), strict=True)):
                known = dict(zip(drafted[place], rescored[place], strict=True))
                self.offers[node] = dict(zip(tokens, added[place], strict=True)) | known
        for node in range(1, len(self.tree)):
            parent = self.tree.parents[node]
            self.tree.scores[node] = self.tree.scores[parent] + self.offers[parent][self.tree.tokens[node]]

    def check_trunk(self) -> None:
        """Ask the shallow verifier along the trunk alone, and leave the draft's scores as they are."""
        nodes = self._unchecked(self.trunk)
        if nodes:
            norm_T1, _, best = self._shallow(nodes)
            added = (best.values[:, :1] - norm_T1)[:, 0].tolist()
            for node, score in zip(nodes, added, strict=True):
                self.offers[node].setdefault(self.verdicts[node], score)

    def correct(self, tokens: Mapping[int, int]) -> None:
        """Let a correction enter after each of these places of the trunk."""
        for place, token in tokens.items():
            after = self.offers[self.trunk[place]]
            after.setdefault(token, min(after.values()))
            correction = self._add((0.0, self.trunk[place], token))
            self.tree.kinds[correction] = "correction"
            self.corrections.append(correction)

    def choose(self, budget: int) -> list[int]:
        """Trunk, corrections and the best of all else, `budget` nodes in all if those are not more, in ascending order."""
        chosen = {*self.trunk, *self.corrections}
        for candidate in sorted(self._candidates(self.offers), key=lambda candidate: -candidate[0]):
            if len(chosen) >= budget:
                break
            chosen.add(self._add(candidate))
        return sorted(chosen)

    def _run(self, level: Sequence[int]) -> None:
        """Nodes above the depth limit through `[0, d)` and the draft adapter, whose best tokens may follow them."""
        nodes = sorted(node for node in level if self.tree.depths[node] < self.cycle.depth_limit)
        if not nodes:
            return
        self.cycle.advance(nodes, self.cycle.state.exits["draft"])
        logits_TV = self.cycle.adapter_logits("draft", nodes).float()
        best = logits_TV.topk(self.topk, dim=-1)
        said_TK = best.values - logits_TV.logsumexp(dim=-1, keepdim=True)
        tokens, said, scores = best.indices.tolist(), said_TK.tolist(), self.calibration.after_draft(said_TK).tolist()
        for place, node in enumerate(nodes):
            self._drafted[node] = (tokens[place], said[place])
            self.offers[node] = dict(zip(tokens[place], scores[place], strict=True))

    def _shallow(self, nodes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.return_types.topk]:
        """Nodes through `[d, s)` and the shallow adapter: normaliser [T, 1], logits [T, V], its k best; notes the verdicts."""
        self.cycle.advance(nodes, self.cycle.state.exits["shallow"])
        logits_TV = self.cycle.adapter_logits("shallow", nodes).float()
        best = logits_TV.topk(self.topk, dim=-1)
        self.verdicts |= dict(zip(nodes, best.indices[:, 0].tolist(), strict=True))
        return logits_TV.logsumexp(dim=-1, keepdim=True), logits_TV, best

    def _unchecked(self, nodes: Iterable[int]) -> list[int]:
        return sorted(node for node in nodes if node in self.offers and node not in self.verdicts)

    def _candidates(self, nodes: Iterable[int]) -> list[Candidate]:
        """Everything that may follow these nodes, parents before children."""
        scores = self.tree.scores
        return [(scores[node] + score, node, token) for node in sorted(nodes) for token, score in self.offers.get(node, {}).items()]

    def _open(self, nodes: Iterable[int]) -> list[Candidate]:
        """Those that were not run yet."""
        return [candidate for candidate in self._candidates(nodes) if self.tree.child(*candidate[1:]) not in self.offers]

    def _make(self, candidates: Sequence[Candidate], count: int) -> list[int]:
        """The best of them as nodes."""
        return [self._add(candidate) for candidate in best_candidates(candidates, count)]

    def _add(self, candidate: Candidate) -> int:
        _, parent, token = candidate
        kind = "sibling" if parent in self.trunk else "continuation"
        return self.tree.add(parent, token, kind, self.offers[parent][token])
