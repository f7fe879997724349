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

from cats.planning.plan import COARSE, MemoryPlan, ModelSizes, window
from cats.planning.profile import AcceptancePoint, MachineProfile, seconds_for

SERIAL = ((1.0, 0.6), (2.0, 0.15), (3.0, 0.0))
"""(size of the ring in largest matrices, share of the lesser of reading and computing that is not hidden)."""


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
    """Seconds of what a cycle is made of, by the rows of each pass.

    Args:
        coarse_share: of the layers' weights that are resident in their coarse form; passes of it read the exact form of the others.
    """

    def __init__(self, machine: MachineProfile, coarse_share: float = 1.0):
        self._machine, self._coarse_share = machine, coarse_share

    def run(self, rows: float, layers: int) -> float:
        """A pass of `rows` through so many layers."""
        return self.around(rows) + self.inside(rows, layers) if rows > 0 and layers > 0 else 0.0

    def around(self, rows: float) -> float:
        """What a pass takes beside its layers."""
        return seconds_for(self._machine.pass_seconds, rows)

    def inside(self, rows: float, layers: int) -> float:
        """Layers alone."""
        return layers * seconds_for(self._machine.layer_seconds, rows)

    def coarse(self, rows: float, layers: int) -> float:
        """A drafting pass of `rows` through so many layers of the coarse form, and the head."""
        return self.coarse_run(rows, layers) + self.head(rows)

    def coarse_run(self, rows: float, layers: int) -> float:
        """A pass of `rows` through so many layers of the coarse form."""
        coarse = layers * seconds_for(self._machine.coarse_layer_seconds, rows) if self._coarse_share else 0.0
        return self.around(rows) + self._coarse_share * coarse + (1 - self._coarse_share) * self.inside(rows, layers)

    def head(self, rows: float) -> float:
        """Norm and head."""
        return seconds_for(self._machine.head_seconds, rows)

    def exit(self, rows: float) -> float:
        """An adapter, the head, its best tokens."""
        return seconds_for(self._machine.exit_seconds, rows)

    def target(self, rows: float, layers: int, draft: float = 0.0, shallow: float = 0.0) -> Work:
        """A cycle that ends with a target pass of `rows` through so many layers."""
        around = self.around(rows) + self.head(rows) + self._machine.step_seconds
        return Work(draft, shallow, self.inside(rows, layers), around)


def work_of(point: AcceptancePoint, layers: int, machine: MachineProfile, coarse_share: float = 1.0) -> Work:
    """One cycle of the method, in a model of so many layers; for `coarse_share` see `Passes`."""
    work = point.method.work(Passes(machine, coarse_share), point.exits, layers, point.nodes)
    if work is None:
        raise ValueError(f"the cost of a cycle of {point.method.name} is not known")
    return work


def cycle_seconds(sizes: ModelSizes, plan: MemoryPlan, machine: MachineProfile, work: Work) -> CycleSeconds:
    """Seconds of a cycle under a memory plan, in the steady state (see the module)."""
    rate = machine.flash_bytes_per_second
    taking = len(plan.streamed) * machine.take_seconds
    inside = work.layers * busy_share(sizes, plan) + taking
    computing = work.total + taking
    quiet = computing - inside
    bound = computing
    if plan.streamed:
        behind = (plan.streamed_bytes - min(read_ahead(plan), quiet * rate)) / rate
        serial = serial_share(plan.demand.ring_buffers)
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


def read_ahead(plan: MemoryPlan) -> int:
    """Bytes of the coming pass that the ring takes before the pass begins: the first streamed matrices, as many as fit whole.

    Half a matrix of the ring is counted as lost, for what is too small at the ring's end to hold the next one.
    """
    room, ahead = plan.ring_bytes, 0
    for piece in plan.streamed:
        room -= window(piece.nbytes)
        if room < 0:
            break
        ahead += piece.nbytes
    return max(min(ahead, plan.ring_bytes - plan.ring_bytes // plan.demand.ring_buffers // 2), 0)


def coarse_share(sizes: ModelSizes, plan: MemoryPlan) -> float:
    """Share of the layers' coarse form that the plan holds; where it holds exact weights instead, passes of the coarse form read those."""
    coarse = [piece for piece in sizes.pieces if COARSE.needs(piece)]
    total = sum(piece.nbytes for piece in coarse)
    return sum(piece.nbytes for piece in coarse if piece in plan.pinned) / total if total else 0.0
