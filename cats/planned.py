"""Loading under a budget without naming a method: what weights and adapters allow is priced on this machine, and the fastest is taken.

The parts: accepted lengths from `acceptance.json` in the model's directory and beside the adapters, seconds from `cats/machine.py`, memory
from the plan that loading itself makes, the choice from `cats/planning`. Weights with a coarse form (nested ones, or an int8 copy) can
draft with it; where that was not measured, an accepted length is assumed, and the plan says so. Without accepted lengths and without a
coarse form there is nothing to choose by, so the method that these adapters have without a budget is kept, nothing is measured, and the
plan says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cats.adapter import AdapterModel
from cats.checkpoint import TensorPlace, locate_tensors
from cats.config import MemoryOptions, MethodConfig, require
from cats.loading import Checkpoint, checkpoint_of, demand_of, sizes_of_checkpoint
from cats.machine import Subject, machine_profile
from cats.methods import CLASSES, METHODS, best_method, method_of, needs_of, with_needs
from cats.methods.autoregressive import AutoregressiveConfig
from cats.methods.nested import ASSUMED_ACCEPTED, NestedConfig
from cats.planning.plan import COARSE
from cats.planning.planner import Choice, Option, choose
from cats.planning.profile import AcceptancePoint, AcceptanceProfile, load_acceptance
from cats.runtime.budget import GROWTH, interpreter_bytes
from cats.settings import flag_of, settings_of
from cats.smollm2 import Report
from cats.weight import has_coarse

ACCEPTANCE_FILE = "acceptance.json"
PLAIN = AcceptancePoint(AutoregressiveConfig(), (), 1.0, 1.0)
ASSUMED = AcceptancePoint(NestedConfig(steps=20, adaptive=False), (), ASSUMED_ACCEPTED, 21.0)
"""What stands for nested weights, and for an int8 copy, that nobody measured."""
Place = tuple[Path, int | None]


@dataclass(frozen=True)
class Planning:
    """How to plan.

    Attributes:
        settings: of methods, by name, that stay as they are; a method that lacks one, or was not measured with it, is left out.
        report: called while the machine is measured, with what is measured and the share of it that is done.
        again: measure the machine even where it has been.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    report: Report = lambda what, share: None
    again: bool = False


@dataclass(frozen=True)
class LoadPlan:
    """What a load under a budget settled on.

    Attributes:
        method: that answers are made with where none is named.
        adapters: those that it uses, by name.
        memory: the options that were given, with the ring and the tree that were chosen.
        choice: the predictions; None where nothing could be predicted.
        reason: why this method, in one sentence.
        measured_now: whether the machine was measured for it, and not before.
        without_copy: whether a coarse copy was asked for and is not resident, since the method does not draft with it.
    """

    method: MethodConfig
    adapters: dict[str, Place]
    memory: MemoryOptions
    choice: Choice | None
    reason: str
    measured_now: bool = False
    without_copy: bool = False

    @property
    def lines(self) -> tuple[str, str]:
        """What was chosen, and why."""
        if self.choice is None:
            return f"plan: {self.method.label(self.exits)}, the default of these adapters; nothing is predicted", f"why: {self.reason}"
        when = "just now" if self.measured_now else self.choice.machine.measured
        return f"plan: {self.choice.sentence}", f"why: {self.reason} (machine measured {when})"

    @property
    def exits(self) -> tuple[int, ...]:
        """Exits of the adapters, as far as they are known."""
        return tuple(exit_layer for _, exit_layer in self.adapters.values() if exit_layer is not None)


@dataclass(frozen=True)
class Loading:
    """What is to be loaded, read as far as planning needs it: a configuration, places of tensors, adapters.

    Attributes:
        checkpoint: with the coarse copy that was asked for; `plain` is without it, for methods that need none.
        adapters: candidates by name ("draft", "shallow") with their sizes, but without weights; the first of each is what is used where
            nothing is planned.
    """

    checkpoint: Checkpoint
    plain: Checkpoint
    places: Mapping[str, TensorPlace]
    device: torch.device
    memory: MemoryOptions
    adapters: Mapping[str, Sequence[tuple[Place, AdapterModel]]]

    @classmethod
    def read(
        cls,
        directory: Path,
        adapters: Mapping[str, Sequence[Place]],
        dtypes: tuple[str, str],
        device: torch.device,
        memory: MemoryOptions,
    ) -> "Loading":
        """Read it; whatever is missing or damaged raises `CatsError`."""
        checkpoint = checkpoint_of(directory, dtypes, device, memory.coarse)
        plain = checkpoint if memory.coarse is None else checkpoint_of(directory, dtypes, device)
        read = {
            name: [
                ((path, model.exit_layer), model)
                for path, exit_layer in candidates
                for model in [AdapterModel.from_pretrained(path, exit_layer, dtypes[0], "meta", sparing=True)]
            ]
            for name, candidates in adapters.items()
            if candidates
        }
        return cls(checkpoint, plain, locate_tensors(directory), device, memory, read)

    @property
    def has_coarse(self) -> bool:
        """Whether there is a coarse form to draft with."""
        return has_coarse(self.checkpoint.config, self.memory.coarse)

    def points(self, profile: AcceptanceProfile) -> Iterator[AcceptancePoint]:
        """Plain decoding, what was measured, and what is assumed of a coarse form that was not."""
        yield PLAIN
        yield from (point for point in profile.points if point.method != PLAIN.method)
        if self.has_coarse and not any(point.method.name == ASSUMED.method.name and point.method.priced for point in profile.points):
            yield ASSUMED

    def options(self, profile: AcceptanceProfile, settings: Mapping[str, Any]) -> Iterator[Option]:
        """Every way to run that weights and adapters allow and that agrees with the settings; plain decoding, which has none, first."""
        interpreter = interpreter_bytes()
        for point in self.points(profile):
            method = point.method
            if not method.priced or CLASSES[method.name].lacks(method, self.checkpoint.config, self.memory.coarse) is not None:
                continue
            if any(getattr(method, name, None) != value for name, value in settings.items()):
                continue
            used = self.chosen(point)
            if used is not None:
                yield self.option(point, [model for _, model in used.values()], interpreter)

    def chosen(self, point: AcceptancePoint) -> dict[str, tuple[Place, AdapterModel]] | None:
        """The adapters that the point was measured with; None where one is not among the candidates."""
        names = needs_of(point.method).adapters
        if len(names) != len(point.exits):
            return None
        used = {
            name: entry
            for name, exit_layer in zip(names, point.exits, strict=True)
            for entry in self.adapters.get(name, ())
            if entry[1].exit_layer == exit_layer
        }
        return used if len(used) == len(names) else None

    def option(self, point: AcceptancePoint, adapters: Sequence[AdapterModel], interpreter: int) -> Option:
        """What the point asks of memory, as loading will ask it."""
        memory = memory_for(self.memory, point.method)
        checkpoint = self.plain if memory.coarse is None else self.checkpoint
        demand = demand_of(memory, checkpoint, adapters, interpreter, table=self.device.type == "cuda")
        return Option(point, sizes_of_checkpoint(checkpoint, adapters), demand, assumed=point is ASSUMED)

    def subject(self) -> Subject:
        """What is measured of the machine."""
        timed = next((candidates[0] for candidates in self.adapters.values()), None)
        adapter, nbytes = (None, 0) if timed is None else ((timed[0][0], int(timed[1].exit_layer or 0)), timed[1].nbytes)
        budget = self.memory.budget_bytes if self.memory.covers == "process" else None
        room = None if budget is None else budget - int(psutil.Process().memory_info().rss) - GROWTH
        return Subject(self.checkpoint, self.places, self.device, adapter, nbytes, room, self.memory.coarse)


