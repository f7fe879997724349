"""Entry point of the evaluation: answers a benchmark by one method and writes answers and metrics, as the paper's README shows.

    PYTHONPATH="$PWD" python3 evaluation/CATS_dynamic.py --model-path M --draft-adapter-path D --shallow-adapter-path S \
        --model-id cats_chain_mtbench --bench-name mt_bench ...
    accelerate launch --multi_gpu --num_processes 2 -m evaluation.CATS_dynamic ...   (questions shared; with --device cpu too)

Writes `<output-dir>/<run>.jsonl` (answers), `<run>.settings.json` (what they were made with), with --baseline
`<run>.baseline.jsonl` (plain decoding of the same questions, in turns), and `verification_metrics.json` over all runs;
with --trace-file a line per cycle beside them.
Turns flags into fields and fields into files; decoding is in cats/, the loop over questions in eval.py.
"""

# ruff: noqa: N999 (the file name is the paper's)

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

if __package__ in (None, ""):  # run as a file, as in the paper's README
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cats import (
    METHODS,
    AutoregressiveConfig,
    CatsError,
    Generation,
    GenerationConfig,
    MemoryOptions,
    MethodConfig,
    MultiAdapterCATSModel,
    build_method,
    generate,
)
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.method_flags import add_method_flags, chosen_method
from cats.cli.progress import heartbeat
from cats.records import sha256
from cats.settings import as_record
from cats.text import ModelText
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.eval import Asking, Contender, Forward, run_eval
from evaluation.live_view import LiveView, check_trace_place
from evaluation.metrics import compare, summarise
from evaluation.options import add_generation_flags, add_model_flags, chosen_memory, generation_config
from evaluation.processes import Processes, choose_device, start_processes
from evaluation.questions import Question, QuestionFile, read_questions, resolve_bench, select_questions
from evaluation.record_file import check_settings, read_records, write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment

__all__ = ["MultiAdapterCATSModel", "cats_forward_hybrid_evaluation", "main"]

RESERVED_BENCH_NAMES = ("tiny", "test_benches")  # folders of data/ that hold something else


def cats_forward_hybrid_evaluation(
    model: MultiAdapterCATSModel, prompt_ids: Sequence[int], method: MethodConfig, config: GenerationConfig
) -> Generation:
    """The decoding loop of one question, under its upstream name: `cats.generate` with a method built for this answer."""
    return generate(model, prompt_ids, build_method(method, model), config)


