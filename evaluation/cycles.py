"""Seconds and bytes of a cycle: methods in turns on the same questions, at one place of the weights; cells, their figures.

A place is a budget of weights and a link, or all of them in memory. Every method has a model of its own there, under the best plan for it.
A cell is one method with its adapters at one place: its answers as eval.py writes them, and its settings beside them. A run that is
interrupted goes on with the next answer. Greedy answers that differ from plain decoding's are an error, and so are streamed bytes that
are not those of the memory plan.
"""

import argparse
import dataclasses
import gc
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cats import CatsError, Generation, GenerationConfig, MemoryOptions, MethodConfig
from cats.adapter import AdapterModel
from cats.checkpoint import weight_files
from cats.cli.memory_flags import PROMPT_POSITIONS
from cats.cli.progress import heartbeat
from cats.errors import BudgetError
from cats.loading import EMBEDDING, HEAD, checkpoint_of, demand_of, sizes_of_checkpoint
from cats.methods import needs_of, with_needs
from cats.planning.plan import amount, plan_memory
from cats.runtime.direct_file import window, window_bytes
from cats.runtime.link import measure_read_rate, rate_text
from cats.runtime.store import Store
from cats.settings import as_record
from cats.text import ModelText
from evaluation.acceptance_report import PLAIN
from evaluation.chosen_model import ChosenModel
from evaluation.eval import Asking, Contender, missing_answers, run_eval
from evaluation.metrics import (
    ModelShape,
    answered,
    cycles_and_seconds,
    identical_answers,
    ratio,
    ratio_interval,
    steps_of_turns,
    summarise,
    tokens_and_seconds,
)
from evaluation.options import ADAPTERS
from evaluation.processes import choose_device
from evaluation.questions import Question
from evaluation.record_file import Record, check_settings, read_records, write_json
from evaluation.subject import Subject, load_subject, said_exit, stored_bytes, subject_settings
from evaluation.timing import environment

TOLERANCE = 0.02
WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 4
SETTINGS = ".settings.json"
SMALLEST_RING = 2
"""In largest matrices: one that is read while one is used."""


@dataclass(frozen=True)
class Place:
    """Where the weights are.

    Attributes:
        budget_bytes: of weights in memory; None: all of them.
        flash_bandwidth: bytes per second of the link that is imitated; None: the disk as it is.
        pinning, ring_buffers: see `MemoryOptions`.
    """

    budget_bytes: int | None = None
    flash_bandwidth: float | None = None
    pinning: bool = True
    ring_buffers: int = 3

    @property
    def wire(self) -> str:
        """The link, in words."""
        if self.budget_bytes is None:
            return "in memory"
        return "this disk" if self.flash_bandwidth is None else f"emulated {rate_text(self.flash_bandwidth)}"

    @property
    def label(self) -> str:
        """In words."""
        if self.budget_bytes is None:
            return self.wire
        ring = "" if self.ring_buffers == Place.ring_buffers else f", ring of {self.ring_buffers}"
        return f"{amount(self.budget_bytes)}, {self.wire}{ring}" + ("" if self.pinning else ", not pinned")

    def memory(self, method: MethodConfig, positions: int) -> MemoryOptions | None:
        """The options of a load for this method; None where everything is in memory."""
        if self.budget_bytes is None:
            return None
        options = MemoryOptions(
            self.budget_bytes,
            "weights",
            flash_bandwidth=self.flash_bandwidth,
            pinning=self.pinning,
            ring_buffers=self.ring_buffers,
            positions=positions,
        )
        return with_needs(options, method)


@dataclass(frozen=True)
class Entry:
    """A method with its adapters.

    Attributes:
        label: of its preset.
        model: with the adapters that it needs and no others.
    """

    label: str
    method: MethodConfig
    model: ChosenModel

    @property
    def name(self) -> str:
        """Label and exits: one of its kind in a comparison."""
        exits = [said_exit(*self.model.adapters[role]) for role in ADAPTERS if role in self.model.adapters]
        return ".".join((self.label, "-".join(map(str, exits)))) if exits else self.label


