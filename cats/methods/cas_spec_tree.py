"""The tree of a CAS-Spec cycle while it grows, under three policies (cats/methods/cas_spec.py), and the levels that grow it.

A node that no level has run, and a token that was offered and is no node yet, are open leaves. Their values are chances that the target
gets there, by what the levels' own probabilities have been worth. What a level says of tokens that are in the tree already (looked up, most
often) replaces what was thought of them.
"""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from cats.methods.prompt_lookup import NgramIndex
from cats.methods.router import TARGET, Choice, Option, Router, best_choice, best_length
from cats.planning.plan import View

if TYPE_CHECKING:
    from cats.state import Cycle

LOOKUP: Literal["lookup"] = "lookup"
EXIT: Literal["exit"] = "exit"
OFFERED, RIVALS, LEAVES = 6, 7, 3
"""Tokens that a level offers behind a node, at most; rivals in a pass; leaves that are weighed against each other."""


class Bounds(NamedTuple):
    """How far a tree grows.

    Attributes:
        order: of the levels, by name.
        longest: tokens that a level drafts at a time, at most.
        nodes: of the tree, root included, at most.
        top_p: share of the chances that a leaf and its rivals hold together, and of a level's probability that its offers hold.
    """

    order: tuple[str, ...]
    longest: int
    nodes: int
    top_p: float


class Level(NamedTuple):
    """A draft that runs a part of the model: layers [0, stop) of a view, and the head, or an adapter and the head.

    Attributes:
        layers: that run, in whole or in part, an adapter among them.
    """

    name: str
    view: View
    stop: int
    layers: int

    def rows(self, cycle: "Cycle", nodes: Sequence[int]) -> list[int]:
        """Those of these nodes, and of the nodes above them, that neither this level nor one that runs more has run."""
        adapter = "draft" if self.name == EXIT else None
        path = {above for node in nodes for above in cycle.tree.path(node)}
        return sorted(node for node in path if not cycle.ready(node, self.stop, self.view, adapter))

    def look(self, cycle: "Cycle", rows: list[int]) -> torch.Tensor:
        """The level's logits [T, V] at nodes, which `rows` made complete."""
        cycle.advance(rows, self.stop, self.view)
        return cycle.adapter_logits("draft", rows) if self.name == EXIT else cycle.target_logits(rows, self.view)


class Leaf(NamedTuple):
    """A node, or a token that may become one, behind which nothing was drafted yet.

    Attributes:
        value: chance that the target gets there and finds nothing drafted.
        token: None where the leaf is the node itself.
    """

    value: float
    node: int
    token: int | None


