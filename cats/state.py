"""What is true between two steps (`DecodeState`), and what one step has computed so far (`Cycle`).

Between two steps: the committed tokens, the last of which is the root; caches that hold every committed token but the
root. Within a step every tree node stands at some layer, and `Cycle.advance` only moves nodes forward, so nothing is
computed twice: drafting takes nodes to exit d, shallow verification to exit s, the target pass takes them on from there.
"""

import itertools
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import numpy as np
import torch

from cats.adapter import AdapterModel
from cats.cats_model import MultiAdapterCATSModel
from cats.kv_cache import KVCache, cache_bytes
from cats.masks import Sight, causal_sight, causal_sights, sent, tree_sight
from cats.planning.plan import EXACT, PREFILL_ROWS, View
from cats.rows import Rows
from cats.trace import PassCost, StageSeconds, Stopwatch
from cats.tree import UNKNOWN, TokenTree


class AdapterState:
    """One adapter's cache, and the exit states of committed tokens that it has not read yet.

    A token that is accepted without the adapter ever having run on it (a sibling, the last token of the trunk) leaves its
    exit state in `pending`; the next pass of the adapter reads it first, in the same batch. Of a method that leaves an adapter out for
    long, no more than PREFILL_ROWS are left pending.
    """

    def __init__(self, adapter: AdapterModel, capacity: int, like: torch.Tensor, touched: bool):
        self.adapter = adapter
        self.cache = KVCache(adapter.config, 1, capacity, like.dtype, like.device, touched)
        self.pending_ND = like.new_empty(0, adapter.config.hidden_size)

    def wait(self, hidden_ND: torch.Tensor) -> None:
        """Leave the exit states of newly committed tokens for the next pass; where too many wait, the oldest are read at once."""
        self.pending_ND = torch.cat([self.pending_ND, hidden_ND])
        while len(self.pending_ND) > PREFILL_ROWS:
            self.read(self.pending_ND[:PREFILL_ROWS])
            self.pending_ND = self.pending_ND[PREFILL_ROWS:].clone()

    def follow(self, hidden_ND: torch.Tensor) -> None:
        """Read what waits, and the exit states of committed tokens that follow on it."""
        waiting_ND, self.pending_ND = self.pending_ND, self.pending_ND[:0]
        for rows_ND in (waiting_ND, hidden_ND):
            if len(rows_ND):
                self.read(rows_ND)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on."""
        self.cache.crop(length)
        self.pending_ND = self.pending_ND[: length - self.cache.length].clone()

    def read(self, hidden_ND: torch.Tensor) -> None:
        """Run the adapter on the exit states of the committed tokens that follow on those in its cache."""
        start, rows = self.cache.length, len(hidden_ND)
        positions = torch.arange(start, start + rows, device=hidden_ND.device)
        sight = causal_sight(rows, start, hidden_ND.dtype, hidden_ND.device)
        self.run(hidden_ND, positions, sight, slice(start, start + rows), start + rows)
        self.cache.length += rows

    def run(self, hidden_TD: torch.Tensor, positions_T: torch.Tensor, sight: Sight, slots: slice | torch.Tensor, end: int) -> torch.Tensor:
        """The adapter's outputs [T, D]; what it caches goes to `slots`, and slots below `end` may be seen."""
        rope = self.adapter.rope.rows(positions_T, hidden_TD.dtype)
        return self.adapter.read(Rows(hidden_TD[None], rope, sight, self.cache, slots, end))[0]