@dataclass(frozen=True)
class Comparison:
    """Methods in turns at one place, plain decoding among them; dtype, device and template are those of `args`.

    Attributes:
        about: what the questions are, for the settings.
    """

    args: argparse.Namespace
    place: Place
    entries: Sequence[Entry]
    questions: Sequence[Question]
    asking: Asking
    text: ModelText
    about: dict[str, Any]
    folder: Path

    @property
    def positions(self) -> int:
        """Prompt and answer together."""
        return PROMPT_POSITIONS + self.asking.config.max_new_tokens

    def cell(self, entry: Entry) -> Path:
        """The answers of a method."""
        return self.folder / (re.sub(r"[^\w.=,-]+", "_", f"{self.place.label}.{entry.name}") + ".jsonl")

    def settings(self, entry: Entry) -> dict[str, Any]:
        """What decides the figures of a cell."""
        shared = subject_settings(self.args, entry.model, None, self.text)
        own = {"label": entry.label, "method": as_record(entry.method), "place": dataclasses.asdict(self.place)}
        ids = [question.question_id for question in self.questions]
        config = self.asking.config
        decided = {"question_ids": ids, "max_new_tokens": config.max_new_tokens, "threads": torch.get_num_threads()}
        return {**own, **shared, **self.about, **decided}


class Stand:
    """A method's model, loaded when it is first asked."""

    def __init__(self, comparison: Comparison, entry: Entry, memory: MemoryOptions | None, kept: bool):
        self.comparison, self.entry, self.memory, self.kept = comparison, entry, memory, kept
        self.subject: Subject | None = None

    def answer(self, prompt_ids: list[int], config: GenerationConfig) -> Generation:
        """One answer; where it was streamed, its bytes are compared with the plan's."""
        subject = self.subject or self.load(prompt_ids, config)
        answer = subject.answer(prompt_ids, self.entry.method, config)
        check_bytes(self.entry.name, answer, subject.model.base.source)
        if not self.kept:
            self.close()
            gc.collect()
        return answer

    def load(self, prompt_ids: list[int], config: GenerationConfig) -> Subject:
        """Load, pay first-call costs, note what the answers are made with."""
        to, model, method = self.comparison, self.entry.model, self.entry.method
        named = (to.args.dtype, choose_device(to.args.device), self.memory, to.args.compute_dtype)
        with heartbeat(f"loading {model.name} for {self.entry.name}"):
            subject = self.subject = load_subject(model.directory, model.adapters, to.text, *named)
            subject.answer(prompt_ids[:WARM_UP_PROMPT], method, replace(config, max_new_tokens=WARM_UP_TOKENS))
        plan, cell = subject.model.base.source.plan, to.cell(self.entry)
        about = {
            "settings": to.settings(self.entry),
            "shape": dataclasses.asdict(subject.shape(method)),
            "plan": {"charged": plan.charged, "streamed": plan.streamed_bytes, "ring": plan.ring_bytes},
            "bandwidth": None if to.place.budget_bytes is None else bandwidth_of(to.place, model.directory),
            "arithmetic": subject.arithmetic,
            "environment": environment(),
        }
        if not cell.exists():
            write_json(cell.with_suffix(SETTINGS), about)
        return subject

    def close(self) -> None:
        """Let the model go, if there is one."""
        if self.subject is not None:
            self.subject.model.close()
        self.subject = None


def bandwidth_of(place: Place, directory: Path) -> float:
    """Bytes per second of the link: as imitated, or of a direct sequential read."""
    return place.flash_bandwidth or measure_read_rate(weight_files(directory)[0])


def streams(place: ChosenModel, method: MethodConfig, memory: MemoryOptions, dtype: str) -> bool:
    """Whether the budget leaves anything of the layers to be streamed; raises `BudgetError` where it does not hold the method."""
    memory, checkpoint = with_needs(memory, method), checkpoint_of(place.directory, (dtype, "auto"), torch.device("cpu"))
    adapters = [
        AdapterModel.from_pretrained(path, exit_layer, dtype, "meta", sparing=True)
        for path, exit_layer in (place.adapters[name] for name in needs_of(method).adapters)
    ]
    demand = demand_of(memory, checkpoint, adapters, interpreter=0, table=False)
    return bool(plan_memory(sizes_of_checkpoint(checkpoint, adapters), demand, memory.budget_bytes, memory.covers).streamed)


