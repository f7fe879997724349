"""The quantities behind the paper's tables and figures, each measured once and kept in one result file that every table reads.

    acceptance.json   accepted length and what stands beside it, all weights in memory (acceptance_table.py)
    cycles.json       seconds and bytes of a cycle by place of the weights, methods in turns (cycles.py)
    quality.json      likelihood of answers under the exact model (quality_curve.py)
    memory.json       who holds what of a process (memory_parts.py)
    context.json      seconds to the first token, and tokens per second, over the length of the context (cycles.py)

Working files lie beside them; a run that is interrupted goes on where it stopped, and settings that differ are refused.
"""

import argparse
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cats import CatsError, GenerationConfig, MemoryOptions, ModelText
from cats.cli.progress import live_bar
from cats.errors import BudgetError
from cats.methods import PRESETS, needs_of
from cats.settings import settings_of
from cats.text import Message
from evaluation import acceptance_table, quality_curve
from evaluation.acceptance_report import PLAIN
from evaluation.chosen_model import ChosenModel, adapters_in, base_model, exit_of
from evaluation.cycles import Comparison, Entry, Place, compare, fitted, read_cells
from evaluation.eval import Asking
from evaluation.memory_parts import Request, in_child
from evaluation.options import ADAPTERS
from evaluation.presets import parse_preset
from evaluation.published import published
from evaluation.questions import Question, read_questions, resolve_bench, spread_questions
from evaluation.record_file import append_record, check_settings, read_records, write_json
from evaluation.subject import load_text, weights_fingerprint
from evaluation.timing import environment

CYCLE_BENCH = "mtbench"
PAPER_MODELS = ("vicuna-7b", "vicuna-13b", "llama2-7b", "llama2-13b")
Exits = tuple[int, int]
"""Draft exit and shallow exit, for the methods that use them."""


@dataclass(frozen=True)
class Wire:
    """A link, and how many questions are asked over it.

    Attributes:
        rate: bytes per second that are imitated; None: the disk as it is.
    """

    rate: float | None
    turns: int


@dataclass(frozen=True)
class Work:
    """How much is done.

    Attributes:
        questions, tokens: of accepted lengths, a set, and at most an answer.
        quality_questions: of MT-bench, for the likelihood of answers.
        turn_tokens: at most an answer, where cycles are timed.
        contexts: positions, prompt and answer together.
        context_turns, context_tokens: at each of them.
    """

    questions: int
    tokens: int
    quality_questions: int
    turn_tokens: int
    contexts: tuple[int, ...]
    context_turns: int
    context_tokens: int


@dataclass(frozen=True)
class Run:
    """What is measured on what, and where results go.

    Attributes:
        adapters: by exit.
        exits: the usual draft and shallow exit; None where there are no adapters.
        methods: labels of the presets of table 1 that have what they need, plain decoding first.
        budgets: bytes of weights, ascending; headlines stand at the last.
        wires: the fastest first; the tables of speed stand at the last.
    """

    args: argparse.Namespace
    work: Work
    output: Path
    name: str
    directory: Path
    adapters: Mapping[int, Path]
    exits: Exits | None
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    wires: tuple[Wire, ...]

    @cached_property
    def text(self) -> ModelText:
        """Tokenizer and template."""
        return load_text(self.directory, self.args.template)

    def can(self, label: str) -> bool:
        """Whether the adapters that the method needs are there."""
        return self.exits is not None or not needs_of(parse_preset(label)[1]).adapters

    def placed(self, labels: Sequence[str], exits: Exits | None = None) -> argparse.Namespace:
        """The flags with the places of the adapters that these methods use, and of no others."""
        needed = {role for label in labels for role in needs_of(parse_preset(label)[1]).adapters}
        given: dict[str, Any] = {"adapters": None}
        for place, role in enumerate(ADAPTERS):
            layer = (exits or self.exits or (0, 0))[place] if role in needed else None
            given |= {f"{role}_layer": layer, f"{role}_adapter_path": None if layer is None else str(self.adapters[layer])}
        return argparse.Namespace(**vars(self.args) | given)

    def entry(self, label: str, exits: Exits | None = None) -> Entry:
        """A method with its adapters."""
        _, method = parse_preset(label)
        layers = dict(zip(ADAPTERS, exits or self.exits or (0, 0), strict=True))
        adapters = {role: (self.adapters[layers[role]], layers[role]) for role in needs_of(method).adapters}
        return Entry(label, method, ChosenModel(self.name, self.directory, dict(adapters)))

    def questions(self, count: int) -> list[Question]:
        """So many questions of MT-bench, first turns only."""
        questions = spread_questions(read_questions(resolve_bench(CYCLE_BENCH).path), count)
        return [replace(question, turns=question.turns[:1]) for question in questions]

    def memory(self, entry: Entry, budget: int) -> MemoryOptions | None:
        """The options of a load under a budget of weights; None where it does not hold the method."""
        try:
            return fitted(Place(budget), entry, self.work.turn_tokens, self.args.dtype)
        except BudgetError:
            return None

    @cached_property
    def deepest(self) -> dict[int, Exits | None]:
        """By budget, the usual draft exit and the deepest shallow exit at which it holds CATS's chain."""
        first = self.exits[0] if self.exits is not None else 0
        pairs = [(first, layer) for layer in sorted(self.adapters, reverse=True) if layer > first]
        entries = {exits: self.entry("cascade_chain", exits) for exits in pairs}
        return {budget: next((exits for exits in pairs if self.memory(entries[exits], budget)), None) for budget in self.budgets}


