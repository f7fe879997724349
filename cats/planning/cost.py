"""What a cycle costs in seconds.

A cycle is a front (drafting, shallow verification) and a target pass. The processor does them one after the other, while
one reader fills the ring. Three things bound a cycle of `S` streamed bytes at the flash's rate `F`:

    the processor    quiet + busy
    the reader       S / F
    the ring         quiet + (S - ahead) / F

`busy` is the part of the target pass between its first and its last streamed matrix. `quiet` is all else (front, head, matrices
pinned before the first and behind the last streamed one): nothing leaves the ring then, so the reader gets `ahead` by at most what
the ring holds. A cycle takes the longest of the three; what it takes beyond the processor is stream wait. Pinned matrices are spread
evenly over the pass (plan.py), so within `busy` reading and computing overlap. Against a simulation of the ring, matrix by matrix
(tests/test_planning.py), this is within 2 %, and within 5 % where stream and processor are exactly balanced. A ring of fewer than three
of the largest matrices overlaps only in part: the share of `SERIAL` is an average over such simulations, single cases lie up to 20 % off.
"""

import itertools
from dataclasses import dataclass

from cats.config import AutoregressiveConfig, CascadeConfig, KangarooConfig, MethodConfig, PromptLookupConfig
from cats.planning.plan import MemoryPlan, ModelSizes, window
from cats.planning.profile import AcceptancePoint, MachineProfile, seconds_for

SERIAL = ((1.0, 0.6), (2.0, 0.15), (3.0, 0.0))
"""(size of the ring in largest matrices, share of the lesser of reading and computing that is not hidden)."""
PRICED = (AutoregressiveConfig, PromptLookupConfig, KangarooConfig, CascadeConfig)
"""Methods whose cycles can be priced."""


@dataclass(frozen=True)
class Work:
    """Processor seconds of one cycle with everything resident: `layers` is the target pass behind the resident front, `rest` its head,
    masks and bookkeeping."""

    draft: float
    shallow: float
    layers: float
    rest: float

    @property
    def total(self) -> float:
        """Of the cycle."""
        return self.draft + self.shallow + self.layers + self.rest


@dataclass(frozen=True)
class CycleSeconds:
    """Predicted seconds of one cycle, and those of them that wait for the stream."""

    total: float
    stream_wait: float


class Passes:
    """Seconds of what a cycle is made of, by the rows of each pass."""

    def __init__(self, machine: MachineProfile):
        self._machine = machine

    def run(self, rows: float, layers: int) -> float:
        """A pass of `rows` through so many layers."""
        return self.around(rows) + self.inside(rows, layers) if rows > 0 and layers > 0 else 0.0

    def around(self, rows: float) -> float:
        """What a pass takes beside its layers."""
        return seconds_for(self._machine.pass_seconds, rows)

    def inside(self, rows: float, layers: int) -> float:
        """Layers alone."""
        return layers * seconds_for(self._machine.layer_seconds, rows)

    def exit(self, rows: float) -> float:
        """An adapter, the head, its best tokens."""
        return seconds_for(self._machine.exit_seconds, rows)

    def target(self, rows: float, layers: int, draft: float = 0.0, shallow: float = 0.0) -> Work:
        """A cycle that ends with a target pass of `rows` through so many layers."""
        around = self.around(rows) + seconds_for(self._machine.head_seconds, rows) + self._machine.step_seconds
        return Work(draft, shallow, self.inside(rows, layers), around)


def work_of(point: AcceptancePoint, layers: int, machine: MachineProfile) -> Work:
    """One cycle of the method, in a model of so many layers."""
    passes, method, rows = Passes(machine), point.method, point.nodes
    if isinstance(method, CascadeConfig):
        return cascade_work(passes, method, point.exits, layers, rows)
    if isinstance(method, KangarooConfig):
        drafting = rows * passes.run(1, point.exits[0]) + min(rows, method.steps) * passes.exit(1)
        return passes.target(rows, layers - point.exits[0], drafting)
    return passes.target(rows, layers)


