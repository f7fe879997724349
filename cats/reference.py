"""CATS, slowly: no cache, no packing, no tree rows, one plain forward for every question asked of a model.

Read this first. It follows the paper (section 4.2, appendix A) in its own order and is the oracle of the tests: the fast
engine must propose the same trees and commit the same tokens. A tree is a dict from paths to kinds, a path being the
tuple of tokens after the committed text; () is the root.
"""

from collections.abc import Callable, Sequence

import torch

from cats.cats_model import MultiAdapterCATSModel
from cats.methods.cascade import CascadeConfig

Path = tuple[int, ...]
Scores = list[float]
Tree = dict[Path, str]
"""Path -> kind."""


class Exits:
    """The three models inside the model, each a function from text to log-probabilities [V] of the next token."""

    def __init__(self, model: MultiAdapterCATSModel):
        self.model = model

    def draft(self, text: Sequence[int]) -> torch.Tensor:
        """Layers [0, d), draft adapter, lm_head."""
        return self._adapter("draft", text)

    def shallow(self, text: Sequence[int]) -> torch.Tensor:
        """Layers [0, s), shallow adapter, lm_head."""
        return self._adapter("shallow", text)

    def target(self, text: Sequence[int]) -> torch.Tensor:
        """All layers, final norm, lm_head."""
        base = self.model.base
        states = base.hidden_states(torch.tensor([list(text)], device=base.device), [base.layer_count])
        return base.target_logits(states[base.layer_count])[0, -1].float().log_softmax(-1)

    def _adapter(self, name: str, text: Sequence[int]) -> torch.Tensor:
        base, adapter = self.model.base, self.model.adapters[name]
        exit_layer = self.model.exits((name,))[name]
        states = base.hidden_states(torch.tensor([list(text)], device=base.device), [exit_layer])
        return base.lm_head(adapter(states[exit_layer]))[0, -1].float().log_softmax(-1)


def draft_trunk(exits: Exits, text: list[int], start: Path, config: CascadeConfig, depth_limit: int) -> tuple[list[Path], list[list[int]]]:
    """Step 1: draft greedily after `start`. Returns the trunk's paths, start included, and the top-k tokens after each but the last."""
    trunk, tops = [start], []
    while len(trunk) <= config.steps and len(trunk[-1]) < depth_limit:
        best = exits.draft([*text, *trunk[-1]]).topk(config.tree_topk)
        if config.threshold > 0 and len(trunk) > 1 and float(best.values[0].exp()) < config.threshold:
            break
        tops.append(best.indices.tolist())
        trunk.append((*trunk[-1], tops[-1][0]))
    return trunk, tops


def propose(exits: Exits, text: list[int], config: CascadeConfig, depth_limit: int) -> Tree:
    """Steps 1 to 3: the tree that one cycle offers to the target."""
    tree: Tree = {(): "root"}
    scores: dict[Path, float] = {(): 0.0}
    corrections: list[Path] = []
    offered: dict[Path, tuple[float, str]] = {}
    start: Path | None = ()
    rounds = 0
    while start is not None and rounds < config.sv_passes:
        trunk, tops = draft_trunk(exits, text, start, config, depth_limit)
        tree |= dict.fromkeys(trunk[1:], "trunk")
        start = None
        for place, path in enumerate(trunk):
            verifier = exits.shallow([*text, *path])
            if len(path) < depth_limit:
                for token in [*verifier.topk(config.tree_topk).indices.tolist(), *(tops[place] if place < len(tops) else [])]:
                    offered[*path, token] = (scores[path] + float(verifier[token]), "sibling")
            choice = (*path, int(verifier.argmax()))
            drafted = trunk[place + 1] if place + 1 < len(trunk) else None
            if drafted is not None:
                scores[drafted] = scores[path] + float(verifier[drafted[-1]])
            if choice == drafted or len(path) >= depth_limit:
                continue
            tree[choice], scores[choice] = "correction", scores[path] + float(verifier.max())
            corrections.append(choice)
            start = choice if start is None else start
        rounds += 1
    automatic = rounds * config.steps * config.tree_topk + 1 + len(corrections)
    total = automatic if config.total_tokens == -1 else config.total_tokens
    continued = [path for path in corrections if not any(other[:-1] == path for other in tree if other)]
    for branch_round in range(config.branch_rounds if total > len(tree) else 0):
        for path in continued:
            if len(path) < depth_limit:
                best = exits.draft([*text, *path]).topk(config.tree_topk)
                for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                    offered[*path, token] = (scores[path] + value, "continuation")
        fresh = sorted((path for path in offered if path not in tree), key=lambda path: -offered[path][0])
        last = branch_round == config.branch_rounds - 1
        continued = fresh[: max(0, total - len(tree)) if last else min(total - len(tree), config.tree_topk)]
        for path in continued:
            scores[path], tree[path] = offered[path]
    return tree


def accept(target: Callable[[Sequence[int]], torch.Tensor], text: list[int], tree: Tree) -> list[int]:
    """Steps 4 and 5, greedy: follow the target's argmax through the tree; its first token outside is the next token."""
    path: Path = ()
    while True:
        path = (*path, int(target([*text, *path]).argmax()))
        if path not in tree:
            return list(path)


@torch.inference_mode()
def generate(
    model: MultiAdapterCATSModel, prompt: Sequence[int], config: CascadeConfig, max_new_tokens: int, eos: Sequence[int] = ()
) -> tuple[list[int], list[Tree]]:
    """Greedy CATS without any cleverness: the new tokens, and the tree of every cycle."""
    exits, text, trees = Exits(model), list(prompt), []
    end = min(len(prompt) + max_new_tokens, model.base.context)
    text += accept(exits.target, text, {(): "root"})
    while len(text) < end and text[-1] not in eos:
        trees.append(propose(exits, text, config, depth_limit=end - len(text) - 1))
        new = accept(exits.target, text, trees[-1])
        stops = [place for place, token in enumerate(new) if token in eos]
        text += new[: stops[0] + 1] if stops else new
    return text[len(prompt) :], trees