def known_adapters(args: argparse.Namespace, brought: Mapping[str, Path]) -> tuple[dict[int, Path], Exits | None]:
    """Adapters by exit, and the usual pair of exits, as the flags say; contradictions raise `CatsError`."""
    given = {role: (getattr(args, f"{role}_adapter_path"), getattr(args, f"{role}_layer")) for role in ADAPTERS}
    paths = {role: Path(path) for role, (path, _) in given.items() if path is not None}
    if paths and (args.adapters is not None or len(paths) < len(ADAPTERS)):
        raise CatsError("give both --draft-adapter-path and --shallow-adapter-path, or --adapters FOLDER, and not both kinds.")
    if paths:
        exits = {role: given[role][1] or exit_of(path) for role, path in paths.items()}
        adapters = {exits[role]: path for role, path in paths.items()}
    else:
        folder = Path(args.adapters) if args.adapters is not None else next((path.parent for path in brought.values()), None)
        if folder is None:
            return {}, None
        adapters = {layer: places[0] for layer, places in adapters_in(folder).items()}
        usual = {role: exit_of(path) for role, path in brought.items()} if args.adapters is None else {}
        first, *others = [*adapters, None, None]
        exits = {"draft": given["draft"][1] or usual.get("draft", first), "shallow": given["shallow"][1] or usual.get("shallow", others[0])}
    for role, layer in exits.items():
        if layer not in adapters:
            raise CatsError(f"there is no {role} adapter of exit {layer}; there are those of {', '.join(map(str, adapters)) or 'no exit'}.")
    if exits["draft"] >= exits["shallow"]:
        raise CatsError(f"the draft exit {exits['draft']} is not before the shallow exit {exits['shallow']}; exchange them.")
    return dict(sorted(adapters.items())), (exits["draft"], exits["shallow"])