def compare(comparison: Comparison) -> None:
    """Answer what has no answer yet; a method that does not fit leaves its refusal, settings that differ raise `CatsError`."""
    comparison.folder.mkdir(parents=True, exist_ok=True)
    for entry in comparison.entries:
        cell = comparison.cell(entry)
        check_settings(cell.with_suffix(SETTINGS), comparison.settings(entry), cell)
    stands = stands_of(comparison)
    contenders = [Contender(stand.entry.name, stand.answer, comparison.cell(stand.entry)) for stand in stands]
    if missing_answers(contenders, comparison.questions):
        sys.stderr.write(f"{comparison.place.label}: {', '.join(stand.entry.name for stand in stands)}\n")
        try:
            run_eval(contenders, comparison.questions, comparison.asking)
        finally:
            for stand in stands:
                stand.close()
    check_identity(comparison, stands)


def stands_of(comparison: Comparison) -> list[Stand]:
    """Those that fit; models of all of them stay loaded where the machine's memory has room for twice as much."""
    place, fitting = comparison.place, list[tuple[Entry, MemoryOptions | None]]()
    for entry in comparison.entries:
        try:
            fitting.append((entry, fitted(place, entry, comparison.positions, comparison.args.dtype)))
        except BudgetError as error:
            refused = {"settings": comparison.settings(entry), "refused": str(error)}
            write_json(comparison.cell(entry).with_suffix(SETTINGS), refused)
    each = place.budget_bytes or max((stored_bytes(entry.model.directory) for entry, _ in fitting), default=0)
    kept = 2 * each * len(fitting) < psutil.virtual_memory().available
    return [Stand(comparison, entry, memory, kept) for entry, memory in fitting]


def fitted(place: Place, entry: Entry, positions: int, dtype: str) -> MemoryOptions | None:
    """The options of a load, None where everything is in memory; raises `BudgetError` where the method does not fit.

    A ring that leaves no room for the method is made smaller, and a link over which nothing passes is not imitated.
    """
    memory = place.memory(entry.method, positions)
    if memory is None:
        check_room(entry.model)
        return None
    try:
        streamed = streams(entry.model, entry.method, replace(memory, flash_bandwidth=None), dtype)
    except BudgetError:
        if place.ring_buffers <= SMALLEST_RING:
            raise
        return fitted(replace(place, ring_buffers=SMALLEST_RING), entry, positions, dtype)
    return memory if streamed else replace(memory, flash_bandwidth=None)


def check_room(model: ChosenModel) -> None:
    """Raise `BudgetError` where the machine's memory does not hold all weights."""
    needed, available = stored_bytes(model.directory), psutil.virtual_memory().available
    if needed > available:
        raise BudgetError(f"the weights take {amount(needed)} and {amount(available)} of memory are free; run it on a larger machine.")


def check_identity(comparison: Comparison, stands: Sequence[Stand]) -> None:
    """Raise `CatsError` where an answer is not plain decoding's."""
    answers = {stand.entry.name: read_records(comparison.cell(stand.entry)) for stand in stands}
    for name, records in answers.items():
        if identical_answers(records, answers[PLAIN]) < len(records):
            raise CatsError(f"{name} differs from plain decoding, {comparison.place.label}; run evaluation.correctness to see where.")


def check_bytes(label: str, answer: Generation, source: Store) -> None:
    """Raise `CatsError` where the bytes that an answer's passes streamed are not those of the plan."""
    cycles = [trace for trace in answer.traces if not trace.prefill]
    if source.streamer is None or not cycles:
        return
    counted = sum(trace.bytes_streamed for trace in cycles) / len(cycles)
    planned = planned_bytes(source, sum(trace.nodes for trace in cycles) / len(cycles))
    if abs(counted - planned) > TOLERANCE * planned:
        raise CatsError(
            f"{label} streamed {counted:.0f} bytes a pass and {planned:.0f} follow from the plan, more than {TOLERANCE:.0%} apart; "
            "the stream reads what it should not, or the count is wrong."
        )


