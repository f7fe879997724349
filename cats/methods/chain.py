"""Drafting a chain through an early exit: what CATS, Kangaroo and EAGLE-self's chain share."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cats.planning.plan import EXACT, View

if TYPE_CHECKING:
    from cats.state import Cycle


@dataclass(frozen=True)
class Chain:
    """A drafted chain.

    Attributes:
        nodes: the node drafted from, then the drafted ones; m + 1 in all.
        top_tokens, top_scores: the draft's k best tokens after nodes[i] and their log-probabilities, for i < m.
    """

    nodes: list[int]
    top_tokens: list[list[int]]
    top_scores: list[list[float]]


def draft_chain(cycle: "Cycle", adapter: str, start: int, steps: int, threshold: float, topk: int, view: View = EXACT) -> Chain:
    """Draft up to `steps` tokens greedily after node `start`; from the second on, stop below `threshold`.

    The newest token runs through `[0, d)` of the view, the adapter and lm_head; its best successor becomes the next node. Tokens stay
    on the device until the chain is complete, unless a threshold has to be looked at.
    """
    exit_layer = cycle.state.exits[adapter]
    nodes, tokens, scores = [start], [], []
    while len(nodes) <= steps and cycle.tree.depths[nodes[-1]] < cycle.depth_limit:
        cycle.advance(nodes[-1:], exit_layer, view)
        best = torch.log_softmax(cycle.adapter_logits(adapter, nodes[-1:])[0].float(), dim=-1).topk(topk)
        if threshold > 0 and len(nodes) > 1 and float(best.values[0].exp()) < threshold:
            break
        nodes.append(cycle.tree.add_unknown(nodes[-1], "trunk"))
        cycle.name_token(nodes[-1], best.indices[0])
        tokens.append(best.indices)
        scores.append(best.values)
    chain = Chain(nodes, torch.stack(tokens).tolist() if tokens else [], torch.stack(scores).tolist() if scores else [])
    for node, ids, values in zip(chain.nodes[1:], chain.top_tokens, chain.top_scores, strict=True):
        cycle.tree.resolve(node, ids[0], values[0])
    return chain
