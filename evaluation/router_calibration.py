"""Is CAS-Spec's router right? The acceptance that it expects against the target's verdicts, predicted seconds against the clock's.

    python -m evaluation.router_calibration --benches mtbench gsm8k --questions 6 --max-new-tokens 160 --output router.json
    python -m evaluation.router_calibration --method cas_spec_exit --draft-layer 3 --benches mtbench --questions 6 --output router.json

Every drafted token whose context the target took counts with the chance that the router gave it, by level and in ten bins; every pass with
its prediction, made before it was learnt from. The share of a cycle that deciding takes stands beside them. What is learnt goes on from
question to question, as it does in use; the first cycles, in which little is known, count as well. A picture (.png) lies beside the result.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats import CatsError, GenerationConfig, build_method
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.files import write_atomically
from cats.methods.cas_spec import CasSpecConfig, Opened
from cats.settings import as_record
from cats.trace import StepTrace
from evaluation.chosen_model import chosen_model
from evaluation.options import add_model_flags, chosen_memory
from evaluation.presets import PRESET_HELP, parse_preset
from evaluation.processes import choose_device
from evaluation.questions import ALIASES, BENCHES, Question, read_questions, resolve_bench, spread_questions
from evaluation.record_file import write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment

BINS, DRAWN = 10, 10
"""Bins of what was expected; tokens of a bin that the picture shows, at least."""
MARKS = "osv^D"
Judged = tuple[str, float, bool]
Timed = tuple[str, float, float]


def acceptance_of(judged: Sequence[Judged]) -> dict[str, Any]:
    """By level: tokens, what was expected and what came of it, in bins of what was expected; the mean distance, weighted by tokens."""
    levels = {}
    for level in sorted({level for level, _, _ in judged}):
        own = [(said, taken) for whose, said, taken in judged if whose == level]
        bins = []
        for place in range(BINS):
            inside = [(said, taken) for said, taken in own if min(int(said * BINS), BINS - 1) == place]
            if inside:
                expected, true = statistics.fmean(said for said, _ in inside), statistics.fmean(taken for _, taken in inside)
                bins.append({"tokens": len(inside), "expected": expected, "true": true})
        levels[level] = {
            "tokens": len(own),
            "expected": statistics.fmean(said for said, _ in own),
            "true": statistics.fmean(taken for _, taken in own),
            "calibration_error": sum(row["tokens"] * abs(row["expected"] - row["true"]) for row in bins) / len(own),
            "bins": bins,
        }
    return levels


def times_of(timed: Sequence[Timed]) -> dict[str, Any]:
    """By kind of pass: how many, mean seconds, the median share by which predictions were off, and their sum over that of the passes."""
    kinds = {}
    for kind in sorted({kind for kind, _, _ in timed}):
        own = [(predicted, seconds) for whose, predicted, seconds in timed if whose == kind]
        kinds[kind] = {
            "passes": len(own),
            "mean_seconds": statistics.fmean(seconds for _, seconds in own),
            "median_error": statistics.median(abs(predicted - seconds) / seconds for predicted, seconds in own),
            "median_error_second_half": statistics.median(
                abs(predicted - seconds) / seconds for predicted, seconds in own[len(own) // 2 :]
            ),
            "predicted_over_measured": sum(predicted for predicted, _ in own) / sum(seconds for _, seconds in own),
        }
    return kinds


def cycles_of(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """What cycles were, and the share of them that deciding took."""
    cycles = [trace for trace in traces if not trace.prefill]
    total = sum(trace.seconds.total for trace in cycles)
    return {
        "cycles": len(cycles),
        "accepted_length": sum(trace.committed for trace in cycles) / len(cycles),
        "tokens_per_second": sum(trace.committed for trace in cycles) / total,
        "decision_share": sum(trace.seconds["decide"] for trace in cycles) / total,
        "draft_share": sum(trace.seconds["draft"] for trace in cycles) / total,
    }


def draw(result: dict[str, Any], timed: Sequence[Timed], path: Path) -> None:
    """Expected and true acceptance, predicted and measured seconds."""
    from matplotlib.figure import Figure  # only this picture needs it, and it takes a second to load

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#797979", linewidth=0.8)
    for mark, (level, figures) in zip(MARKS, result["acceptance"].items(), strict=False):
        bins = [row for row in figures["bins"] if row["tokens"] >= DRAWN]
        label = f"{level}, {figures['tokens']} tokens"
        left.plot([row["expected"] for row in bins], [row["true"] for row in bins], marker=mark, label=label)
    left.set(xlabel="chance that the router gave", ylabel="share that the target took", xlim=(0, 1), ylim=(0, 1))
    for mark, kind in zip(MARKS, result["times"], strict=False):
        own = [(1e3 * predicted, 1e3 * seconds) for whose, predicted, seconds in timed if whose == kind]
        right.plot([row[0] for row in own], [row[1] for row in own], mark, markersize=3, label=f"{kind}, {len(own)} passes")
    ends = [1e3 * end(end(predicted, seconds) for _, predicted, seconds in timed) for end in (min, max)]
    right.plot(ends, ends, color="#797979", linewidth=0.8)
    right.set(xlabel="predicted, ms", ylabel="measured, ms", xscale="log", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize="small")
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=120))


def report(result: dict[str, Any]) -> str:
    """The outcome in words."""
    lines = ["acceptance       tokens  expected      true  mean distance in bins"]
    for level, row in result["acceptance"].items():
        figures = f"{row['tokens']:6d} {row['expected']:9.3f} {row['true']:9.3f} {row['calibration_error']:9.3f}"
        lines.append(f"  {level:14s} {figures}")
    lines.append("seconds          passes   mean ms  median error  of the second half  predicted / measured")
    for kind, row in result["times"].items():
        errors = f"{row['median_error']:13.1%} {row['median_error_second_half']:19.1%} {row['predicted_over_measured']:21.3f}"
        lines.append(f"  {kind:14s} {row['passes']:6d} {1e3 * row['mean_seconds']:9.2f} {errors}")
    cycles = result["cycles"]
    shares = f"deciding takes {cycles['decision_share']:.2%} of a cycle, drafting {cycles['draft_share']:.1%}"
    return "\n".join([*lines, f"{cycles['cycles']} cycles, accepted length {cycles['accepted_length']:.2f}; {shares}"]) + "\n"


def chosen_questions(args: argparse.Namespace) -> list[tuple[str, Question]]:
    """The questions of every bench."""
    benches = dict.fromkeys(ALIASES.get(name, name) for name in args.benches)
    sources = {bench: resolve_bench(bench).path for bench in benches}
    return [(bench, one) for bench, path in sources.items() for one in spread_questions(read_questions(path), args.questions)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.router_calibration", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--method", default="cas_spec", metavar="METHOD", help=f"of CAS-Spec; {PRESET_HELP} (default: %(default)s)")
    parser.add_argument("--benches", nargs="+", choices=(*ALIASES, *BENCHES), default=["mtbench"], help="default: mtbench")
    parser.add_argument("--questions", type=int, default=6, help="of each bench, evenly spread over it, first turns (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="per answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json)")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Check, load, answer, compare."""
    args = parse(argv)
    label, method = parse_preset(args.method)
    if not isinstance(method, CasSpecConfig):
        raise CatsError(f"{label} is not a setting of CAS-Spec and has no router; give --method cas_spec or another of its presets.")
    config, model, asked = GenerationConfig(max_new_tokens=args.max_new_tokens), chosen_model([method], args), chosen_questions(args)
    text, memory = load_text(model.directory, args.template), chosen_memory([method], args.max_new_tokens, args)
    with heartbeat(f"loading {model.name}"):
        subject = load_subject(model.directory, model.adapters, text, args.dtype, choose_device(args.device), memory, args.compute_dtype)
    judged, timed, traces = answer_all(subject, method, asked, config)
    result = {"acceptance": acceptance_of(judged), "times": times_of(timed), "cycles": cycles_of(traces)}
    settings = subject_settings(args, model, memory, text) | {"max_new_tokens": args.max_new_tokens, "method": as_record(method)}
    questions = [{"bench": bench, "question_id": question.question_id} for bench, question in asked]
    write_json(args.output, {**result, "settings": settings | {"questions": questions}, "environment": environment()})
    draw(result, timed, args.output.with_suffix(".png"))
    sys.stdout.write(report(result))


def answer_all(
    subject: Subject, method: CasSpecConfig, asked: Sequence[tuple[str, Question]], config: GenerationConfig
) -> tuple[list[Judged], list[Timed], list[StepTrace]]:
    """Answer every first turn; what the router thought and what came of it, and the traces."""
    judged: list[Judged] = []
    timed: list[Timed] = []
    traces: list[StepTrace] = []
    opened: Opened = build_method(method, subject.model).resources
    for _, question in live_bar(asked, desc=f"{len(asked)} questions", unit="question"):
        traces += subject.answer(subject.text.prompt_ids(question.turns[0]), method, config).traces
        for seen, kept in ((opened.router.judged, judged), (opened.router.timed, timed)):
            kept.extend(seen)  # type: ignore[arg-type]
            seen.clear()
    if not any(not trace.prefill for trace in traces):
        raise CatsError("no answer has a cycle to look at; give more --max-new-tokens.")
    return judged, timed, traces


if __name__ == "__main__":
    main()