class Growth:
    """The tree of one cycle while it grows.

    Attributes:
        own: chance of each node that it stands where its parent does.
        offers: tokens that may follow a node that a level ran, with their chances.
        said: of a level's best token, (level, probability that it gave); by node.
    """

    def __init__(self, cycle: "Cycle", router: Router, levels: Sequence[Level], index: NgramIndex, bounds: Bounds):
        self.cycle, self.tree, self.bounds, self.index = cycle, cycle.tree, bounds, index
        self.router, self.levels = router, {level.name: level for level in levels}
        self.own, self.offers, self.looked = [1.0], dict[int, dict[int, float]](), set[int]()
        self.said: dict[int, list[tuple[str, float]]] = {}
        self.best: dict[tuple[int, int], tuple[str, float]] = {}
        self.spent, source, base = 0.0, cycle.state.base.source, cycle.state.base
        self._target, self._whole = self.router.times(TARGET), (base.layer_count, source.plan.streamed_bytes)
        self._row = self._target.row_seconds()

    def dynamic(self) -> list[int]:
        """Grow while that gains more than verifying now."""
        while True:
            with self.cycle.stage("decide"):
                decision = self._decide()
            if decision is None:
                return self.chosen()
            leaf, choice, now = decision
            if choice.level == LOOKUP:
                with self.cycle.stage("draft"):
                    self._look_up(self._made(leaf), choice.length)
            else:
                self._draft(self._made(leaf), choice, now)

    def horizontal(self) -> list[int]:
        """A chain: each level drafts as long as it alone would best, the first one at least a token."""
        tip = 0
        for name in self.bounds.order:
            if name == LOOKUP:
                tip = [tip, *self._look_up(tip, self.bounds.longest)][-1]
                continue
            for _ in range(min(max(self._best_length(name), int(tip == 0)), self._room(tip))):
                self._run(self.levels[name], [tip])
                tip = self._follow(tip)
        return self.tree.path(tip)

    def vertical(self, tip: int = 0, place: int = 0, longest: int | None = None) -> list[int]:
        """A chain behind `tip` that the level at `place` says, the levels below it proposing; from the root on."""
        level, left = self.levels.get(self.bounds.order[place]), self._room(tip)
        wanted = max(1, self._best_length(self.bounds.order[place])) if longest is None else longest
        stop = self.tree.depths[tip] + min(wanted, left)
        while level is not None and self.tree.depths[tip] < stop and self._room(tip):
            chain = [tip]
            most = min(stop - 1 - self.tree.depths[tip], self._room(tip) - 1)
            if place + 1 < len(self.bounds.order) and most > 0:
                below = self.vertical(tip, place + 1, min(most, max(1, wanted // 2)) if self.bounds.order[place + 1] != LOOKUP else most)
                chain = below[self.tree.depths[tip] :]
            self._run(level, chain)
            for node, proposed in zip(chain, [*chain[1:], None], strict=True):
                tip = self._follow(node)
                if tip != proposed:
                    break
        return self.tree.path(tip if level is not None else [tip, *self._look_up(tip, min(wanted, left))][-1])

    def _best_length(self, name: str) -> int:
        """Tokens of a level alone that pay best."""
        acceptance = self.router.acceptances[name]
        return best_length(acceptance.estimate(), self._cost(name, 1) / self._target_seconds(), self.bounds.longest)

    def _room(self, tip: int) -> int:
        """Nodes that may still follow."""
        return min(self.cycle.depth_limit - self.tree.depths[tip], self.bounds.nodes - len(self.tree))

    def _target_seconds(self, nodes: int | None = None) -> float:
        """Predicted, of verifying so many nodes; all there are."""
        return self._target.seconds(nodes or len(self.tree), self.cycle.prefix + len(self.tree), *self._whole)

    def _cost(self, name: str, rows: int) -> float:
        """Predicted seconds of a token that a level drafts, what it adds to the target pass included."""
        level = self.levels.get(name)
        context = self.cycle.prefix + len(self.tree)
        return self._row + (self.router.times(name).seconds(rows, context, level.layers, 0) if level else 0.0)

    def masses(self) -> list[float]:
        """Chance of each node that the target takes it."""
        masses = [1.0]
        for node in range(1, len(self.tree)):
            masses.append(masses[self.tree.parents[node]] * self.own[node])
        return masses

    def _leaves(self, masses: Sequence[float]) -> list[Leaf]:
        """The best open leaves first."""
        rest = [1.0] * len(masses)
        for node in range(1, len(masses)):
            rest[self.tree.parents[node]] -= self.own[node]
        leaves = [
            Leaf(masses[node] * rest[node], node, None)
            for node in range(len(masses))
            if node not in self.offers and self.tree.depths[node] < self.cycle.depth_limit and (self.levels or node not in self.looked)
        ]
        return sorted(leaves + self._candidates(masses, self.cycle.depth_limit - 1), reverse=True)

    def _candidates(self, masses: Sequence[float], deepest: int) -> list[Leaf]:
        """Tokens that are offered, and no nodes yet."""
        return [
            Leaf(masses[node] * chance, node, token)
            for node, offered in self.offers.items()
            if self.tree.depths[node] < deepest
            for token, chance in offered.items()
            if self.tree.child(node, token) is None
        ]

    def _decide(self) -> tuple[Leaf, Choice, float] | None:
        """The leaf to continue, how, and the tokens that a target pass's time brings if the tree is verified now; None: verify."""
        masses, seconds = self.masses(), self._target_seconds()
        now = sum(masses) * seconds / (self.spent + seconds)
        best: tuple[float, Leaf, Choice] | None = None
        acceptances = self.router.acceptances
        known = [(level, acceptances[name].estimate(), self._cost(name, 1) / seconds) for name, level in self.levels.items()]
        bottom = self._bottom(seconds)
        for leaf in self._leaves(masses)[:LEAVES]:
            choice = best_choice(list(self._options(leaf, seconds, known)), *bottom)
            if choice is not None and (best is None or leaf.value * choice.gain > best[0]):
                best = leaf.value * choice.gain, leaf, choice
        return (*best[1:], now) if best is not None and best[0] > now else None

    def _bottom(self, seconds: float) -> tuple[float, float]:
        """Acceptance and cost of the token that the bottom level adds behind any draft."""
        lookup = self.router.acceptances.get(LOOKUP)
        return (lookup.estimate() * self.router.hit_rate, self._row / seconds) if lookup and self.levels else (0.0, 0.0)

    def _options(self, leaf: Leaf, seconds: float, known: Sequence[tuple[Level, float, float]]) -> Iterator[Option]:
        """What can draft behind a leaf, given acceptance and cost of every level where it need not run anything again."""
        room = self._room(leaf.node) - (leaf.token is not None)
        if room > 0 and LOOKUP in self.router.acceptances and (leaf.token is not None or leaf.node not in self.looked):
            tokens, said = self._matched(leaf.node, leaf.token)
            chance = self.router.acceptances[LOOKUP].chance(said)
            yield Option(LOOKUP, chance, max(self._row / seconds, 1e-3), min(len(tokens), room))
        longest = min(self.bounds.longest, room)
        for level, acceptance, cost in known:
            again = len(level.rows(self.cycle, [leaf.node])) - (leaf.token is None)
            more = again * self.router.times(level.name).row_seconds() / seconds if again else 0.0
            yield Option(level.name, acceptance, cost + more, longest)

    def _matched(self, node: int, token: int | None = None) -> tuple[list[int], float]:
        """What prompt lookup finds behind a path, and what it says of it by the length of the match."""
        ahead = [self.tree.tokens[above] for above in self.tree.path(node)[1:]] + ([] if token is None else [token])
        tokens, size = self.index.matched(self.cycle.state.tokens, self.bounds.longest, ahead)
        return tokens, size / (size + 1)

    def _look_up(self, node: int, count: int) -> list[int]:
        """Nodes of what prompt lookup finds behind a node."""
        tokens, said = self._matched(node)
        chance, nodes = self.router.acceptances[LOOKUP].chance(said), [node]
        self.looked.add(node)
        self.router.searched(bool(tokens))
        for token in tokens[: min(count, self._room(node))]:
            nodes.append(self._add(nodes[-1], token, LOOKUP, chance))
            self.said.setdefault(nodes[-1], [(LOOKUP, said)])
            self.router.acceptances[LOOKUP].draft(said)
        return nodes[1:]

    def _draft(self, front: int, choice: Choice, now: float) -> None:
        """Up to so many tokens behind a node, with rivals in the same passes, as long as the path may still be worth it."""
        level, seconds = self.levels[choice.level], self._target_seconds()
        least = now * self._cost(choice.level, 1) / seconds / self.router.acceptances[choice.level].estimate()
        for _ in range(choice.length):
            with self.cycle.stage("decide"):
                rivals = self._rivals(front, level, now / seconds)
            with self.cycle.stage("draft"):
                self._run(level, [front, *(self._made(rival) for rival in rivals)])
            front = self._follow(front)
            if not self._room(front) or self.masses()[front] < least:
                return

    def _rivals(self, front: int, level: Level, rate: float) -> list[Leaf]:
        """Open leaves beside a node that together with it hold the share `top_p` of all chances, and are worth a row each."""
        leaves = [leaf for leaf in self._leaves(self.masses()) if leaf.token is not None or leaf.node != front]
        front_value = self.masses()[front]
        left = self.bounds.top_p * (front_value + sum(leaf.value for leaf in leaves)) - front_value
        least = rate * (self._row + self.router.times(level.name).row_seconds()) / self.router.acceptances[level.name].estimate()
        rivals: list[Leaf] = []
        for leaf in leaves[: min(RIVALS, max(0, self._room(front) - 1))]:
            if left <= 0 or leaf.value <= least:
                break
            rivals.append(leaf)
            left -= leaf.value
        return rivals

    def _made(self, leaf: Leaf) -> int:
        """The leaf as a node."""
        return leaf.node if leaf.token is None else self._follow(leaf.node, leaf.token)

    def _follow(self, node: int, token: int | None = None) -> int:
        """The node of a token that was offered behind `node`; of the best one."""
        offered = self.offers[node]
        token = next(iter(offered)) if token is None else token
        level, said = self.best.get((node, token), ("offer", 0.0))
        child = self._add(node, token, level, offered[token])
        if (node, token) in self.best:
            self.said.setdefault(child, [])
            if (level, said) not in self.said[child]:
                self.said[child].append((level, said))
                self.router.acceptances[level].draft(said)
        return child

    def _add(self, parent: int, token: int, kind: str, chance: float) -> int:
        """A node."""
        node = self.tree.add(parent, token, kind)
        if node == len(self.own):
            self.own.append(chance)
        return node

    def _run(self, level: Level, nodes: list[int]) -> None:
        """Let a level say what may follow on nodes; what it says replaces what was thought of tokens that are there already."""
        began, before = time.perf_counter(), len(self.cycle.passes)
        rows = level.rows(self.cycle, nodes)
        if not rows:
            return
        logits_TV = level.look(self.cycle, rows).float()
        best = logits_TV.topk(min(OFFERED, logits_TV.shape[-1]), dim=-1)
        chances = (best.values - logits_TV.logsumexp(dim=-1, keepdim=True)).exp().tolist()
        for node, tokens, said in zip(rows, best.indices.tolist(), chances, strict=True):
            if node in nodes or node not in self.offers:
                self._offer(level.name, node, tokens, said)
        passes = self.cycle.passes[before:]
        seconds = time.perf_counter() - began
        self.spent += seconds
        context = max((cost.context for cost in passes), default=0)
        self.router.ran(level.name, len(rows), context, level.layers, sum(cost.bytes_streamed for cost in passes), seconds)

    def _offer(self, level: str, node: int, tokens: list[int], said: list[float]) -> None:
        """Note the smallest set of tokens that holds `top_p` of the level's probability."""
        first = self.router.acceptances[level].chance(said[0])
        share = (1 - first) / max(1 - said[0], 1e-9)
        offered, mass = {tokens[0]: first}, said[0]
        for token, probability in zip(tokens[1:], said[1:], strict=True):
            if mass >= self.bounds.top_p:
                break
            offered[token], mass = min(first, probability * share), mass + probability
        self.offers[node], self.best[node, tokens[0]] = offered, (level, said[0])
        for child in self.tree.children(node):
            self.own[child] = offered.get(self.tree.tokens[child], max(0.0, 1 - sum(offered.values())))

    def chosen(self) -> list[int]:
        """The nodes that are worth their row in the target pass."""
        masses, nodes, tokens = self.masses(), [0], 1.0
        leaves = [Leaf(mass, node, None) for node, mass in enumerate(masses) if node] + self._candidates(masses, self.cycle.depth_limit)
        for leaf in sorted(leaves, key=lambda leaf: -leaf.value):
            full = len(nodes) == self.bounds.nodes or (leaf.token is not None and len(self.tree) == self.bounds.nodes)
            if full or leaf.value * (self.spent + self._target_seconds(len(nodes))) <= tokens * self._row:
                break
            nodes.append(self._made(leaf))
            tokens += leaf.value
        return sorted(nodes)