def planned_bytes(source: Store, nodes: float) -> float:
    """Bytes that one pass takes from flash: the windows of what is streamed, and one row of the embedding table per node."""
    streamed = sum(window_bytes(source.places[source.names[piece]]) for piece in source.plan.streamed)
    table = source.places[EMBEDDING]
    if table == source.places[HEAD]:
        return streamed
    rows, width = table.shape[0], table.nbytes // table.shape[0]
    return streamed + nodes * sum(window(table.offset + row * width, width)[1] for row in range(rows)) / rows


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Every cell that is refused or complete, in the order of their files: settings, and the refusal or figures."""
    cells, answers = [], dict[Path, list[Record]]()
    for path in sorted(folder.glob(f"*{SETTINGS}")):
        about = json.loads(path.read_text(encoding="utf-8"))
        records = read_records(path.with_name(path.name.removesuffix(SETTINGS) + ".jsonl"))
        if "refused" in about:
            cells.append(about)
        elif {record["question_id"] for record in records} == set(about["settings"]["question_ids"]):
            answers[path] = records
            cells.append(about | {"path": path})
    plains = {key_of(cell): answers[cell["path"]] for cell in cells if "path" in cell and cell["settings"]["label"] == PLAIN}
    return [
        cell if "path" not in cell else without_path(cell) | {"figures": figures_of(answers[cell["path"]], plains.get(key_of(cell)), cell)}
        for cell in cells
    ]


def without_path(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell as a result file holds it."""
    return {name: value for name, value in cell.items() if name != "path"}


def key_of(cell: dict[str, Any]) -> str:
    """What cells that can be compared have in common."""
    return json.dumps([cell["settings"][name] for name in ("place", "question_ids", "max_new_tokens")])


def figures_of(records: Sequence[Record], plain: Sequence[Record] | None, cell: dict[str, Any]) -> dict[str, Any]:
    """The figures of a cell: of cycles, prompts left out; intervals are of 90 %, by bootstrap over the questions.

    The speed-up's interval draws the same questions for both methods, whose tokens are the same.
    """
    summary = summarise(records, ModelShape(**cell["shape"]))
    seconds, cycles = summary["seconds"], summary["steps"]
    tokens = sum(summary["committed_per_step"])
    own = [spent for _, spent in tokens_and_seconds(records)]
    base = None if plain is None else [spent for _, spent in tokens_and_seconds(plain)]
    return {
        "turns": len(answered(records)),
        "tokens": tokens,
        "cycles": cycles,
        "accepted_length": summary["accepted_length"],
        "nodes_per_cycle": summary["nodes_per_step"],
        "tokens_per_second": ratio(tokens, seconds.get("total", 0)),
        "tokens_per_second_interval": ratio_interval([tokens_and_seconds(records)]),
        "speed_up": None if base is None else ratio(sum(base), sum(own)),
        "speed_up_interval": None if base is None else ratio_interval([list(zip(base, own, strict=True))]),
        "cycle_seconds": ratio(seconds.get("total", 0), cycles),
        "cycle_seconds_interval": ratio_interval([[(spent, count) for count, spent in cycles_and_seconds(records)]]),
        "stage_seconds_per_cycle": {stage: ratio(spent, cycles) for stage, spent in seconds.items()},
        "streamed_bytes_per_cycle": None
        if summary["bytes_streamed_per_token"] is None
        else summary["bytes_streamed_per_token"] * tokens / max(cycles, 1),
        "prefill_seconds": [steps["prefill_seconds"] for steps in steps_of_turns(records)],
        "prefill_seconds_median": statistics.median(steps["prefill_seconds"] for steps in steps_of_turns(records)),
    }