@dataclass(frozen=True)
class Plan:
    """A run that was checked as far as it can be without the model's weights."""

    args: argparse.Namespace
    method: MethodConfig
    model: ChosenModel
    config: GenerationConfig
    memory: MemoryOptions | None
    questions: list[Question]
    source: QuestionFile
    output: Path
    text: ModelText
    settings: dict[str, Any]

    def answers(self, run: int) -> Path:
        """Answer file of a run."""
        return self.output / f"{run}.jsonl"

    def baseline(self, run: int) -> Path:
        """Answer file of the plain decoding beside a run."""
        return self.output / f"{run}.baseline.jsonl"

    def settings_file(self, run: int) -> Path:
        """What the answers of a run were made with."""
        return self.output / f"{run}.settings.json"

    def settings_of(self, run: int) -> dict[str, Any]:
        """Settings of one run."""
        return {**self.settings, "run": run}

    def write_settings(self, run: int) -> None:
        """Say what the answers that follow are made with, unless a run that this one takes up has said it."""
        if not self.answers(run).exists():
            write_json(self.settings_file(run), {"settings": self.settings_of(run), "environment": environment()})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; unknown flags end with exit status 2."""
    parser = CommandParser(prog="CATS_dynamic.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--method", choices=tuple(METHODS), default="cascade", help="default: %(default)s")
    add_model_flags(parser)
    add_method_flags(parser)
    add_generation_flags(parser)
    group = parser.add_argument_group("questions and answers")
    group.add_argument("--model-id", required=True, help="name of this configuration, and of its folder of answers")
    group.add_argument("--bench-name", default="mt_bench", help="mt_bench, alpacaeval, gsm8k, humaneval or spec (default: %(default)s)")
    group.add_argument("--question-file", help="any file of questions; --bench-name then only names the output folder")
    group.add_argument("--question-begin", type=int, help="position of the first question (default: 0)")
    group.add_argument("--question-end", type=int, help="position behind the last question (default: all)")
    group.add_argument("--num-runs", type=int, default=1, help="times that every question is answered (default: %(default)s)")
    group.add_argument("--output-dir", help="default: data/<bench-name>/<model-id>")
    group.add_argument(
        "--baseline", action="store_true", help="answer the same questions by plain decoding too, in turns; report the speed-up"
    )
    group.add_argument("--keep-going", action="store_true", help="record a failing question as failed instead of stopping")
    group = parser.add_argument_group("live view")
    group.add_argument("--live", action="store_true", help="show every cycle as a row: seconds by stage, megabytes read, tokens")
    group.add_argument(
        "--trace-file", type=Path, metavar="FILE.jsonl", help="add a line per cycle; `python -m evaluation.live_view` shows and draws them"
    )
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check everything that needs no weights; the first fault raises `CatsError`, and nothing has been written."""
    method = chosen_method(args.method, args)
    model = chosen_model([method], args)
    config = generation_config(args)
    memory = chosen_memory([method], config.max_new_tokens, args)
    if args.num_runs < 1:
        raise CatsError(f"--num-runs is {args.num_runs}; it must be at least 1.")
    if args.baseline and isinstance(method, AutoregressiveConfig):
        raise CatsError("--baseline compares with plain decoding, and --method autoregressive is plain decoding; leave one of them out.")
    output = output_directory(args)
    if args.trace_file is not None:
        check_trace_place(args.trace_file)
    source = QuestionFile(Path(args.question_file)) if args.question_file else resolve_bench(args.bench_name)
    questions = select_questions(read_questions(source.path), args.question_begin, args.question_end)
    text = load_text(model.directory, args.template)
    settings = subject_settings(args, model, memory, text) | run_settings(args, method, config, source.path)
    plan = Plan(args, method, model, config, memory, questions, source, output, text, settings)
    for run in range(args.num_runs):
        check_settings(plan.settings_file(run), plan.settings_of(run), plan.answers(run))
    return plan


def output_directory(args: argparse.Namespace) -> Path:
    """Where the answers go; a name that is no folder name, or a place that cannot be written, raises `CatsError`."""
    for flag, name in (("--bench-name", args.bench_name), ("--model-id", args.model_id)):
        if not name or Path(name).name != name or name in (".", ".."):
            raise CatsError(f"{flag} {name!r} names a folder of answers; it must be a plain name without slashes.")
    if args.output_dir is None and args.bench_name in RESERVED_BENCH_NAMES:
        raise CatsError(
            f"--bench-name {args.bench_name} would write into data/{args.bench_name}, which holds something else; choose another name."
        )
    output = Path(args.output_dir) if args.output_dir else Path("data") / args.bench_name / args.model_id
    existing = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CatsError(f"cannot write answers to {output}: {existing} is not a folder that can be written; choose another --output-dir.")
    return output


def run_settings(args: argparse.Namespace, method: MethodConfig, config: GenerationConfig, questions: Path) -> dict[str, Any]:
    """What decides an answer beside the model; a resumed run must have the same."""
    return {
        "method": as_record(method),
        "generation": {name: value for name, value in dataclasses.asdict(config).items() if name != "eos_token_ids"},
        "questions": {"file": questions.name, "sha256": sha256(questions)},
        "baseline": args.baseline,
    }


def answer_all(plan: Plan, subject: Subject, processes: Processes) -> None:
    """Every run over every question; what is answered already stays as it is."""
    view = live_view(plan, subject, processes)
    for run in range(plan.args.num_runs):
        contenders = [Contender(plan.args.model_id, forward_of(subject, plan.method, view), plan.answers(run))]
        if plan.args.baseline:
            plain = forward_of(subject, AutoregressiveConfig(), view)
            contenders.append(Contender(f"{plan.args.model_id}.baseline", plain, plan.baseline(run)))
        asking = Asking(subject.text, plan.config, plan.args.seed, run, plan.args.keep_going, view)
        run_eval(contenders, plan.questions, asking, processes, on_start=functools.partial(plan.write_settings, run))


def live_view(plan: Plan, subject: Subject, processes: Processes) -> LiveView | None:
    """What shows the cycles, if that was asked for; rows come from the first process only, above its progress bar."""
    show = functools.partial(tqdm.write, file=sys.stderr) if plan.args.live and processes.is_main_process else None
    if show is None and plan.args.trace_file is None:
        return None
    return LiveView(show, plan.args.trace_file, getattr(subject.model.base.source, "streamer", None))


