"""Several methods on several benches: accepted length, repeated 4-grams, layer passes and tokens/s, as a result file and a Markdown table.

    python -m evaluation.acceptance_table --model-path M --draft-adapter-path D --shallow-adapter-path S \
        --methods kangaroo eagle_self_tree cascade_chain cascade_tree cascade_chain:sv_passes=2 \
        --benches mtbench gsm8k --questions 80 --max-new-tokens 256 --output evaluation/results/acceptance.json
    python -m evaluation.acceptance_table --merge --output evaluation/results/acceptance.json

A cell is one method on one bench; its answers lie in `<output>.cells/`, so a run that is interrupted goes on where it
stopped, and two commands with different --benches or --methods may fill one table at once. Every command builds the table
from the cells that are complete when it ends; --merge does only that. All cells of a table have the same model, dtype, device and
memory options. Greedy only.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cats import CatsError, GenerationConfig, MemoryOptions, MethodConfig, ModelText, build_method
from cats.cli.command import CommandParser, exit_with_sentence
from cats.files import write_atomically
from cats.records import check_agreement
from cats.settings import as_record
from evaluation.eval import Asking, Contender, run_eval
from evaluation.metrics import ModelShape, identical_answers, mean, summarise
from evaluation.options import Adapters, adapters_for, add_model_flags, chosen_memory
from evaluation.presets import PRESET_HELP, PRESETS, parse_presets
from evaluation.processes import Processes, choose_device, start_processes
from evaluation.questions import ALIASES, BENCHES, Question, read_questions, resolve_bench, select_questions
from evaluation.record_file import Record, check_settings, read_records, write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment

PLAIN = "autoregressive"
SHARED = ("model", "dtype", "compute_dtype", "device", "template", "max_new_tokens", "memory")
"""Settings that all cells of a table have in common."""


@dataclass(frozen=True)
class Cell:
    """One method on one bench."""

    bench: str
    label: str
    method: MethodConfig
    questions: list[Question]
    folder: Path
    settings: dict[str, Any]

    @property
    def answers(self) -> Path:
        """Its answer file."""
        return self.folder / (re.sub(r"[^\w.=,-]", "+", f"{self.bench}.{self.label}") + ".jsonl")

    @property
    def settings_file(self) -> Path:
        """What its answers were made with."""
        return self.answers.with_suffix(".settings.json")

    def write_settings(self, shape: ModelShape, caveats: Sequence[str]) -> None:
        """Say what the answers that follow are made with, unless a run that this one takes up has said it."""
        if not self.answers.exists():
            about = {"settings": self.settings, "shape": dataclasses.asdict(shape), "caveats": caveats, "environment": environment()}
            write_json(self.settings_file, about)


def cells_folder(output: Path) -> Path:
    """Where the cells of a table lie."""
    return output.with_suffix(".cells")


def make_cells(
    args: argparse.Namespace, methods: dict[str, MethodConfig], adapters: Adapters, memory: MemoryOptions | None, text: ModelText
) -> list[Cell]:
    """Every method on every bench, checked against what lies there already; faults raise `CatsError`."""
    model = subject_settings(args, adapters, memory, text) | {"max_new_tokens": args.max_new_tokens}
    model.get("memory", {}).pop("nodes", None)  # of the largest tree among the command's methods, which need not be the cell's
    cells = []
    for bench in dict.fromkeys(ALIASES.get(name, name) for name in args.benches):
        source = resolve_bench(bench)
        questions = select_questions(read_questions(source.path)[:: args.every], 0, args.questions)
        asked = {"bench": bench, "source": source.note.strip(), "question_ids": [question.question_id for question in questions]}
        for label, method in methods.items():
            own = {"adapters": {name: model["adapters"][name] for name in build_method(method).adapters}}
            settings = {**asked, "label": label, "method": as_record(method), **model, **own}
            cell = Cell(bench, label, method, questions, cells_folder(args.output), settings)
            check_settings(cell.settings_file, cell.settings, cell.answers)
            cells.append(cell)
    return cells


def fill(cell: Cell, subject: Subject, config: GenerationConfig, processes: Processes) -> None:
    """Answer what the cell has no answer to."""
    contender = Contender(f"{cell.bench} {cell.label}", partial(_answer, subject, cell.method), cell.answers)
    run_eval(
        [contender],
        cell.questions,
        Asking(subject.text, config),
        processes,
        on_start=lambda: cell.write_settings(subject.shape(cell.method), subject.caveats),
    )


def _answer(subject: Subject, method: MethodConfig, prompt_ids: list[int], config: GenerationConfig) -> Any:
    return subject.answer(prompt_ids, method, config)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Every complete cell of a folder: its settings, environment and summary; identical_to_plain where plain decoding was a method."""
    found: dict[tuple[str, str], tuple[dict[str, Any], list[Record]]] = {}
    for path in sorted(folder.glob("*.settings.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        records = read_records(path.with_name(path.name.removesuffix(".settings.json") + ".jsonl"))
        if {record["question_id"] for record in records} == set(about["settings"]["question_ids"]):
            found[about["settings"]["bench"], about["settings"]["label"]] = (about, records)
    cells = []
    for (bench, _), (about, records) in sorted(found.items(), key=lambda item: cell_order(*item[0])):
        summary = summarise(records, ModelShape(**about["shape"]))
        summary["committed_counts"] = dict(sorted(Counter(summary.pop("committed_per_step")).items()))
        if (bench, PLAIN) in found:
            summary["identical_to_plain"] = identical_answers(records, found[bench, PLAIN][1])
        cells.append({**about, "summary": summary})
    return cells


def cell_order(bench: str, label: str) -> tuple[int, int, str]:
    """Benches and methods in their usual order."""
    return BENCHES.index(bench), list(PRESETS).index(label.partition(":")[0]), label


def table(cells: Sequence[dict[str, Any]]) -> str:
    """One row per method, Markdown: accepted length by bench and its mean, then the other figures as means over benches."""
    place = {(cell["settings"]["bench"], cell["settings"]["label"]): cell["summary"] for cell in cells}
    benches = [bench for bench in BENCHES if any(bench == known for known, _ in place)]
    labels = list(dict.fromkeys(cell["settings"]["label"] for cell in cells))
    head = ["method", *benches, "mean", "repeated 4-grams", "layer passes/token", "by the formula", "tokens/s", "identical to plain"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label in labels:
        own = {bench: place[bench, label] for bench in benches if (bench, label) in place}
        lengths = [own[bench]["accepted_length"] if bench in own else None for bench in benches]
        row = [label, *map(_figure, lengths), _figure(_mean_of(lengths))]
        for name, form in (
            ("repeated_4gram_share", "{:.1%}"),
            ("layer_passes_per_token", "{:.2f}"),
            ("layer_passes_per_token_formula", "{:.2f}"),
        ):
            row.append(_figure(_mean_of([summary[name] for summary in own.values()]), form))
        row += [_figure(_mean_of([summary["tokens_per_second"] for summary in own.values()]), "{:.1f}"), _identical(list(own.values()))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)


def _mean_of(values: Sequence[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def _identical(summaries: Sequence[dict[str, Any]]) -> str:
    known = [summary for summary in summaries if "identical_to_plain" in summary]
    if not known:
        return "-"
    return f"{sum(summary['identical_to_plain'] for summary in known)} of {sum(summary['questions'] for summary in known)}"


def build_table(output: Path) -> str:
    """Write `<output>` (JSON) and its Markdown twin from the complete cells; returns the table."""
    cells = read_cells(cells_folder(output))
    if not cells:
        raise CatsError(f"{cells_folder(output)} holds no complete cell; run the command without --merge first.")
    check_alike(cells, output)
    rows = table(cells)
    model, about = cells[0]["settings"]["model"]["name"], cells[0]["environment"]
    text = (
        f"# Accepted length of {model}\n\nTokens per target pass, the target's own next token included, prefill excluded; greedy, at most "
        f"{cells[0]['settings']['max_new_tokens']} tokens an answer; {cells[0]['settings']['dtype']} on {about['cpu']}, "
        f"{about['threads']} thread(s). Cells ran one after the other, so tokens/s are no paired comparison.\n\n{rows}"
    )
    write_json(output, {"cells": cells, "environment": environment()})
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    return rows


def check_alike(cells: Sequence[dict[str, Any]], output: Path) -> None:
    """Raise `CatsError` where cells that would stand in one table were answered by other weights, or under other options."""
    shared: dict[str, Any] = {}
    for cell in cells:
        settings = cell["settings"]
        own = {name: settings.get(name) for name in SHARED} | {f"{name} adapter": found for name, found in settings["adapters"].items()}
        known = {name: shared.setdefault(name, value) for name, value in own.items()}
        place = f"the cell of {settings['label']} on {settings['bench']}"
        advice = f"{place} does not fit in; remove it from {cells_folder(output)} or choose another --output."
        check_agreement("the table", known, own, advice)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.acceptance_table", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser, model_path_required=False)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=PRESET_HELP)
    parser.add_argument("--benches", nargs="+", choices=(*ALIASES, *BENCHES), default=list(BENCHES), help="default: all")
    parser.add_argument("--questions", type=int, help="first so many questions of each bench (default: all)")
    parser.add_argument(
        "--every",
        type=int,
        metavar="K",
        default=1,
        help="take every K-th question, then the first --questions of these; 6 spreads 80 over spec (default: 1)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); cells and the .md table lie beside it")
    parser.add_argument("--merge", action="store_true", help="only build the table from the cells that are there")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cells, build the table."""
    args = parse(argv)
    if not args.merge:
        if args.model_path is None or args.methods is None:
            raise CatsError("give --model-path and --methods to fill cells, or --merge to build the table from those that are there.")
        if args.every < 1:
            raise CatsError(f"--every is {args.every}; it must be at least 1.")
        methods = parse_presets(args.methods)
        config = GenerationConfig(max_new_tokens=args.max_new_tokens)
        text = load_text(args.model_path, args.template)
        adapters, memory = adapters_for(list(methods.values()), args), chosen_memory(methods.values(), args.max_new_tokens, args)
        cells = make_cells(args, methods, adapters, memory, text)
        processes, device = start_processes(choose_device(args.device))
        subject = load_subject(args.model_path, adapters, text, args.dtype, device, memory, args.compute_dtype)
        if args.ledger and processes.is_main_process:
            sys.stderr.write("\n".join(subject.model.base.source.report()) + "\n")
        subject.check_prompts([question for cell in cells for question in cell.questions])
        for cell in cells:
            fill(cell, subject, config, processes)
        if not processes.is_main_process:
            return
    sys.stdout.write(build_table(args.output))


if __name__ == "__main__":
    main()
