"""Which drafted tokens stand: three rules, each a function of the tree and the target's logits alone.

A rule never looks at how the tree was drawn. That makes `Greedy` and `Sampling` lossless for any tree, whether its
siblings are the draft's best tokens or samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cats.config import GenerationConfig
from cats.tree import TokenTree


@dataclass(frozen=True)
class Verdict:
    """What the target decided.

    Attributes:
        path: accepted nodes from the root (always included) on.
        next_token: the target's own token after the path.
        accepted: for every verified node but the root, whether the target takes it after its parent.
    """

    path: tuple[int, ...]
    next_token: int
    accepted: dict[int, bool]


class Acceptance(Protocol):
    """A rule. `nodes` are the verified nodes as `Method.propose` returns them; row i of `logits_TV` belongs to nodes[i]."""

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """Choose the path and the next token."""
        ...


def follow(tree: TokenTree, nodes: Sequence[int], choices: Sequence[int]) -> Verdict:
    """Walk from the root to the child that carries the target's choice, as long as there is one."""
    choice = dict(zip(nodes, choices, strict=True))
    path = [0]
    while (child := tree.child(path[-1], choice[path[-1]])) is not None and child in choice:
        path.append(child)
    accepted = {node: tree.tokens[node] == choice[tree.parents[node]] for node in nodes if node and tree.kinds[node] != "probe"}
    return Verdict(tuple(path), choice[path[-1]], accepted)


class Greedy:
    """Lossless: the committed tokens are exactly those of greedy decoding, since a child stands only if it is the argmax."""

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """See `Acceptance`."""
        return follow(tree, nodes, logits_TV.argmax(dim=-1).tolist())


class Sampling:
    """Lossless: the committed tokens are distributed as the target's own samples at this temperature, top-p and top-k.

    At every node the target draws its own token x ~ p(. | path); the walk goes on where a child carries x, and ends with
    x as the next token where none does. Each token of the output is thus a draw from p given the tokens before it,
    whatever the tree: P(output = x_1..x_m) = prod p(x_i | x_<i).

    Every token of the answer has a random number of its own, the i-th of the seed, which picks from the cumulative distribution. Nodes of
    one depth share it: at most one of them is used. So a seed gives one text, whatever is drafted and by which method.
    """

    def __init__(self, config: GenerationConfig):
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self._numbers: list[float] = []
        """Of the tokens to come, as far as they have been drawn."""

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """See `Acceptance`."""
        depths = [tree.depths[node] for node in nodes]
        missing = max(depths) + 1 - len(self._numbers)
        if missing > 0:
            self._numbers += torch.rand(missing, generator=self.generator, dtype=torch.float64).tolist()
        numbers_T = torch.tensor([self._numbers[depth] for depth in depths], dtype=torch.float64, device=logits_TV.device)
        verdict = follow(tree, nodes, picked(warped_probabilities(logits_TV, self.config), numbers_T).tolist())
        del self._numbers[: len(verdict.path)]
        return verdict


class Typical:
    """Relaxed, NOT lossless: a child stands if its probability exceeds min(tau, alpha * exp(-H)), H the entropy there.

    Medusa (Cai et al. 2024), section 2.3.1. The longest accepted path is kept; between equals, the one of higher
    probability under the target. The next token is drawn from the tokens that pass the same rule, renormalised (the best
    token where none passes).
    """

    def __init__(self, config: GenerationConfig, device: torch.device):
        self.config = config
        self.generator = torch.Generator(device).manual_seed(config.seed)

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        """See `Acceptance`."""
        probabilities_TV = torch.softmax(logits_TV.float() / self.config.temperature, dim=-1)
        entropy_T = -torch.special.xlogy(probabilities_TV, probabilities_TV).sum(-1)
        floor_T = torch.clamp(self.config.typical_alpha * torch.exp(-entropy_T), max=self.config.typical_tau)
        row = {node: position for position, node in enumerate(nodes)}
        judged = [node for node in nodes if node and tree.kinds[node] != "probe"]
        rows = torch.tensor([row[tree.parents[node]] for node in judged], dtype=torch.long, device=logits_TV.device)
        tokens = torch.tensor([tree.tokens[node] for node in judged], dtype=torch.long, device=logits_TV.device)
        chances = probabilities_TV[rows, tokens]
        accepted = dict(zip(judged, (chances > floor_T[rows]).tolist(), strict=True))
        path = longest_path(tree, accepted, dict(zip(judged, chances.log().tolist(), strict=True)))
        return Verdict(tuple(path), self._next_token(probabilities_TV[row[path[-1]]], float(floor_T[row[path[-1]]])), accepted)

    def _next_token(self, probabilities_V: torch.Tensor, floor: float) -> int:
        passing_V = torch.where(probabilities_V > floor, probabilities_V, 0.0)
        if float(passing_V.sum()) == 0.0:
            return int(probabilities_V.argmax())
        return int(torch.multinomial(passing_V, 1, generator=self.generator))


def longest_path(tree: TokenTree, accepted: dict[int, bool], log_chances: dict[int, float]) -> list[int]:
    """The longest path of accepted nodes from the root; between equals, the one of highest total log-probability."""
    reached = {0: 0.0}
    for node, stands in accepted.items():
        if stands and tree.parents[node] in reached:
            reached[node] = reached[tree.parents[node]] + log_chances[node]
    return tree.path(max(reached, key=lambda node: (tree.depths[node], reached[node])))


def warped_probabilities(logits_TV: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Softmax at the temperature, cut to the top-k and then to the smallest set that holds top-p, as transformers does."""
    logits_TV = logits_TV.float() / config.temperature
    if 0 < config.top_k < logits_TV.shape[-1]:
        least = logits_TV.topk(config.top_k, dim=-1).values[:, -1:]
        logits_TV = logits_TV.masked_fill(logits_TV < least, float("-inf"))
    probabilities_TV = torch.softmax(logits_TV, dim=-1)
    if config.top_p < 1.0:
        ordered_TV, order_TV = probabilities_TV.sort(dim=-1, descending=True)
        outside_TV = ordered_TV.cumsum(-1) - ordered_TV >= config.top_p
        probabilities_TV = probabilities_TV.masked_fill(outside_TV.scatter(-1, order_TV, outside_TV), 0.0)
        probabilities_TV = probabilities_TV / probabilities_TV.sum(-1, keepdim=True)
    return probabilities_TV


def picked(probabilities_TV: torch.Tensor, numbers_T: torch.Tensor) -> torch.Tensor:
    """The token [T] of each row in whose part of the row's total a number in [0, 1) falls; never one of probability 0."""
    cumulative_TV = probabilities_TV.cumsum(-1, dtype=torch.float64)
    below_one = 1 - 2.0**-40  # so that rounding cannot carry the product to the total
    wanted_T1 = (numbers_T.clamp(max=below_one) * cumulative_TV[:, -1])[:, None]
    return torch.searchsorted(cumulative_TV, wanted_T1, right=True)[:, 0]


def build_acceptance(config: GenerationConfig, device: torch.device) -> Acceptance:
    """The rule that `config` asks for."""
    if config.temperature == 0:
        return Greedy()
    return Typical(config, device) if config.typical_tau > 0 else Sampling(config)
