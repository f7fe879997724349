"""What was measured, in files: a device's rates and seconds, and how many tokens a target pass commits.

Both are JSON, checked on reading, written atomically. Between measured points the models are simple, and said here:

    seconds of a layer    linear between the node counts of the table, beyond it along the last two, in proportion to bytes for another size
    chain of n            A(n) = 1 + a + ... + a^n with a of its own at every measured (exit, n), linear between steps and between exits
    tree of N nodes       the chain of the same steps times a gain, linear in log(N / nodes of that chain), 1 for the chain itself

Outside what was measured the nearest value is held, so a plan is never better than a measurement for being further away,
and `AcceptanceProfile.estimate` says what had to be held or interpolated.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from cats.errors import CatsError
from cats.files import write_atomically

Table = tuple[tuple[int, float], ...]
"""(nodes of a pass, seconds), ascending."""
T = TypeVar("T")
DEVICE_FORMAT = "cats device profile 1"
ACCEPTANCE_FORMAT = "cats acceptance profile 1"


@dataclass(frozen=True)
class DeviceProfile:
    """A device, in bytes and seconds.

    Attributes:
        flash_bytes_per_second: sequential direct reads.
        memory_bytes_per_second: reading resident memory.
        layer_bytes: bytes as stored of the decoder layer that was timed.
        layer_seconds: one such layer, resident, by nodes of the pass.
        lm_head_bytes, lm_head_seconds: the same of the head.
        interpreter_bytes: the process before any weight is loaded.
        compute_itemsize: bytes of one number in caches and activations.
        widen_bytes: work space of the projections, 0 where they need none.
        notes: what was measured where, and what was derived how.
    """

    name: str
    flash_bytes_per_second: float
    memory_bytes_per_second: float
    layer_bytes: int
    layer_seconds: Table
    lm_head_bytes: int
    lm_head_seconds: Table
    interpreter_bytes: int
    compute_itemsize: int
    widen_bytes: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("flash_bytes_per_second", "memory_bytes_per_second", "layer_bytes", "lm_head_bytes", "compute_itemsize"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise CatsError(f"the device profile {self.name!r} has {name} {value}; it must be a number above 0.")
        for name in ("interpreter_bytes", "widen_bytes"):
            if getattr(self, name) < 0:
                raise CatsError(f"the device profile {self.name!r} has {name} {getattr(self, name)}; it must not be negative.")
        for name in ("layer_seconds", "lm_head_seconds"):
            check_table(getattr(self, name), f"{name} of the device profile {self.name!r}")

    def layer(self, nodes: float, layer_bytes: int) -> float:
        """Seconds of one resident decoder layer of `layer_bytes` for a pass of `nodes`."""
        return interpolated(self.layer_seconds, nodes) * layer_bytes / self.layer_bytes

    def lm_head(self, nodes: float, lm_head_bytes: int) -> float:
        """Seconds of a head of `lm_head_bytes` for a pass of `nodes`."""
        return interpolated(self.lm_head_seconds, nodes) * lm_head_bytes / self.lm_head_bytes


@dataclass(frozen=True)
class AcceptancePoint:
    """Accepted length (tokens per target pass, the target's own included) of one setting; `nodes` None is a chain."""

    shallow_exit: int
    steps: int
    nodes: int | None
    accepted: float


@dataclass(frozen=True)
class Estimate:
    """A predicted accepted length, and in sentences what of it was not measured."""

    accepted: float
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class AcceptanceProfile:
    """Measured accepted lengths of one model with its adapters.

    Attributes:
        draft_exit: of all points; points whose shallow exit equals it are drafting without a shallow verifier.
        tree_topk, branch_rounds: what the tree points were measured with.
        sv_passes: what all points were measured with.
    """

    name: str
    draft_exit: int
    points: tuple[AcceptancePoint, ...]
    tree_topk: int = 10
    branch_rounds: int = 1
    sv_passes: int = 1
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        what = f"the acceptance profile {self.name!r}"
        if not self.chains:
            raise CatsError(f"{what} has no chain (a point with nodes null) of a shallow exit; measure one.")
        if self.draft_exit < 1 or self.tree_topk < 2 or self.branch_rounds < 1 or self.sv_passes < 1:
            raise CatsError(f"{what}: draft_exit, branch_rounds and sv_passes must be at least 1, tree_topk at least 2.")
        for point in self.points:
            least = chain_nodes(point.steps)
            if point.steps < 1 or point.shallow_exit < self.draft_exit or not 1 <= point.accepted <= self.deepest(point.steps):
                raise CatsError(
                    f"{what} has the point {asdict(point)}; steps must be at least 1, the shallow exit not before the draft exit "
                    f"{self.draft_exit}, and the accepted length between 1 and what so many steps can reach."
                )
            if point.nodes is not None and point.nodes <= least:
                raise CatsError(f"{what} has a tree of {point.nodes} nodes for {point.steps} steps; a tree there has more than {least}.")
            if point.nodes is not None and all(chain.shallow_exit != point.shallow_exit for chain in self.chains):
                raise CatsError(f"{what} has a tree at exit {point.shallow_exit} but no chain there; measure the chain as well.")

    @property
    def chains(self) -> tuple[AcceptancePoint, ...]:
        """The points without branches."""
        return tuple(point for point in self.points if point.nodes is None)

    @property
    def trees(self) -> tuple[AcceptancePoint, ...]:
        """The points with branches."""
        return tuple(point for point in self.points if point.nodes is not None)

    @property
    def longest(self) -> int:
        """The largest number of steps measured."""
        return max(point.steps for point in self.points)

    def deepest(self, steps: int) -> int:
        """Most tokens that a target pass can commit: drafted ones, free tokens, continuations, the target's own."""
        return self.sv_passes * (steps + 1) + self.branch_rounds + 1

    def estimate(self, shallow_exit: int, steps: int, nodes: int | None = None) -> Estimate:
        """Accepted length at an exit, for a chain of `steps` or a tree of `nodes` on it."""
        doubts = []
        accepted = self._chain(shallow_exit, steps)
        exits = sorted({point.shallow_exit for point in self.chains})
        if shallow_exit not in exits:
            between = exits[0] < shallow_exit < exits[-1]
            how = "lies between measured exits" if between else "takes the nearest measured exit's"
            doubts.append(f"Nothing was measured at shallow exit {shallow_exit}: its acceptance {how} ({', '.join(map(str, exits))}).")
        lengths = sorted({point.steps for point in self.chains})
        if steps not in lengths:
            doubts.append(f"Nothing was measured with {steps} steps: the acceptance of a drafted token follows {lengths} steps.")
        if nodes is not None:
            gain, more = self._gain(shallow_exit, steps, nodes)
            accepted, doubts = accepted * gain, doubts + more
        return Estimate(min(accepted, float(self.deepest(steps))), tuple(doubts))

    def _chain(self, shallow_exit: int, steps: int) -> float:
        """A(n) at an exit, interpolated."""
        by_exit = []
        for exit_layer in sorted({point.shallow_exit for point in self.chains}):
            chains = [point for point in self.chains if point.shallow_exit == exit_layer]
            lengths = sorted((point.steps, token_acceptance(point.accepted, point.steps)) for point in chains)
            by_exit.append((exit_layer, held_between(lengths, steps)))
        return chain_length(held_between(by_exit, shallow_exit), steps)

    def _gain(self, shallow_exit: int, steps: int, nodes: int) -> tuple[float, list[str]]:
        """What a tree multiplies a chain's accepted length with, and the doubts about it."""
        if not self.trees:
            return 1.0, ["No tree was measured: a tree is credited with its chain's acceptance."]
        nearest = min({point.shallow_exit for point in self.trees}, key=lambda other: abs(other - shallow_exit))
        known = [point for point in self.trees if point.shallow_exit == nearest]
        doubts = []
        if nearest != shallow_exit:
            doubts.append(f"No tree was measured at shallow exit {shallow_exit}: its gain over a chain is that of exit {nearest}.")
        largest = max(point.nodes or 0 for point in known)
        if (steps, nodes) not in {(point.steps, point.nodes) for point in known}:
            doubts.append(f"A tree of {nodes} nodes on {steps} steps was not measured: its gain follows trees of up to {largest} nodes.")
        gains = [(0.0, 1.0)]
        for point in known:
            ratio = math.log((point.nodes or 0) / chain_nodes(point.steps))
            gains.append((ratio, point.accepted / self._chain(nearest, point.steps)))
        return held_between(sorted(gains), math.log(max(nodes / chain_nodes(steps), 1.0))), doubts


def chain_nodes(steps: int) -> int:
    """Nodes of a chain's target pass: root and drafted tokens, and a correction at every other place (the true count varies by cycle)."""
    return steps + 1 + (steps + 1) // 2


def chain_length(acceptance: float, steps: int) -> float:
    """1 + a + ... + a^n: tokens of a target pass when each of n drafted tokens is accepted with probability a after the one before."""
    return sum(acceptance**place for place in range(steps + 1))


@functools.lru_cache(maxsize=1024)
def token_acceptance(accepted: float, steps: int) -> float:
    """The a of `chain_length` that gives this accepted length (above 1 where the free token was accepted as well)."""
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if chain_length(middle, steps) < accepted else (low, middle)
    return (low + high) / 2


def held_between(points: Sequence[tuple[float, float]], place: float) -> float:
    """Linear between ascending points; the first and the last value are held outside."""
    if place <= points[0][0]:
        return points[0][1]
    for (left, before), (right, after) in itertools.pairwise(points):
        if place <= right:
            return after if right == left else before + (after - before) * (place - left) / (right - left)
    return points[-1][1]


def interpolated(table: Table, nodes: float) -> float:
    """Seconds for `nodes`: linear in the table; below it its first value, beyond it along its last two (never falling)."""
    if nodes <= table[-1][0] or len(table) == 1:
        return held_between(table, nodes)
    (left, before), (right, after) = table[-2:]
    return after + max(after - before, 0.0) / (right - left) * (nodes - right)


def check_table(table: Table, what: str) -> None:
    """Raise `CatsError` unless nodes rise from 1 on and seconds are above 0."""
    nodes = [entry[0] for entry in table]
    if not table or nodes[0] != 1 or nodes != sorted(set(nodes)):
        raise CatsError(f"{what} lists nodes {nodes}; they must start at 1 and rise.")
    if not all(math.isfinite(seconds) and seconds > 0 for _, seconds in table):
        raise CatsError(f"{what} has seconds that are not above 0; measure again.")


def save_device(profile: DeviceProfile, path: Path) -> None:
    """Write a device profile as JSON, atomically."""
    save(path, DEVICE_FORMAT, asdict(profile))


def load_device(path: str | Path) -> DeviceProfile:
    """Read a device profile; raises `CatsError` naming the file and what is wrong in it."""
    return load(Path(path), DEVICE_FORMAT, device_of, "python -m scripts.measure_device")


def save_acceptance(profile: AcceptanceProfile, path: Path) -> None:
    """Write an acceptance profile as JSON, atomically."""
    save(path, ACCEPTANCE_FORMAT, asdict(profile))


def load_acceptance(path: str | Path) -> AcceptanceProfile:
    """Read an acceptance profile; raises `CatsError` naming the file and what is wrong in it."""
    return load(Path(path), ACCEPTANCE_FORMAT, acceptance_of, "python -m evaluation.acceptance_table, which measures accepted lengths")


def device_of(fields: Mapping[str, Any]) -> DeviceProfile:
    """A device profile of a JSON object."""
    names = ("layer_seconds", "lm_head_seconds")
    tables = {name: tuple((whole(nodes), number(seconds)) for nodes, seconds in fields[name]) for name in names}
    rates = {name: number(fields[name]) for name in ("flash_bytes_per_second", "memory_bytes_per_second")}
    sizes = {name: whole(fields[name]) for name in ("layer_bytes", "lm_head_bytes", "interpreter_bytes", "compute_itemsize")}
    widen, notes = whole(fields.get("widen_bytes", 0)), tuple(map(str, fields.get("notes", ())))
    return DeviceProfile(name=str(fields["name"]), **tables, **rates, **sizes, widen_bytes=widen, notes=notes)  # type: ignore[arg-type]


def acceptance_of(fields: Mapping[str, Any]) -> AcceptanceProfile:
    """An acceptance profile of a JSON object."""
    points = tuple(
        AcceptancePoint(
            whole(point["shallow_exit"]),
            whole(point["steps"]),
            None if point["nodes"] is None else whole(point["nodes"]),
            number(point["accepted"]),
        )
        for point in fields["points"]
    )
    settings = {name: whole(fields.get(name, default)) for name, default in (("tree_topk", 10), ("branch_rounds", 1), ("sv_passes", 1))}
    notes = tuple(map(str, fields.get("notes", ())))
    return AcceptanceProfile(str(fields["name"]), whole(fields["draft_exit"]), points, **settings, notes=notes)


def number(value: Any) -> float:
    """A JSON number; truth values and strings are refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def whole(value: Any) -> int:
    """A JSON number without a fraction."""
    if number(value) != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def save(path: Path, kind: str, fields: Mapping[str, Any]) -> None:
    """Write `fields` as JSON with their format's name, atomically."""
    text = json.dumps({"format": kind, **fields}, indent=1) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def load(path: Path, kind: str, build: Callable[[Mapping[str, Any]], T], source: str) -> T:
    """Read JSON of one format and build what it stands for; every fault becomes one sentence."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CatsError(f"there is no file {path}; make one with {source}.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CatsError(f"cannot read {path} as JSON: {str(error).splitlines()[0]}; make it again with {source}.") from error
    found = fields.get("format") if isinstance(fields, dict) else None
    if found != kind:
        raise CatsError(f"{path} has the format {found!r}, not {kind!r}; give the right file, or make one with {source}.")
    try:
        return build(fields)
    except KeyError as error:
        raise CatsError(f"{path} lacks {error.args[0]!r}; make it again with {source}.") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise CatsError(f"{path} holds a wrong value: {error}; make it again with {source}.") from error
    except CatsError as error:
        raise CatsError(f"{path}: {error}") from error
