"""CATS, slowly: no cache, no packing, no tree rows, one plain forward for every question asked of a model.

Read this first. It follows the paper (section 4.2, appendix A) in its own order and is the oracle of the tests: the fast
engine must propose the same trees and commit the same tokens. A tree is a dict from paths to kinds, a path being the
tuple of tokens after the committed text; () is the root.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from cats.cats_model import MultiAdapterCATSModel
from cats.methods.cascade import CascadeConfig

Path = tuple[int, ...]
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


def draft_trunk(exits: Exits, text: list[int], start: Path, config: CascadeConfig, depth_limit: int) -> list[Path]:
    """Step 1: draft greedily after `start`. Returns the trunk's paths, start included."""
    trunk = [start]
    while len(trunk) <= config.steps and len(trunk[-1]) < depth_limit:
        best = exits.draft([*text, *trunk[-1]])
        if config.threshold > 0 and len(trunk) > 1 and float(best.max().exp()) < config.threshold:
            break
        trunk.append((*trunk[-1], int(best.argmax())))
    return trunk


def propose(exits: Exits, text: list[int], config: CascadeConfig, depth_limit: int) -> Tree:
    """Steps 1 to 3: the tree that one cycle offers to the target."""
    if config.tree_topk > 1:
        return propose_tree(exits, text, config, depth_limit) if depth_limit > 0 else {(): "root"}
    tree: Tree = {(): "root"}
    start: Path | None = ()
    for _ in range(config.sv_passes):
        if start is None:
            break
        trunk = draft_trunk(exits, text, start, config, depth_limit)
        tree |= dict.fromkeys(trunk[1:], "trunk")
        corrections = corrected(trunk, [int(exits.shallow([*text, *path]).argmax()) for path in trunk])
        entering = [path for path in corrections if len(path) <= depth_limit]
        tree |= dict.fromkeys(entering, "correction")
        start = corrections[0] if corrections[0] in entering else None
    return tree


def corrected(trunk: list[Path], said: list[int]) -> list[Path]:
    """Where the verifier says another token than the trunk has, its token; after the trunk's last it always does."""
    return [(*path, token) for path, token in zip(trunk, said, strict=False) if (*path, token) not in trunk]


def propose_tree(exits: Exits, text: list[int], config: CascadeConfig, depth_limit: int) -> Tree:
    """Steps 1 to 3 with EAGLE's branches."""
    growth = Branching(exits, text, config.tree_topk, depth_limit)
    trunk: list[Path] = [()]
    level: list[Path] = [()]
    while True:
        growth.draft(level)
        token, value = next(iter(growth.drafted[trunk[-1]].items()))
        if len(trunk) > config.steps or (len(trunk) > 1 and math.exp(value) < config.threshold):
            break
        trunk.append((*trunk[-1], token))
        growth.scores[trunk[-1]] = growth.scores[trunk[-2]] + growth.offers[trunk[-2]][token]
        if len(trunk[-1]) == depth_limit:
            break
        beside = [path for path in growth.best(level, config.tree_topk) if path != trunk[-1]]
        level = [trunk[-1], *beside[: config.tree_topk - 1]]
    growth.check()
    corrections = corrected(trunk, [growth.verdicts[path] for path in trunk if path in growth.verdicts])
    for _ in range(config.sv_passes - 1):
        growth.draft_on(config.steps)
        growth.check()
    growth.draft_on(0)
    tree: Tree = {(): "root"} | dict.fromkeys(trunk[1:], "trunk") | dict.fromkeys(corrections, "correction")
    automatic = config.sv_passes * config.steps * config.tree_topk + 1 + len(corrections)
    total = automatic if config.total_tokens == -1 else config.total_tokens
    for _, path in sorted(growth.candidates(growth.offers), key=lambda candidate: -candidate[0]):
        if len(tree) >= total:
            break
        tree.setdefault(path, "sibling" if path[:-1] in trunk else "continuation")
    return tree


class Branching:
    """What the exits say of the paths looked at so far: which tokens may follow each, with log-probabilities of acceptance."""

    def __init__(self, exits: Exits, text: list[int], topk: int, depth_limit: int):
        self.exits, self.text, self.topk, self.depth_limit = exits, text, topk, depth_limit
        adapters = exits.model.exits(("draft", "shallow"))
        self.calibration = exits.model.adapters["shallow"].calibration.for_draft(adapters["draft"])
        self.scores: dict[Path, float] = {(): 0.0}
        self.drafted: dict[Path, dict[int, float]] = {}
        self.offers: dict[Path, dict[int, float]] = {}
        self.verdicts: dict[Path, int] = {}

    def draft(self, level: list[Path]) -> None:
        """The draft's best tokens after each path."""
        for path in (path for path in level if len(path) < self.depth_limit):
            best = self.exits.draft([*self.text, *path]).topk(self.topk)
            tokens, scores = best.indices.tolist(), self.calibration.after_draft(best.values)
            self.drafted[path] = dict(zip(tokens, best.values.tolist(), strict=True))
            self.offers[path] = dict(zip(tokens, scores.tolist(), strict=True))

    def draft_on(self, steps: int) -> None:
        """From the best paths that were not looked at yet, and `steps` levels below them."""
        level = self.best(list(self.offers), self.topk)
        for _ in range(steps):
            self.draft(level)
            level = self.best(level, self.topk)
        self.draft(level)

    def check(self) -> None:
        """The shallow verifier's scores of the draft's tokens and of its own best; where the draft said nothing, it means its least."""
        for path in [path for path in self.offers if path not in self.verdicts]:
            verifier = self.exits.shallow([*self.text, *path])
            self.verdicts[path] = int(verifier.argmax())
            least = min(self.drafted[path].values())
            tokens = list(dict.fromkeys([*verifier.topk(self.topk).indices.tolist(), *self.drafted[path]]))
            draft = torch.tensor([self.drafted[path].get(token, least) for token in tokens])
            self.offers[path] = dict(zip(tokens, self.calibration.after_check(draft, verifier[tokens]).tolist(), strict=True))
        for path in sorted(self.scores, key=len)[1:]:
            self.scores[path] = self.scores[path[:-1]] + self.offers[path[:-1]][path[-1]]

    def candidates(self, paths: Iterable[Path]) -> list[tuple[float, Path]]:
        """What may follow these paths, with cumulative scores."""
        looked = [path for path in paths if path in self.offers]
        return [(self.scores[path] + score, (*path, token)) for path in looked for token, score in self.offers[path].items()]

    def best(self, paths: list[Path], count: int) -> list[Path]:
        """The best of them that were not looked at yet."""
        fresh = [candidate for candidate in self.candidates(paths) if candidate[1] not in self.offers]
        chosen = sorted(fresh, key=lambda candidate: -candidate[0])[:count]
        self.scores |= {path: score for score, path in chosen}
        return [path for _, path in chosen]


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