def plan_load(loading: Loading, planning: Planning) -> LoadPlan:
    """The method, adapters and memory that make most tokens per second within the budget.

    Raises:
        CatsError: nothing fits the budget, or something is missing or damaged.
    """
    profile, settings, memory = acceptance_beside(loading), planning.settings, loading.memory
    if profile is None and loading.has_coarse:
        profile = AcceptanceProfile(())
    if profile is None:
        where = f"no {ACCEPTANCE_FILE} lies beside the adapters" if loading.adapters else "there are no adapters"
        reason = f"{where}, so it is not known how much each method is accepted"
        return default_plan(loading, settings, reason)
    if settings and not any(True for _ in loading.options(profile, settings)):
        given = ", ".join(f"{name} {value}" for name, value in settings.items())
        return default_plan(loading, settings, f"no accepted length was measured with {given}")
    machine, measured_now = machine_profile(loading.subject(), planning.report, planning.again)
    if memory.flash_bandwidth is not None:
        machine = replace(machine, flash_bytes_per_second=min(machine.flash_bytes_per_second, memory.flash_bandwidth))
    options = list(loading.options(profile, settings))
    choice = choose(options, machine, memory.budget_bytes or 0, memory.covers, memory.ring_buffers)
    best = choice.best.option
    used = {name: place for name, (place, _) in (loading.chosen(best.point) or {}).items()}
    settled = replace(memory_for(memory, best.point.method), ring_buffers=choice.ring_buffers)
    dropped = settled.coarse != memory.coarse
    reason = choice.reason + (f"; the {memory.coarse} copy is not resident" if dropped else "")
    return LoadPlan(best.point.method, used, settled, choice, reason, measured_now, dropped)


def default_plan(loading: Loading, settings: Mapping[str, Any], reason: str) -> LoadPlan:
    """What these adapters do without a budget, with the settings that were given."""
    first = {name: candidates[0][0] for name, candidates in loading.adapters.items()}
    config_class = METHODS[best_method(first, loading.has_coarse, settings)]
    for name in settings:
        require(
            name in settings_of(config_class),
            f"{flag_of(name)} does nothing for {config_class.name}, the method of these adapters; name the method that it belongs to.",
        )
    method = config_class(**settings)
    used = {name: first[name] for name in needs_of(method).adapters}
    memory = memory_for(loading.memory, method)
    return LoadPlan(method, used, memory, None, reason, without_copy=memory.coarse != loading.memory.coarse)


def memory_for(memory: MemoryOptions, method: MethodConfig) -> MemoryOptions:
    """The options with room for what the method needs; a coarse copy is made only where something drafts with it."""
    drafts = COARSE in (*memory.views, *needs_of(method).views)
    return with_needs(memory if drafts else replace(memory, coarse=None), method)


def acceptance_beside(loading: Loading) -> AcceptanceProfile | None:
    """What the profiles in the model's directory and beside an adapter, the draft's first, say; the model's own goes before.

    A damaged profile raises `CatsError`; None where there is none.
    """
    adapters = [path.resolve().parent for candidates in loading.adapters.values() for (path, _), _ in candidates]
    places = [place / ACCEPTANCE_FILE for place in (loading.checkpoint.directory, *adapters)]
    files = [place for place in dict.fromkeys(places) if place.is_file()]
    profiles = [load_acceptance(place, method_of) for place in (files[:2] if files[:1] == places[:1] else files[:1])]
    points = {(point.method, point.exits): point for profile in reversed(profiles) for point in profile.points}
    return AcceptanceProfile(tuple(points.values()), tuple(note for profile in profiles for note in profile.notes)) if profiles else None