def cascade_work(passes: Passes, method: CascadeConfig, exits: tuple[int, ...], layers: int, nodes: float) -> Work:
    """One cycle of CATS (cats/methods/cascade.py); of a tree, with a correction at every other place of the chain."""
    draft_exit, shallow_exit = exits
    rounds, steps, between = method.sv_passes, method.steps, shallow_exit - draft_exit
    drafting = rounds * steps * (passes.run(1, draft_exit) + passes.exit(1))
    checking = rounds * (passes.run(1, draft_exit) + passes.run(steps + 1, between) + passes.exit(steps + 1))
    entering = fresh = max(nodes - rounds * (steps + 1), 0.0)
    corrections = rounds * ((steps + 1) // 2)
    if method.tree_topk > 1 and entering > corrections:
        fresh -= corrections
        checking += passes.run(corrections, draft_exit) + passes.exit(corrections)
        checking += (method.branch_rounds - 1) * (passes.run(method.tree_topk, draft_exit) + passes.exit(method.tree_topk))
    checking += passes.run(fresh, draft_exit) + passes.run(entering, between)
    return passes.target(nodes, layers - shallow_exit, drafting, checking)


def label_of(method: MethodConfig, exits: tuple[int, ...]) -> str:
    """The method and its settings in a few words."""
    if isinstance(method, CascadeConfig):
        shape = "chain" if method.tree_topk == 1 else "tree"
        whole = method.sv_passes * method.steps * method.tree_topk + 1 if method.total_tokens == -1 else method.total_tokens
        nodes = f", {whole} nodes" if method.tree_topk > 1 else ""
        rounds = f", {method.sv_passes} rounds" if method.sv_passes > 1 else ""
        branches = f", {method.branch_rounds} branch rounds" if method.branch_rounds > 1 else ""
        return f"CATS {shape}, exits {' and '.join(map(str, exits))}, {method.steps} steps{nodes}{rounds}{branches}"
    if isinstance(method, KangarooConfig):
        return f"Kangaroo, exit {exits[0]}, {method.steps} steps"
    if isinstance(method, PromptLookupConfig):
        return f"prompt lookup, {method.continuation} tokens"
    return "plain decoding" if isinstance(method, AutoregressiveConfig) else method.name


def cycle_seconds(sizes: ModelSizes, plan: MemoryPlan, machine: MachineProfile, work: Work) -> CycleSeconds:
    """Seconds of a cycle under a memory plan, in the steady state (see the module)."""
    rate = machine.flash_bytes_per_second
    taking = len(plan.streamed) * machine.take_seconds
    inside = work.layers * busy_share(sizes, plan) + taking
    computing = work.total + taking
    quiet = computing - inside
    bound = computing
    if plan.streamed:
        behind = (plan.streamed_bytes - min(read_ahead(sizes, plan), quiet * rate)) / rate
        serial = serial_share(plan.ring_bytes / largest_window(sizes))
        bound = max(computing, quiet + max(inside, behind) + serial * min(inside, behind))
    return CycleSeconds(bound, bound - computing)


def serial_share(buffers: float) -> float:
    """`SERIAL`, linear between its entries."""
    for (left, before), (right, after) in itertools.pairwise(SERIAL):
        if buffers <= right:
            return before + (after - before) * (max(buffers, left) - left) / (right - left)
    return SERIAL[-1][1]


def busy_share(sizes: ModelSizes, plan: MemoryPlan) -> float:
    """Share of the target pass's arithmetic (in bytes of weights) between its first streamed matrix and its last, that one left out."""
    if not plan.streamed:
        return 0.0
    every = [piece for piece in sizes.pieces if piece.layer >= plan.demand.front]
    first, last = every.index(plan.streamed[0]), every.index(plan.streamed[-1])
    return sum(piece.nbytes for piece in every[first:last]) / sum(piece.nbytes for piece in every)


def read_ahead(sizes: ModelSizes, plan: MemoryPlan) -> int:
    """Bytes of the coming pass that the ring takes before the pass begins: the first streamed matrices, as many as fit whole.

    Half a matrix of the ring is counted as lost, for what is too small at the ring's end to hold the next one.
    """
    room, ahead = plan.ring_bytes, 0
    for piece in plan.streamed:
        room -= window(piece.nbytes)
        if room < 0:
            break
        ahead += piece.nbytes
    return max(min(ahead, plan.ring_bytes - largest_window(sizes) // 2), 0)


def largest_window(sizes: ModelSizes) -> int:
    """Bytes of the largest matrix's window."""
    return max(window(nbytes) for _, nbytes in sizes.matrices)
