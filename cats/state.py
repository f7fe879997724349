"""What is true between two steps (`DecodeState`), and what one step has computed so far (`Cycle`).

Between two steps: the committed tokens, the last of which is the root; caches that hold every committed token but the
root. Within a step every tree node stands at some layer, and `Cycle.advance` only moves nodes forward, so nothing is
computed twice: drafting takes nodes to exit d, shallow verification to exit s, the target pass takes them on from there.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from cats.adapter import AdapterModel
from cats.cats_model import MultiAdapterCATSModel
from cats.earlyexit import SkippedParts
from cats.kv_cache import KVCache
from cats.masks import causal_bias, tree_bias
from cats.planning.plan import PREFILL_ROWS
from cats.trace import StageSeconds, Stopwatch
from cats.tree import UNKNOWN, TokenTree


class AdapterState:
    """One adapter's cache, and the exit states of committed tokens that it has not read yet.

    A token that is accepted without the adapter ever having run on it (a sibling, the last token of the trunk) leaves its
    exit state in `pending`; the next pass of the adapter reads it first, in the same batch. Of a method that leaves an adapter out for
    long, no more than PREFILL_ROWS are left pending.
    """

    def __init__(self, adapter: AdapterModel, capacity: int, like: torch.Tensor):
        self.adapter = adapter
        self.cache = KVCache(adapter.config, 1, capacity, like.dtype, like.device)
        self.pending_ND = like.new_empty(0, adapter.config.hidden_size)

    def wait(self, hidden_ND: torch.Tensor) -> None:
        """Leave the exit states of newly committed tokens for the next pass; where too many wait, the oldest are read at once."""
        self.pending_ND = torch.cat([self.pending_ND, hidden_ND])
        while len(self.pending_ND) > PREFILL_ROWS:
            self.read(self.pending_ND[:PREFILL_ROWS])
            self.pending_ND = self.pending_ND[PREFILL_ROWS:].clone()

    def read(self, hidden_ND: torch.Tensor) -> None:
        """Run the adapter on the exit states of the committed tokens that follow on those in its cache."""
        start, rows = self.cache.length, len(hidden_ND)
        positions = torch.arange(start, start + rows, device=hidden_ND.device)
        with self.cache.writing(slice(start, start + rows), start + rows):
            self.adapter(hidden_ND[None], positions, causal_bias(rows, start, hidden_ND.dtype, hidden_ND.device), self.cache)
        self.cache.length += rows


class DecodeState:
    """One answer in the making.

    Attributes:
        tokens: prompt and answer so far; the last one is the root and is in no cache.
        cache: base keys and values of all tokens but the root.
        adapters: state of every adapter that the method uses.
        final_hidden_1D: state leaving the last layer at the newest cached token.
    """

    def __init__(self, model: MultiAdapterCATSModel, prompt: Sequence[int], adapters: tuple[str, ...], capacity: int, max_nodes: int):
        base = model.base
        self.model, self.base, self.max_nodes = model, base, max_nodes
        self.exits = model.exits(adapters)
        self.tokens = list(prompt)
        base.source.admit(capacity, max_nodes)
        self.cache = base.new_cache(capacity + max_nodes)
        like = torch.empty(0, dtype=base.dtype, device=base.device)
        self.adapters = {name: AdapterState(model.adapters[name], capacity + max_nodes, like) for name in adapters}
        self.levels = sorted({*self.exits.values(), base.layer_count})
        self.final_hidden_1D = like
        self._rows: dict[int, torch.Tensor] = {}

    def rows_at(self, layer: int) -> torch.Tensor:
        """Work space [max_nodes, D] for the states of tree nodes that stand at `layer`."""
        if layer not in self._rows:
            self._rows[layer] = torch.empty(self.max_nodes, self.base.config.hidden_size, dtype=self.base.dtype, device=self.base.device)
        return self._rows[layer]

    def read_prompt(self) -> torch.Tensor:
        """Run the prompt through every layer, in pieces; returns the logits [1, V] after its last token."""
        ids = torch.tensor([self.tokens], device=self.base.device)
        for start in range(0, len(self.tokens), PREFILL_ROWS):
            self._read_piece(ids[:, start : start + PREFILL_ROWS], start)
        return self.base.target_logits(self.final_hidden_1D)

    def _read_piece(self, ids: torch.Tensor, start: int) -> None:
        rows = ids.shape[1]
        positions = torch.arange(start, start + rows, device=ids.device)
        bias = causal_bias(rows, start, self.base.dtype, self.base.device)
        hidden, reached = self.base.embed_tokens(ids), 0
        with self.cache.writing(slice(start, start + rows), start + rows):
            for level in self.levels:
                hidden = self.base.forward_draft_or_large_model(
                    hidden_states=hidden,
                    start_layer=reached,
                    end_layer=level,
                    past_key_values=self.cache,
                    attention_mask=bias,
                    positions_T=positions,
                )
                reached = level
                for name, exit_layer in self.exits.items():
                    if exit_layer == level:
                        self.adapters[name].read(hidden[0])
        self.cache.length += rows
        self.final_hidden_1D = hidden[0, -1:]

    def commit(self, cycle: "Cycle", path: Sequence[int], next_token: int) -> None:
        """Keep exactly `path` in every cache; the next token becomes the root."""
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
        self.shallow_accepted: int | None = None
        self.shallow_verdicts: dict[int, bool] = {}
        self._level: list[int] = []
        self._ids_T = torch.empty(state.max_nodes, dtype=torch.long, device=state.base.device)
        self._ids_known = 0
        self._adapted: dict[str, set[int]] = {name: set() for name in state.adapters}
        self._caught_up: set[str] = set()

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Charge the block's seconds to a stage of this name; a method may use any name but those in `cats.trace.ACROSS`."""
        return self.watch.stage(name)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.watch.charge("compute", time.perf_counter() - begin)

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
            self._ids_T[self._ids_known : end] = torch.tensor(tokens, device=self._ids_T.device)
            self._ids_known = end

    def advance(self, nodes: Sequence[int], layer: int) -> None:
        """Take `nodes` from where each of them stands to `layer`; ancestors must stand there or come along.

        Nodes that stand deeper wait until the others have caught up, then all go on in one batch: a layer runs at most once.
        """
        self._fill_ids(len(self.tree))
        self._level += [0] * (len(self.tree) - len(self._level))
        waiting = sorted(node for node in set(nodes) if self._level[node] < layer)
        while waiting:
            start = min(self._level[node] for node in waiting)
            active = [node for node in waiting if self._level[node] == start]
            stops = [self._level[node] for node in waiting] + [level for level in self.state.levels if level < layer] + [layer]
            stop = min(level for level in stops if level > start)
            self._run(active, start, stop)
            waiting = [node for node in waiting if self._level[node] < layer]

    def _run(self, nodes: list[int], start: int, stop: int) -> None:
        """Run layers [start, stop) on nodes that all stand at `start`."""
        together = set(nodes)
        for node in nodes:
            parent = self.tree.parents[node]
            if parent >= 0 and self._level[parent] < stop and parent not in together:
                raise RuntimeError(f"node {node} would run ahead of its parent {parent}, which stands at layer {self._level[parent]}")
        rows = as_index(nodes)
        base = self.state.base
        hidden = base.embed_tokens(self._ids_T[rows]) if start == 0 else self.state.rows_at(start)[rows]
        self.state.rows_at(stop)[rows] = self._pass(hidden, nodes, start, stop)
        for node in nodes:
            self._level[node] = stop
        self.layer_passes += stop - start

    def _pass(self, hidden_TD: torch.Tensor, nodes: list[int], start: int, stop: int, skipped: SkippedParts | None = None) -> torch.Tensor:
        """Layers [start, stop) on the states of `nodes`, in their own cache slots, under the tree mask."""
        base, rows, end = self.state.base, as_index(nodes), nodes[-1] + 1
        bias = tree_bias(self.tree.ancestors_TT[rows, :end], self.prefix, base.dtype, base.device)
        positions = self._positions(nodes)
        with self.state.cache.writing(shifted(rows, self.prefix), self.prefix + end), self._computing():
            hidden_1TD = base.forward_draft_or_large_model(
                hidden_states=hidden_TD[None],
                start_layer=start,
                end_layer=stop,
                past_key_values=self.state.cache,
                attention_mask=bias,
                positions_T=positions,
                skipped=skipped,
            )
        return hidden_1TD[0]

    def _positions(self, nodes: Sequence[int]) -> torch.Tensor:
        depths = [self.prefix + self.tree.depths[node] for node in nodes]
        return torch.tensor(depths, device=self.state.base.device)

    def draft_logits(self, nodes: Sequence[int], skipped: SkippedParts) -> torch.Tensor:
        """Logits [T, V] of the target without some of its parts, for nodes whose ancestors were run the same way or come along.

        The nodes stay at layer 0: the cache entries written here are approximate, and verification overwrites them.
        """
        nodes = sorted(nodes)
        self._fill_ids(len(self.tree))
        if any(self.level(node) for node in nodes):
            raise RuntimeError("a node that stands at an exit cannot be drafted again by a part of the model")
        base = self.state.base
        hidden_TD = self._pass(base.embed_tokens(self._ids_T[as_index(nodes)]), nodes, 0, base.layer_count, skipped)
        self.layer_passes += base.layer_count - len(skipped.attention & skipped.mlp)
        with self._computing():
            return base.target_logits(hidden_TD)

    def target_logits(self, nodes: Sequence[int]) -> torch.Tensor:
        """Take `nodes` through the last layer; the target's logits [T, V] at each, in the order given."""
        base = self.state.base
        self.advance(nodes, base.layer_count)
        hidden_TD = self.state.rows_at(base.layer_count)[as_index(nodes)]
        with self._computing():
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
        with self._computing():
            logits_TV: torch.Tensor = self.state.base.lm_head(hidden_TD)
        return logits_TV

    def _adapter_rows(self, name: str, state: AdapterState, exit_layer: int, nodes: list[int]) -> torch.Tensor:
        """Adapter outputs [T, D] for `nodes`, after the committed tokens still pending, in one batch."""
        before = len(state.pending_ND)
        rows, end = as_index(nodes), nodes[-1] + 1
        hidden, positions = self.state.rows_at(exit_layer)[rows], self._positions(nodes)
        slots = shifted(rows, self.prefix)
        if before:
            earlier = torch.arange(self.prefix - before, self.prefix, device=positions.device)
            slots = torch.cat([earlier, self.prefix + torch.tensor(nodes, device=positions.device)])
            hidden, positions = torch.cat([state.pending_ND, hidden]), torch.cat([earlier, positions])
        bias = tree_bias(self.tree.ancestors_TT[rows, :end], self.prefix, hidden.dtype, hidden.device, before)
        with state.cache.writing(slots, self.prefix + end), self._computing():
            output: torch.Tensor = state.adapter(hidden[None], positions, bias, state.cache)[0, before:]
        state.cache.length, state.pending_ND = self.prefix, state.pending_ND[:0]
        self._caught_up.add(name)
        return output

    def commit_adapter(self, name: str, path: Sequence[int]) -> None:
        """Keep the part of `path` that the adapter has read; leave the exit states of the rest for its next pass."""
        state = self.state.adapters[name]
        read = [node for node in path if node in self._adapted[name]]
        if name in self._caught_up:
            state.cache.keep(read)
        unread_ND = self.state.rows_at(self.state.exits[name])[as_index(path[len(read) :])]
        with self._computing():
            state.wait(unread_ND)


def as_index(nodes: Sequence[int]) -> slice | list[int]:
    """Node indices as a slice where they are consecutive (a view, no copy), else as a list."""
    nodes = list(nodes)
    if not nodes or nodes == list(range(nodes[0], nodes[0] + len(nodes))):
        return slice(nodes[0], nodes[0] + len(nodes)) if nodes else slice(0, 0)
    return nodes


def shifted(rows: slice | list[int], offset: int) -> slice | torch.Tensor:
    """Cache slots of tree rows that sit behind `offset` committed positions."""
    if isinstance(rows, slice):
        return slice(rows.start + offset, rows.stop + offset)
    return torch.tensor([row + offset for row in rows])
