"""Several methods on several benches: accepted length, what it costs, repeated 4-grams, as a result file and a Markdown table.

    python -m evaluation.acceptance_table --questions 20 --max-new-tokens 64 --dtype float32 --output evaluation/results/acceptance.json
    python -m evaluation.acceptance_table --methods cascade_chain cascade_tree:steps=3 --shallow-layer 10 --benches mtbench gsm8k ...
    python -m evaluation.acceptance_table --temperature 0.7 --methods autoregressive cascade_tree --output evaluation/results/sampled.json
    python -m evaluation.acceptance_table --merge --output evaluation/results/acceptance.json

Without --methods every preset, without --model-path the default model. A cell is one method with its adapters on one bench; its answers
lie in `<output>.cells/`, so a run that is interrupted goes on where it stopped, and two commands with other --benches, --methods or
exits may fill one table at once. Every command builds the table from the cells that are complete when it ends; --merge does only
that. All cells of a table have the same model, dtype, device and memory options, temperature and seed, and the same questions of a bench.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cats import CatsError, GenerationConfig, MemoryOptions, MethodConfig, ModelText
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat
from cats.files import write_atomically
from cats.methods import needs_of
from cats.settings import as_record
from evaluation.acceptance_report import built, exits_of
from evaluation.chosen_model import ChosenModel, base_model, chosen_model
from evaluation.eval import Asking, Contender, answered_ids, run_eval
from evaluation.options import add_model_flags, chosen_memory
from evaluation.presets import PRESET_HELP, parse_presets, runnable_presets
from evaluation.processes import Processes, choose_device, start_processes
from evaluation.questions import ALIASES, BENCHES, Question, read_questions, resolve_bench, spread_questions
from evaluation.record_file import check_settings, write_json
from evaluation.subject import Subject, load_subject, load_text, stored_bytes, subject_settings
from evaluation.timing import environment


@dataclass(frozen=True)
class Cell:
    """One method with its adapters on one bench.

    Attributes:
        adapter_bytes: weights of the adapters, as stored.
    """

    bench: str
    label: str
    method: MethodConfig
    questions: list[Question]
    folder: Path
    settings: dict[str, Any]
    adapter_bytes: int

    @property
    def answers(self) -> Path:
        """Its answer file."""
        name = ".".join(part for part in (self.bench, self.label, exits_of(self.settings).replace("/", "-")) if part)
        return self.folder / (re.sub(r"[^\w.=,-]", "+", name) + ".jsonl")

    @property
    def settings_file(self) -> Path:
        """What its answers were made with."""
        return self.answers.with_suffix(".settings.json")

    def write_settings(self, subject: Subject) -> None:
        """Say what the answers that follow are made with, unless a run that this one takes up has said it."""
        if self.answers.exists():
            return
        about = {
            "settings": self.settings,
            "shape": dataclasses.asdict(subject.shape(self.method)),
            "extra_resident_bytes": {
                "adapters": self.adapter_bytes,
                "method": needs_of(self.method).resident_bytes,
                "copy": subject.copy_bytes,
            },
            "arithmetic": subject.arithmetic,
            "caveats": subject.caveats,
            "environment": environment(),
        }
        write_json(self.settings_file, about)


def cells_folder(output: Path) -> Path:
    """Where the cells of a table lie."""
    return output.with_suffix(".cells")


def make_cells(
    args: argparse.Namespace, methods: dict[str, MethodConfig], model: ChosenModel, memory: MemoryOptions | None, text: ModelText
) -> list[Cell]:
    """Every method on every bench, checked against what lies there already; faults raise `CatsError`."""
    shared = subject_settings(args, model, memory, text) | {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:  # cells of greedy answers say nothing of it
        shared |= {"temperature": args.temperature, "seed": args.seed or 0}
    shared.get("memory", {}).pop("nodes", None)  # of the largest tree among the command's methods, which need not be the cell's
    sizes = {role: stored_bytes(path) for role, (path, _) in model.adapters.items()}
    cells = []
    for bench in dict.fromkeys(ALIASES.get(name, name) for name in args.benches):
        source = resolve_bench(bench)
        sys.stderr.write(f"{bench}: {source.description}\n")
        questions = spread_questions(read_questions(source.path), args.questions)
        asked = {"bench": bench, "source": source.note.strip(), "question_ids": [question.question_id for question in questions]}
        for label, method in methods.items():
            roles = needs_of(method).adapters
            own = {"adapters": {role: shared["adapters"][role] for role in roles}}
            settings = {**asked, "label": label, "method": as_record(method), **shared, **own}
            extra = sum(sizes[role] for role in roles)
            cell = Cell(bench, label, method, questions, cells_folder(args.output), settings, extra)
            check_settings(cell.settings_file, cell.settings, cell.answers)
            cells.append(cell)
    return cells


def fill(cell: Cell, subject: Subject, config: GenerationConfig, processes: Processes) -> None:
    """Answer what the cell has no answer to; the seed of a question is the same for every method."""
    contender = Contender(f"{cell.bench} {cell.label}", partial(_answer, subject, cell.method), cell.answers)
    on_start = partial(cell.write_settings, subject)
    run_eval([contender], cell.questions, Asking(subject.text, config, seed=config.seed, warm_up=False), processes, on_start=on_start)


def _answer(subject: Subject, method: MethodConfig, prompt_ids: list[int], config: GenerationConfig) -> Any:
    return subject.answer(prompt_ids, method, config)


def waiting_questions(cell: Cell) -> int:
    """How many questions of a cell have no answer."""
    done = answered_ids(cell.answers)
    return sum(question.question_id not in done for question in cell.questions)


def fill_all(args: argparse.Namespace) -> bool:
    """Check everything, load, fill the cells; returns whether this process is the one that builds the table."""
    methods = runnable_presets(base_model(args.model_path)[1], args.coarse) if args.methods is None else parse_presets(args.methods)
    config = GenerationConfig(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed or 0)
    model = chosen_model(list(methods.values()), args)
    text, memory = load_text(model.directory, args.template), chosen_memory(methods.values(), args.max_new_tokens, args)
    cells = make_cells(args, methods, model, memory, text)
    processes, device = start_processes(choose_device(args.device))
    shown = processes.is_main_process
    if not any(map(waiting_questions, cells)):
        return shown
    with heartbeat(f"loading {model.name}", shown):
        subject = load_subject(model.directory, model.adapters, text, args.dtype, device, memory, args.compute_dtype)
    if args.ledger and shown:
        sys.stderr.write("\n".join(subject.model.base.source.report()) + "\n")
    subject.check_prompts([question for cell in cells if cell.label == cells[0].label for question in cell.questions])
    for number, cell in enumerate(cells, start=1):
        waiting = waiting_questions(cell)
        if waiting and shown:
            sys.stderr.write(f"cell {number} of {len(cells)}: {cell.label} on {cell.bench}, {waiting} questions\n")
        if waiting:
            fill(cell, subject, config, processes)
    return shown


def build_table(output: Path) -> str:
    """Write `<output>` (JSON) and its Markdown twin from the complete cells; returns the Markdown."""
    cells, rows, text = built(cells_folder(output))
    write_json(output, {"rows": rows, "cells": cells, "environment": environment()})
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.acceptance_table", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"{PRESET_HELP} (default: every name that has what it needs here)")
    parser.add_argument("--benches", nargs="+", choices=(*ALIASES, *BENCHES), default=list(BENCHES), help="default: all")
    parser.add_argument("--questions", type=int, help="so many questions of each bench, evenly spread over it (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="from which every question's own seed is derived, with --temperature (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); cells and the .md table lie beside it")
    parser.add_argument("--merge", action="store_true", help="only build the table from the cells that are there")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cells, build the table."""
    args = parse(argv)
    if args.merge and (args.methods is not None or args.model_path is not None or args.temperature or args.seed is not None):
        given = "--methods, --model-path, --temperature and --seed"
        raise CatsError(f"--merge only reads the cells that are there, so {given} do nothing; leave them out.")
    if args.seed is not None and not args.temperature:
        raise CatsError("--seed does nothing for greedy answers; give a --temperature above 0 with it, or leave it out.")
    if args.merge or fill_all(args):
        sys.stdout.write(build_table(args.output))


if __name__ == "__main__":
    main()