def forward_of(subject: Subject, method: MethodConfig, view: LiveView | None) -> Forward:
    """A method as the decoding function that the harness asks for; the view sees each step as it is done."""
    return lambda prompt_ids, config: subject.answer(prompt_ids, method, config, view.step if view is not None else None)


def metrics_of(plan: Plan, subject: Subject) -> dict[str, Any]:
    """Metrics of each run and of all runs together, over the questions that this command selected."""
    selected = {question.question_id for question in plan.questions}
    shape, greedy = subject.shape(plan.method), plan.config.temperature == 0

    def chosen(path: Path) -> list[dict[str, Any]]:
        return [record for record in read_records(path) if record["question_id"] in selected]

    runs, all_records, all_plain = [], [], []
    for run in range(plan.args.num_runs):
        records, plain = chosen(plan.answers(run)), chosen(plan.baseline(run))
        summary = summarise(records, shape)
        runs.append(summary | ({"baseline": compare(records, plain, shape, greedy)} if plan.args.baseline else {}))
        all_records += [{**record, "question_id": (run, record["question_id"])} for record in records]
        all_plain += [{**record, "question_id": (run, record["question_id"])} for record in plain]
    together = summarise(all_records, shape)
    del together["committed_per_step"]  # the runs hold it
    if plan.args.baseline:
        together["baseline"] = compare(all_records, all_plain, shape, greedy)
    about = {"model_id": plan.args.model_id, "bench": plan.args.bench_name, "caveats": subject.caveats, "arithmetic": subject.arithmetic}
    return {**about, "all": together, "runs": runs}


def report(metrics: dict[str, Any]) -> str:
    """The outcome in a few words."""
    figures, plain = metrics["all"], metrics["all"].get("baseline")
    shown = {name: "-" if figures[name] is None else f"{figures[name]:.2f}" for name in ("accepted_length", "tokens_per_second")}
    text = f"{metrics['model_id']}: accepted length {shown['accepted_length']}, {shown['tokens_per_second']} tokens/s"
    text += f", {figures['questions']} questions answered, {figures['failed']} failed"
    if plain and plain["speed_up"] is not None:
        text += f", {plain['speed_up']:.2f} x plain decoding"
    if plain and plain["identical"] is not None:
        text += f", identical to plain {plain['identical']} of {plain['compared']}"
    return "; ".join((text, *metrics["caveats"])) + "\n"


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Check, load, answer, measure."""
    plan = make_plan(parse(argv))
    processes, device = start_processes(choose_device(plan.args.device))
    if processes.is_main_process:
        sys.stderr.write(f"{len(plan.questions)} questions of {plan.source.description}\n")
    args, model = plan.args, plan.model
    with heartbeat(f"loading {model.name}", processes.is_main_process):
        subject = load_subject(model.directory, model.adapters, plan.text, args.dtype, device, plan.memory, args.compute_dtype)
    if plan.args.ledger and processes.is_main_process:
        sys.stderr.write("\n".join(subject.model.base.source.report()) + "\n")
    if not plan.args.keep_going:
        subject.check_prompts(plan.questions)
    answer_all(plan, subject, processes)
    if processes.is_main_process:
        metrics = metrics_of(plan, subject)
        write_json(plan.output / "verification_metrics.json", {**metrics, "settings": plan.settings, "environment": environment()})
        sys.stdout.write(report(metrics))
        end_with_failures(plan)


def end_with_failures(plan: Plan) -> None:
    """End the command where --keep-going left questions without an answer: with status 1 if a bug was the cause, else with 2."""
    paths = [path for run in range(plan.args.num_runs) for path in (plan.answers(run), plan.baseline(run))]
    selected = {question.question_id for question in plan.questions}
    failed = [record for path in paths for record in read_records(path) if "failed" in record and record["question_id"] in selected]
    if not failed:
        return
    first = f"question {failed[0]['question_id']!r}: {failed[0]['failed']}"
    bugs = sum("traceback" in record for record in failed)
    said = f"{len(failed)} answers are missing ({first}); the same command asks for them again."
    if not bugs:
        raise CatsError(said)
    sys.stderr.write(f"internal error: {said} {bugs} of them are bugs, whose tracebacks stand in {plan.output}; report them.\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
