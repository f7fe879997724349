"""What was measured, in JSON: what a machine takes for the parts of a cycle, and how many tokens a method commits in one.

Seconds are linear between the measured rows of a pass, and beyond them along the last two. Accepted lengths are those of the settings
that were measured; nothing is said of others.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cats.config import MethodConfig
from cats.errors import CatsError
from cats.files import write_atomically
from cats.settings import as_record

Table = tuple[tuple[int, float], ...]
"""(rows of a pass, seconds), ascending."""
T = TypeVar("T")
MethodOf = Callable[[Mapping[str, Any]], MethodConfig]
"""The configuration of a record that `cats.settings.as_record` wrote; the methods themselves know it."""
MACHINE_FORMAT = "cats machine profile 2"
ACCEPTANCE_FORMAT = "cats acceptance profile 2"
TABLES = ("pass_seconds", "layer_seconds", "head_seconds", "exit_seconds", "coarse_layer_seconds")
MAY_LACK = TABLES[-2:]


@dataclass(frozen=True)
class MachineProfile:
    """What one machine takes for one model.

    Attributes:
        subject: what the figures hold for: processor, threads, dtypes, storage, shapes; any other value asks for another measurement.
        measured: when, as ISO 8601.
        flash_bytes_per_second: of the reader, over the model's own matrices.
        take_seconds: of taking one streamed matrix that has already arrived.
        step_seconds: of a step of the engine outside all passes: judging, committing, bookkeeping.
        pass_seconds: of a pass through any number of layers, beside the layers: mask, positions, Python.
        layer_seconds: of one resident decoder layer.
        head_seconds: of norm and head.
        exit_seconds: of an adapter with the head and its best tokens; empty where no adapter was there.
        coarse_layer_seconds: of one layer's coarse form; empty where the weights have none.
    """

    subject: Mapping[str, Any]
    measured: str
    flash_bytes_per_second: float
    take_seconds: float
    step_seconds: float
    pass_seconds: Table
    layer_seconds: Table
    head_seconds: Table
    exit_seconds: Table = ()
    coarse_layer_seconds: Table = ()

    def __post_init__(self) -> None:
        for name in ("flash_bytes_per_second", "take_seconds", "step_seconds"):
            check(math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, f"{name} is {getattr(self, name)}")
        check(self.flash_bytes_per_second > 0, "flash_bytes_per_second is 0")
        for name in TABLES:
            rows, seconds = [entry[0] for entry in getattr(self, name)], [entry[1] for entry in getattr(self, name)]
            check((bool(rows) or name in MAY_LACK) and rows == sorted(set(rows)), f"{name} lists the rows {rows}")
            check(all(math.isfinite(value) and value >= 0 for value in seconds), f"{name} has the seconds {seconds}")


@dataclass(frozen=True)
class AcceptancePoint:
    """One method as it was measured.

    Attributes:
        exits: of the adapters that it uses, draft first.
        accepted: tokens per target pass, the target's own included.
        nodes: that a target pass verifies, the root included, on average.
    """

    method: MethodConfig
    exits: tuple[int, ...]
    accepted: float
    nodes: float

    def __post_init__(self) -> None:
        fits = len(self.exits) <= 2 and list(self.exits) == sorted(set(self.exits)) and all(layer > 0 for layer in self.exits)
        check(fits, f"{self.method.name} has the exits {list(self.exits)}")
        for name in ("accepted", "nodes"):
            value = getattr(self, name)
            check(math.isfinite(value) and value >= 1, f"{self.method.name} has {name} {value}")


@dataclass(frozen=True)
class AcceptanceProfile:
    """Measured accepted lengths of one model with its adapters; lies beside the adapters as `acceptance.json`."""

    points: tuple[AcceptancePoint, ...]
    notes: tuple[str, ...] = ()


def check(holds: bool, fault: str) -> None:
    """Raise `ValueError` with what is wrong."""
    if not holds:
        raise ValueError(fault)


def seconds_for(table: Table, rows: float) -> float:
    """Seconds of a pass of `rows`; below the table its first value, beyond it along its last two, never falling."""
    if rows <= table[0][0] or len(table) == 1:
        return table[0][1]
    for (left, before), (right, after) in itertools.pairwise(table):
        if rows <= right:
            return before + (after - before) * (rows - left) / (right - left)
    (left, before), (right, after) = table[-2:]
    return after + max(after - before, 0.0) / (right - left) * (rows - right)


def save_machine(profile: MachineProfile, path: Path) -> None:
    """Write it as JSON, atomically; raises `OSError` where that is impossible."""
    save(path, {"format": MACHINE_FORMAT, **asdict(profile)})


def load_machine(path: Path, subject: Mapping[str, Any]) -> MachineProfile | None:
    """The profile in `path`; None where there is none, it is damaged, or was measured for something else."""
    try:
        profile = load(path, MACHINE_FORMAT, machine_of)
    except CatsError:
        return None
    return profile if profile.subject == json.loads(json.dumps(dict(subject))) else None


def machine_of(fields: Mapping[str, Any]) -> MachineProfile:
    """A machine profile of a JSON object."""
    tables = {name: tuple((int(rows), float(seconds)) for rows, seconds in fields[name]) for name in TABLES}
    rates = {name: float(fields[name]) for name in ("flash_bytes_per_second", "take_seconds", "step_seconds")}
    return MachineProfile(dict(fields["subject"]), str(fields["measured"]), **rates, **tables)  # type: ignore[arg-type]


def save_acceptance(profile: AcceptanceProfile, path: Path) -> None:
    """Write it as JSON, atomically."""
    points = [{**asdict(point), "method": as_record(point.method)} for point in profile.points]
    save(path, {"format": ACCEPTANCE_FORMAT, "points": points, "notes": profile.notes})


def load_acceptance(path: Path, method_of: MethodOf) -> AcceptanceProfile:
    """The profile in `path`; raises `CatsError` naming the file and what is wrong in it."""
    return load(path, ACCEPTANCE_FORMAT, partial(acceptance_of, method_of=method_of))


def acceptance_of(fields: Mapping[str, Any], method_of: MethodOf) -> AcceptanceProfile:
    """An acceptance profile of a JSON object."""
    points = tuple(
        AcceptancePoint(method_of(point["method"]), tuple(map(int, point["exits"])), float(point["accepted"]), float(point["nodes"]))
        for point in fields["points"]
    )
    return AcceptanceProfile(points, tuple(map(str, fields.get("notes", ()))))


def save(path: Path, fields: Mapping[str, Any]) -> None:
    """Write JSON, atomically."""
    text = json.dumps(fields, indent=1) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def load(path: Path, kind: str, build: Callable[[Mapping[str, Any]], T]) -> T:
    """Read JSON of one format and build what it stands for; every fault becomes one sentence."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        named = fields.get("format") if isinstance(fields, dict) else None
        check(named == kind, f"its format is {named!r}, not {kind!r}")
        return build(fields)
    except KeyError as error:
        raise CatsError(f"{path} lacks {error.args[0]!r}; make it again, or remove it.") from error
    except (OSError, TypeError, ValueError, OverflowError, CatsError) as error:
        raise CatsError(f"{path} cannot be used: {str(error).splitlines()[0]}; make it again, or remove it.") from error