class DecodeState:
    """One answer in the making, and what its caches hold for the next one (`resume`).

    Attributes:
        tokens: prompt and answer so far; the last one is the root and is in no cache.
        capacity: positions that prompt and answer may take.
        cache: base keys and values of all tokens but the root.
        adapters: state of every adapter that the method uses.
        final_hidden_1D: state leaving the last layer at the newest cached token.
        prompt_passes: decoder layers run while the prompt was read.
    """

    def __init__(self, model: MultiAdapterCATSModel, prompt: Sequence[int], adapters: tuple[str, ...], capacity: int, max_nodes: int):
        base = model.base
        self.model, self.base, self.max_nodes, self.capacity = model, base, max_nodes, capacity
        self.exits = model.exits(adapters)
        self.tokens = list(prompt)
        base.source.admit(capacity, max_nodes)
        base.source.make_room()
        self._returned: list[weakref.finalize[..., DecodeState]] = []
        self._charge(capacity, max_nodes, adapters)
        self.cache = base.new_cache(capacity + max_nodes)
        like = torch.empty(0, dtype=base.dtype, device=base.device)
        self.adapters = {name: AdapterState(model.adapters[name], capacity + max_nodes, like, base.source.one_answer) for name in adapters}
        self.levels = sorted({*self.exits.values(), base.layer_count})
        self.final_hidden_1D = like
        self.prompt_passes = 0
        self._places = torch.arange(capacity + max_nodes, device=base.device)
        self._rows: dict[int, torch.Tensor] = {}

    def _charge(self, capacity: int, max_nodes: int, adapters: tuple[str, ...]) -> None:
        """Charge caches and activations, until this state is closed or gone."""
        base, slots = self.base, capacity + max_nodes
        configs = [base.config] * base.layer_count + [self.model.adapters[name].config for name in adapters]
        taken = {
            "KV caches": sum(cache_bytes(config, slots, base.dtype) for config in configs),
            "activations": base.source.plan.activations(capacity, max_nodes),
        }
        for name, nbytes in taken.items():
            base.source.ledger.charge(name, nbytes)
            self._returned.append(weakref.finalize(self, base.source.ledger.charge, name, -nbytes))

    def close(self) -> None:
        """The answer has ended: give back what it holds, whoever still refers to it."""
        self._give_back()
        for cache in self._caches:
            cache.free()
        self._rows.clear()
        self.base.source.answer_ended()

    def _give_back(self) -> None:
        for give_back in self._returned:
            give_back()
        self._returned.clear()

    @property
    def _caches(self) -> list[KVCache]:
        return [self.cache, *(adapter.cache for adapter in self.adapters.values())]

    def resume(self, prompt: Sequence[int], capacity: int) -> None:
        """Begin the next answer: what its prompt shares with the text in the caches stays there, but for the prompt's last token, which
        is always run."""
        pairs = zip(self.tokens[: self.cache.length], prompt[:-1], strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.cache.crop(shared)
        for adapter in self.adapters.values():
            adapter.crop(shared)
        if capacity > self.capacity:
            self._grow(capacity)
        self.tokens, self.prompt_passes = list(prompt), 0

    def _grow(self, capacity: int) -> None:
        """Have room for so many positions."""
        slots, self.capacity = capacity + self.max_nodes, capacity
        self._give_back()
        self._charge(capacity, self.max_nodes, tuple(self.adapters))
        for cache in self._caches:
            cache.grow(slots)
        self._places = torch.arange(slots, device=self.base.device)

    def rows_at(self, layer: int) -> torch.Tensor:
        """Work space [max_nodes, D] for the states of tree nodes that stand at `layer`."""
        if layer not in self._rows:
            self._rows[layer] = torch.empty(self.max_nodes, self.base.config.hidden_size, dtype=self.base.dtype, device=self.base.device)
        return self._rows[layer]

    def read_prompt(self) -> torch.Tensor:
        """Run what the caches lack of the prompt through every layer, in groups of rows; the logits [1, V] after its last token."""
        groups, reached = self._prompt_rows(), 0
        for level in self.levels:
            self.prompt_passes += self.base.run_layers(groups, reached, level)
            reached = level
            for name in (name for name, exit_layer in self.exits.items() if exit_layer == level):
                for group in groups:
                    self.adapters[name].follow(group.hidden_BTD[0])
        self.cache.length = len(self.tokens)
        self.final_hidden_1D = groups[-1].hidden_BTD[0, -1:]
        return self.base.target_logits(self.final_hidden_1D)

    def _prompt_rows(self) -> list[Rows]:
        """What the caches lack, embedded, PREFILL_ROWS positions to a group whatever the budget: a group's size shows in the last bits."""
        base, known, count = self.base, self.cache.length, len(self.tokens)
        sights = causal_sights(count - known, PREFILL_ROWS, base.dtype, base.device, known)
        positions = torch.arange(known, count, device=base.device).split(PREFILL_ROWS)
        embedded = base.embed_tokens(torch.tensor([self.tokens[known:]], device=base.device)).split(PREFILL_ROWS, dim=1)
        groups: list[Rows] = []
        for hidden, sight, places in zip(embedded, sights, positions, strict=True):
            start = known + len(groups) * PREFILL_ROWS
            end = start + len(places)
            groups.append(Rows(hidden, base.rope.rows(places, base.dtype), sight, self.cache, slice(start, end), end))
        return groups

    @property
    def last_exit(self) -> int:
        """The latest exit; the target pass begins there."""
        return self.levels[-2] if len(self.levels) > 1 else 0

    def positions(self, places: Sequence[int]) -> torch.Tensor:
        """Places of a sequence on the device; consecutive ones without a transfer."""
        index = as_index(places)
        return self._places[index] if isinstance(index, slice) else sent(torch.tensor(index), self.base.device)

    def commit(self, cycle: "Cycle", path: Sequence[int], next_token: int) -> None:
        """Keep exactly `path` in every cache; the next token becomes the root."""
        cycle.check_exact(path)
        self.cache.keep(path)
        for name in self.adapters:
            cycle.commit_adapter(name, path)
        self.tokens += [cycle.tree.tokens[node] for node in path[1:]] + [next_token]
        self.final_hidden_1D = self.rows_at(self.base.layer_count)[path[-1]].clone()[None]


class Cycle:
    """One step in the making: the tree, and the layer at which each of its nodes stands.

    Attributes:
        tree: grown by the method.
        depth_limit: depth of the deepest node that the answer's limits leave room for, probes included; the tree takes none below it.
        layer_passes: decoder layers run so far in this step.
        passes: what each pass of this step has cost so far.
        shallow_accepted, shallow_verdicts: set by a method with a shallow verifier, for the trace.
    """

    def __init__(self, state: DecodeState, depth_limit: int):
        self.state, self.depth_limit = state, depth_limit
        self.tree = TokenTree(state.tokens[-1], state.max_nodes, depth_limit)
        self.prefix = state.cache.length
        self.watch = Stopwatch()
        source = state.base.source
        self._taken_before, self._waited_before = source.bytes_taken, source.wait_seconds
        self.layer_passes = 0
        self.passes: list[PassCost] = []
        self.shallow_accepted: int | None = None
        self.shallow_verdicts: dict[int, bool] = {}
        self._level: list[int] = []
        self._owner: list[View] = []
        self._ids_T = torch.empty(state.max_nodes, dtype=torch.long, device=state.base.device)
        self._ids_known = 0
        self._adapted: dict[str, set[int]] = {name: set() for name in state.adapters}
        self._caught_up: set[str] = set()

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Charge the block's seconds to a stage of this name; a method may use any name but those in `cats.trace.ACROSS`."""
        return self.watch.stage(name)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Charge the block's seconds to computing."""
        begin = time.perf_counter()
        yield
        self.watch.charge("compute", time.perf_counter() - begin)

    @contextmanager
    def passing(self, rows: int, context: int, view: View = EXACT, adapter: str | None = None) -> Iterator[None]:
        """Charge the block's seconds to computing, and note it among the passes."""
        source, begin = self.state.base.source, time.perf_counter()
        layers, taken = self.layer_passes, source.bytes_taken
        yield
        seconds = time.perf_counter() - begin
        self.watch.charge("compute", seconds)
        layers = 1 if adapter else self.layer_passes - layers
        self.passes.append(PassCost(view, rows, context, layers, source.bytes_taken - taken, seconds, adapter))

    def reading(self) -> tuple[StageSeconds, int]:
        """Seconds and streamed bytes of this step so far."""
        source = self.state.base.source
        self.watch.seconds["stream_wait"] = source.wait_seconds - self._waited_before
        return self.watch.reading(), source.bytes_taken - self._taken_before

    def level(self, node: int) -> int:
        """The layer that `node` has reached; 0 where it is only a token."""
        return self._level[node] if node < len(self._level) else 0

    def name_token(self, node: int, token: torch.Tensor) -> None:
        """Give a node that `TokenTree.add_unknown` made its token id, a device tensor, without waiting for the device."""
        self._fill_ids(node)
        self._ids_T[node] = token
        self._ids_known = node + 1

    def _fill_ids(self, end: int) -> None:
        """Copy the ids of nodes that only the tree knows so far to the device."""
        if self._ids_known < end:
            tokens = self.tree.tokens[self._ids_known : end]
            if UNKNOWN in tokens:
                raise RuntimeError("a node with an unknown token was never named")
            self._ids_T[self._ids_known : end] = sent(torch.tensor(tokens), self._ids_T.device)
            self._ids_known = end

    def advance(self, nodes: Sequence[int], layer: int, view: View = EXACT) -> None:
        """Take `nodes` from where each of them stands to `layer`; ancestors must stand there or come along.

        Nodes that stand deeper wait until the others have caught up, then all go on in one batch: a layer runs at most once. A node
        belongs to the view that ran it last; under another view it begins again at layer 0.
        """
        self._claim(nodes, view)
        waiting = self._below(nodes, layer)
        while waiting:
            start = min(self._level[node] for node in waiting)
            active = [node for node in waiting if self._level[node] == start]
            stops = [self._level[node] for node in waiting] + [level for level in self.state.levels if level < layer] + [layer]
            stop = min(level for level in stops if level > start)
            rows = self.enter(active, start, stop)
            with self.passing(len(active), rows.end, view):
                self.leave(active, rows, stop, self.state.base.run_layers([rows], start, stop, view))
            waiting = self._below(waiting, layer)

    def ready(self, node: int, layer: int, view: View, adapter: str | None = None) -> bool:
        """Whether nodes behind `node` can be taken to `layer` under `view`, and be read by the adapter, without running it again."""
        read = adapter is None or node in self._adapted[adapter]
        return read and self.level(node) >= layer and view.follows(self._owner[node])

    def waiting_at(self, layer: int, nodes: Sequence[int]) -> list[int]:
        """Those of `nodes` that are not through yet, if all of them stand at `layer`; else none."""
        waiting = self._below(nodes, self.state.base.layer_count)
        return waiting if all(self._level[node] == layer for node in waiting) else []

    def _below(self, nodes: Sequence[int], layer: int) -> list[int]:
        return sorted(node for node in set(nodes) if self._level[node] < layer)

    def _claim(self, nodes: Sequence[int], view: View) -> None:
        """Make `nodes` the view's own; what another view computed of them is forgotten, by the adapters too."""
        self._fill_ids(len(self.tree))
        self._level += [0] * (len(self.tree) - len(self._level))
        self._owner += [EXACT] * (len(self.tree) - len(self._owner))
        for node in nodes:
            if self._owner[node] is not view and self._owner[node] != view:
                self._owner[node], self._level[node] = view, 0
                for done in self._adapted.values():
                    done.discard(node)

    def enter(self, nodes: list[int], start: int, stop: int) -> Rows:
        """The rows of nodes that all stand at layer `start`, to be taken to `stop` in their own cache slots, under the tree mask."""
        together = set(nodes)
        for node in nodes:
            parent = self.tree.parents[node]
            if parent < 0 or parent in together:
                continue
            if self._level[parent] < stop:
                raise RuntimeError(f"node {node} would run ahead of its parent {parent}, which stands at layer {self._level[parent]}")
            if not self._owner[node].follows(self._owner[parent]):
                raise RuntimeError(f"node {node} and its parent {parent} were run under different views of the model")
        self._check_seen(nodes)
        base, rows, end = self.state.base, as_index(nodes), nodes[-1] + 1
        index = on_device(rows, base.device)
        hidden_TD = base.embed_tokens(self._ids_T[index]) if start == 0 else self.state.rows_at(start)[index]
        rope = base.rope.rows(self._positions(nodes), base.dtype)
        sight = tree_sight(self.tree.ancestors_TT[rows, :end], self.prefix, base.dtype, base.device)
        return Rows(hidden_TD[None], rope, sight, self.state.cache, shifted(rows, self.prefix, base.device), self.prefix + end)

    def _check_seen(self, nodes: list[int]) -> None:
        """Raise where an exact row would look at what a draft wrote, however far above."""
        drafts = [node for node, owner in enumerate(self._owner) if owner is not EXACT and owner != EXACT]
        exact = [node for node in nodes if self._owner[node] == EXACT] if drafts else []
        if exact and self.tree.ancestors_TT[np.ix_(exact, drafts)].any():
            raise RuntimeError(f"some of the nodes {exact} would be run exactly behind nodes that a draft ran last")

    def leave(self, nodes: list[int], rows: Rows, stop: int, passes: int) -> None:
        """Note where `nodes` stand now."""
        self.state.rows_at(stop)[on_device(as_index(nodes), self.state.base.device)] = rows.hidden_BTD[0]
        for node in nodes:
            self._level[node] = stop
        self.layer_passes += passes

    def _positions(self, nodes: Sequence[int]) -> torch.Tensor:
        return self.state.positions([self.prefix + self.tree.depths[node] for node in nodes])

    def check_exact(self, path: Sequence[int]) -> None:
        """Raise unless an exact pass took every node of `path` through the last layer."""
        for node in path:
            if self._owner[node] != EXACT or self._level[node] < self.state.base.layer_count:
                raise RuntimeError(f"node {node} cannot be committed: the exact pass did not take it through the last layer")

    def target_logits(self, nodes: Sequence[int], view: View = EXACT) -> torch.Tensor:
        """Take `nodes` through the last layer; the logits [T, V] at each, in the order given. Those of a view other than EXACT draft."""
        base = self.state.base
        self.advance(nodes, base.layer_count, view)
        hidden_TD = self.state.rows_at(base.layer_count)[on_device(as_index(nodes), base.device)]
        with self.computing():
            return base.target_logits(hidden_TD)

    def adapter_logits(self, name: str, nodes: Sequence[int]) -> torch.Tensor:
        """The adapter's logits [T, V] at nodes that stand at its exit or deeper; ancestors it has not read come along."""
        state, exit_layer = self.state.adapters[name], self.state.exits[name]
        done = self._adapted[name]
        new = sorted({above for node in nodes for above in self.tree.path(node)} - done)
        if not set(nodes) <= set(new):
            raise RuntimeError(f"the adapter {name!r} has read some of the nodes {list(nodes)} already; keep its logits instead")
        if any(self.level(node) < exit_layer for node in new):
            raise RuntimeError(f"some of the nodes {new} have not reached exit {exit_layer} of the adapter {name!r}")
        hidden_TD = self._adapter_rows(name, state, exit_layer, new)
        done.update(new)
        if new != list(nodes):
            hidden_TD = hidden_TD[[new.index(node) for node in nodes]]
        with self.computing():
            logits_TV: torch.Tensor = self.state.base.lm_head(hidden_TD)
        return logits_TV

    def _adapter_rows(self, name: str, state: AdapterState, exit_layer: int, nodes: list[int]) -> torch.Tensor:
        """Adapter outputs [T, D] for `nodes`, after the committed tokens still pending, in one batch."""
        before, device = len(state.pending_ND), self.state.base.device
        rows, end = as_index(nodes), nodes[-1] + 1
        hidden, positions = self.state.rows_at(exit_layer)[on_device(rows, device)], self._positions(nodes)
        slots = shifted(rows, self.prefix, device)
        if before:
            earlier = range(self.prefix - before, self.prefix)
            slots = self.state.positions([*earlier, *(self.prefix + node for node in nodes)])
            hidden, positions = torch.cat([state.pending_ND, hidden]), torch.cat([self.state.positions(earlier), positions])
        sight = tree_sight(self.tree.ancestors_TT[rows, :end], self.prefix, hidden.dtype, hidden.device, before)
        with self.passing(before + len(nodes), self.prefix + end, adapter=name):
            output = state.run(hidden, positions, sight, slots, self.prefix + end)[before:]
        state.cache.length, state.pending_ND = self.prefix, state.pending_ND[:0]
        self._caught_up.add(name)
        return output

    def commit_adapter(self, name: str, path: Sequence[int]) -> None:
        """Keep the part of `path` that the adapter has read; leave the exit states of the rest for its next pass."""
        state = self.state.adapters[name]
        read = [node for node in path if node in self._adapted[name]]
        if name in self._caught_up:
            state.cache.keep(read)
        unread_ND = self.state.rows_at(self.state.exits[name])[on_device(as_index(path[len(read) :]), self.state.base.device)]
        with self.computing():
            state.wait(unread_ND)


def as_index(nodes: Sequence[int]) -> slice | list[int]:
    """Node indices as a slice where they are consecutive (a view, no copy), else as a list."""
    nodes = list(nodes)
    if not nodes or nodes == list(range(nodes[0], nodes[0] + len(nodes))):
        return slice(nodes[0], nodes[0] + len(nodes)) if nodes else slice(0, 0)
    return nodes


def on_device(rows: slice | list[int], device: torch.device) -> slice | torch.Tensor:
    """An index that can be used on the device without waiting for it."""
    return rows if isinstance(rows, slice) else sent(torch.tensor(rows), device)


def shifted(rows: slice | list[int], offset: int, device: torch.device) -> slice | torch.Tensor:
    """Cache slots of tree rows that sit behind `offset` committed positions."""
    if isinstance(rows, slice):
        return slice(rows.start + offset, rows.stop + offset)
    return on_device([row + offset for row in rows], device)


def verify(cycles: Sequence[Cycle], chosen: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Take the chosen nodes of each sequence's cycle through the last layer; the target's logits [T, V] of each.

    Sequences catch up to the latest of their exits alone, in resident layers, and go on from there together: one stream of the weights
    serves all of them.
    """
    base = cycles[0].state.base
    start, end = max(cycle.state.last_exit for cycle in cycles), base.layer_count
    together: list[tuple[Cycle, list[int], Rows]] = []
    for cycle, nodes in zip(cycles, chosen, strict=True):
        cycle.advance(nodes, start)
        waiting = cycle.waiting_at(start, nodes)
        if waiting:
            together.append((cycle, waiting, cycle.enter(waiting, start, end)))
    with ExitStack() as clocks:
        for cycle, waiting, rows in together:
            clocks.enter_context(cycle.passing(len(waiting), rows.end))
        passes = base.run_layers([rows for _, _, rows in together], start, end)
        for cycle, waiting, rows in together:
            cycle.leave(waiting, rows, end, passes)
    return [cycle.target_logits(nodes) for cycle, nodes in zip(cycles, chosen, strict=True)]