@contextmanager
def every_core() -> Iterator[None]:
    """All cores for the block: what it measures is no time, and its text does not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_core()
def fill_lengths(run: Run, benches: Sequence[str], labels: Sequence[str], exits: Exits | None = None) -> None:
    """Accepted lengths of methods on question sets; plain decoding beside them, to count equal answers."""
    wanted = list(dict.fromkeys([PLAIN, *labels]))
    work = {"questions": run.work.questions, "max_new_tokens": run.work.tokens, "temperature": 0.0, "seed": None}
    asked = {"methods": wanted, "benches": list(benches), "output": run.output / "acceptance.json", "merge": False}
    acceptance_table.fill_all(argparse.Namespace(**vars(run.placed(wanted, exits)) | work | asked))


def fill_cycles(run: Run, place: Place, entries: Iterable[Entry], turns: int) -> None:
    """Methods in turns at one place, plain decoding among them."""
    config = GenerationConfig(max_new_tokens=run.work.turn_tokens)
    about = {"bench": CYCLE_BENCH, "source": resolve_bench(CYCLE_BENCH).note.strip()}
    questions, asking = run.questions(turns), Asking(run.text, config, warm_up=False)
    compare(Comparison(run.args, place, list(entries), questions, asking, run.text, about, run.output / "cycles.cells"))


@every_core()
def fill_quality(run: Run, labels: Sequence[str]) -> None:
    """Likelihood of answers, greedy, sampled and by typical acceptance."""
    flags = quality_curve.parse(["--output", str(run.output / "quality.json")])
    asked = {"methods": list(labels), "questions": run.work.quality_questions, "max_new_tokens": run.work.tokens}
    own = {name: getattr(flags, name) for name in ("typical", "temperature", "prompts", "output")}
    quality_curve.make_result(quality_curve.make_curve(argparse.Namespace(**vars(run.placed(labels)) | own | asked)))


def fill_memory(run: Run, labels: Sequence[str]) -> None:
    """Every method under every budget, and with everything in memory: a process each, one record each."""
    records, kept = run.output / "memory.records.jsonl", run.output / "memory.records.settings.json"
    settings = {"weights": weights_fingerprint(run.directory), "exits": run.exits, "dtype": run.args.dtype, "threads": run.args.threads}
    check_settings(kept, settings, records)
    write_json(kept, {"settings": settings, "environment": environment()})
    done = {(record["method"], record["budget"]) for record in read_records(records)}
    wanted = [(label, budget) for budget in (*run.budgets, None) for label in labels if (label, budget) not in done]
    for label, budget in live_bar(wanted, desc="processes", unit="process", disable=not wanted):
        entry = run.entry(label)
        adapters = {role: [str(path.resolve()), layer] for role, (path, layer) in entry.model.adapters.items()}
        memory = None if budget is None else run.memory(entry, budget)
        request = Request(
            *(str(run.directory.resolve()), label, budget),
            adapters=adapters,
            dtype=run.args.dtype,
            threads=run.args.threads,
            ring=None if memory is None else memory.ring_buffers,
        )
        fits = budget is None or memory is not None
        parts = in_child(request) if fits else {"refused": f"{label} does not fit {budget} bytes of weights"}
        append_record(records, {"method": label, "budget": budget, **parts})


@dataclass(frozen=True)
class LongPrompt:
    """A dialogue whose prompt is so many tokens of text, whatever is asked."""

    text: ModelText
    tokens: int

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The beginning of the message, repeated, with the template around it."""
        ids = self.text.prompt_ids(" ".join(str(message["content"]) for message in messages))
        tail = ids[-min(16, self.tokens // 2) :]
        repeated = ids * (self.tokens // len(ids) + 1)
        return [*repeated[: self.tokens - len(tail)], *tail]

    def answer(self, ids: Sequence[int]) -> str:
        """Answer ids as text."""
        return self.text.answer(ids)


def fill_context(run: Run, labels: Sequence[str]) -> None:
    """Plain decoding and other methods in turns behind long prompts, all in memory and under the largest budget on the first wire."""
    work = run.work
    config = GenerationConfig(max_new_tokens=work.context_tokens, eos_token_ids=())
    for context in work.contexts:
        asking = Asking(LongPrompt(run.text, context - work.context_tokens), config, warm_up=False)
        for place in (Place(), Place(run.budgets[-1], run.wires[0].rate)):
            about, folder = {"context": context}, run.output / "context.cells" / str(context)
            entries = [run.entry(label) for label in labels]
            compare(Comparison(run.args, place, entries, run.questions(work.context_turns), asking, run.text, about, folder))


def variant(name: str, **changes: object) -> str:
    """The label of a preset with some settings changed; those that it has anyway are not named."""
    config = PRESETS[name]
    new = {key: value for key, value in changes.items() if getattr(config, key) != value}
    assert new.keys() <= settings_of(type(config)).keys()
    return name + (":" + ",".join(f"{key}={value}" for key, value in new.items()) if new else "")


@dataclass(frozen=True)
class Results:
    """What the result files of a run hold; empty where nothing was measured."""

    run: Run
    rows: Sequence[dict[str, Any]]
    cells: Sequence[dict[str, Any]]
    quality: Mapping[str, Any] | None
    memory: Sequence[dict[str, Any]]
    context: Sequence[dict[str, Any]]

    @cached_property
    def paper(self) -> dict[str, Any]:
        """What others have published."""
        return published()

    @property
    def paper_model(self) -> str:
        """Which of the paper's models this one stands beside: the one of its name, else Vicuna-7B."""
        own = re.sub(r"[^a-z0-9]", "", self.run.name.lower())
        return next((model for model in PAPER_MODELS if model.replace("-", "") in own), PAPER_MODELS[0])

    def row(self, label: str, exits: Exits | None = None) -> dict[str, Any] | None:
        """The accepted lengths of a method with its adapters."""
        wanted = self._exits(label, exits)
        return next((row for row in self.rows if (row["method"], row["exits"]) == (label, wanted)), None)

    def cell(self, place: Place, label: str, exits: Exits | None = None) -> dict[str, Any] | None:
        """The cell of a method at a place."""
        where, wanted = asdict(place), self._exits(label, exits)
        for cell in self.cells:
            settings = cell["settings"]
            own = "/".join(str(settings["adapters"][role]["exit_layer"]) for role in ADAPTERS if role in settings["adapters"])
            if (settings["place"], settings["label"], own) == (where, label, wanted):
                return cell
        return None

    def _exits(self, label: str, exits: Exits | None) -> str:
        layers = dict(zip(ADAPTERS, exits or self.run.exits or (0, 0), strict=True))
        return "/".join(str(layers[role]) for role in ADAPTERS if role in needs_of(parse_preset(label)[1]).adapters)


def read_results(run: Run) -> Results:
    """Build the result files from the cells that are complete, and read them."""
    output, rows = run.output, list[dict[str, Any]]()
    if acceptance_table.cells_folder(output / "acceptance.json").is_dir():
        acceptance_table.build_table(output / "acceptance.json")
        rows = json.loads((output / "acceptance.json").read_text(encoding="utf-8"))["rows"]
    cells, memory = read_cells(output / "cycles.cells"), read_records(output / "memory.records.jsonl")
    context = [cell for folder in sorted(output.glob("context.cells/*")) for cell in read_cells(folder)]
    for name, content in (("cycles", cells), ("memory", memory), ("context", context)):
        if content:
            write_json(output / f"{name}.json", {"cells": content, "environment": environment()})
    quality = output / "quality.json"
    about = json.loads(quality.read_text(encoding="utf-8")) if quality.exists() else None
    return Results(run, rows, cells, about, memory, context)


def chosen_base(args: argparse.Namespace) -> tuple[str, Path, Mapping[int, Path], Exits | None]:
    """Name and directory of the model, its adapters by exit and the usual pair of exits."""
    name, directory, brought = base_model(args.model_path)
    return (name, directory, *known_adapters(args, brought))
