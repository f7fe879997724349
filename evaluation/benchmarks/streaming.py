"""Wall clock under streaming: plain decoding and CATS with the same budget of weights, every method with a plan of its own, in turns.

    python -m evaluation.benchmarks.streaming [--flash-bandwidth 100MB/s] --memory-budget 184MB --output streaming.json

Says for every method: tokens/s against plain decoding, next to the accepted length; the cycle's time next to its physical bound, the
longer of what the link needs for the bytes streamed and what the processor needs for the arithmetic (the cycle less its waiting), and
next to what is left when only the ring hides the front: max(stream, target pass) + max(0, draft and check - ring / link); and the share
of a cycle outside layers, adapters and head; of nested chains, what drafting while the exact pass streams would give. Without
--flash-bandwidth the link is the disk, at the rate of a direct sequential read. At a budget that holds everything nothing is streamed,
and the methods are compared resident.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import cats
from cats.checkpoint import weight_files
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.memory_flags import PROMPT_POSITIONS, check_coarse, drafts_coarsely
from cats.cli.progress import heartbeat, live_bar
from cats.config import COARSE_COPIES
from cats.errors import CatsError
from cats.methods import needs_of, with_needs
from cats.planning.plan import amount, parse_amount
from cats.runtime.link import measure_read_rate, rate_text
from cats.runtime.store import Store
from evaluation.benchmarks.hidden_drafting import hidden_drafting, sentence
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.metrics import ratio_interval
from evaluation.options import add_place_flags
from evaluation.presets import PRESET_HELP, parse_presets
from evaluation.questions import read_questions, resolve_bench, select_questions
from evaluation.record_file import write_json
from evaluation.subject import load_text, stored_bytes
from evaluation.timing import environment

PLAIN = "autoregressive"


@dataclass(frozen=True)
class Contender:
    """A method and the model that was loaded for it."""

    method: cats.MethodConfig
    model: cats.MultiAdapterCATSModel
    answers: list[cats.Generation]

    @property
    def source(self) -> Store:
        """Where its weights come from."""
        return self.model.base.source


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_flags(parser)
    parser.add_argument("--methods", nargs="+", default=["cascade_chain", "cascade_tree"], metavar="METHOD", help=PRESET_HELP)
    parser.add_argument("--memory-budget", help="of weights (default: half of the checkpoint's)")
    parser.add_argument("--flash-bandwidth", help="like 20MB/s: the link that is imitated (default: the disk as it is)")
    parser.add_argument("--no-pinning", action="store_true", help="the paper's way, plain decoding included")
    parser.add_argument("--ring-buffers", type=int, default=3)
    parser.add_argument(
        "--coarse", choices=COARSE_COPIES, help="a copy of the layers, for those methods that draft with a coarse form: int8"
    )
    parser.add_argument("--bench-name", default="mt_bench")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the result here")
    return parser.parse_args(argv)


def imitated(args: argparse.Namespace) -> float | None:
    """Bytes per second of the link that is imitated, if one is."""
    return None if args.flash_bandwidth is None else float(parse_amount(args.flash_bandwidth, "--flash-bandwidth"))


def contenders_of(args: argparse.Namespace, place: ChosenModel, methods: dict[str, cats.MethodConfig]) -> dict[str, Contender]:
    """Each method loaded under the same budget."""
    budget = parse_amount(args.memory_budget, "--memory-budget") if args.memory_budget else stored_bytes(place.directory) // 2
    memory = cats.MemoryOptions(
        budget_bytes=budget,
        covers="weights",
        flash_bandwidth=imitated(args),
        pinning=not args.no_pinning,
        ring_buffers=args.ring_buffers,
        positions=PROMPT_POSITIONS + args.max_new_tokens,
    )
    copied = {label: args.coarse if drafts_coarsely(method) else None for label, method in methods.items()}
    return {label: loaded(place, method, replace(memory, coarse=copied[label]), args.dtype) for label, method in methods.items()}


def loaded(place: ChosenModel, method: cats.MethodConfig, memory: cats.MemoryOptions, dtype: str) -> Contender:
    """A method with a model of its own, planned for it."""
    adapters = {name: place.adapters[name] for name in needs_of(method).adapters}
    return Contender(method, cats.load(place.directory, adapters, dtype=dtype, memory=with_needs(memory, method), plan=None), [])


def answer_in_turns(args: argparse.Namespace, directory: Path, contenders: dict[str, Contender]) -> None:
    """Every question to every contender, the order turning by one; greedy answers that differ from plain decoding's are an error."""
    text = load_text(directory, None)
    questions = select_questions(read_questions(resolve_bench(args.bench_name).path), 0, args.questions)
    config = cats.GenerationConfig(max_new_tokens=args.max_new_tokens, eos_token_ids=text.end_token_ids)
    labels = list(contenders)
    for place, question in enumerate(live_bar(questions, desc="questions", unit="question")):
        prompt = text.prompt_ids(question.turns[0])
        for label in labels[place % len(labels) :] + labels[: place % len(labels)]:
            contender = contenders[label]
            contender.answers.append(cats.generate(contender.model, prompt, cats.build_method(contender.method, contender.model), config))
    for label, contender in contenders.items():
        for place, (ours, plain) in enumerate(zip(contender.answers, contenders[PLAIN].answers, strict=True)):
            if ours.ids != plain.ids:
                raise CatsError(f"{label} differs from plain decoding on question {place}; run evaluation.correctness to see where.")


def tokens_and_seconds(answers: Sequence[cats.Generation]) -> list[tuple[int, float]]:
    """Of each answer, the prefill left out."""
    return [
        (sum(trace.committed for trace in answer.traces[1:]), sum(trace.seconds.total for trace in answer.traces[1:])) for answer in answers
    ]


def figures_of(contender: Contender, bandwidth: float) -> dict[str, Any]:
    """Medians over cycles, prefill left out; the interval of tokens per second is of 90 %, by bootstrap over questions."""
    traces = [trace for answer in contender.answers for trace in answer.traces[1:]]
    tokens, seconds = sum(trace.committed for trace in traces), sum(trace.seconds.total for trace in traces)
    streams = [trace.bytes_streamed / bandwidth for trace in traces]
    computes = [trace.seconds.total - trace.seconds["stream_wait"] for trace in traces]
    ring = contender.source.plan.ring_bytes / bandwidth
    fronts = [trace.seconds.total - trace.seconds["target"] for trace in traces]
    targets = [trace.seconds["target"] - trace.seconds["stream_wait"] for trace in traces]
    models = [max(stream, target) + max(0.0, front - ring) for stream, target, front in zip(streams, targets, fronts, strict=True)]
    bounds = [max(stream, compute) for stream, compute in zip(streams, computes, strict=True)]
    return {
        "tokens": tokens,
        "cycles": len(traces),
        "accepted_length": tokens / len(traces),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_interval": ratio_interval([tokens_and_seconds(contender.answers)]),
        "streamed_bytes_per_cycle": statistics.median(trace.bytes_streamed for trace in traces),
        "cycle_seconds": statistics.median(trace.seconds.total for trace in traces),
        "stream_seconds": statistics.median(streams),
        "compute_seconds": statistics.median(computes),
        "front_seconds": statistics.median(trace.seconds["draft"] + trace.seconds["shallow"] for trace in traces),
        "bound_tokens_per_second": tokens / sum(bounds),
        "cycle_times_bound": statistics.median(trace.seconds.total / bound for trace, bound in zip(traces, bounds, strict=True)),
        "cycle_times_model": statistics.median(trace.seconds.total / model for trace, model in zip(traces, models, strict=True)),
        "overhead_share": statistics.median(1 - trace.seconds["compute"] / trace.seconds.total for trace in traces),
        "hidden_drafting": hidden_drafting(traces),
        "ring_bytes": contender.source.plan.ring_bytes,
        "charged_bytes": contender.source.plan.charged,
    }


def table(methods: dict[str, dict[str, Any]]) -> str:
    """The result in Markdown."""
    lines = [
        "| method | accepted length | tokens/s | against plain | over accepted length | streamed a cycle | cycle, s | times its bound | "
        "times its model | overhead |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {label} | {row['accepted_length']:.2f} | {row['tokens_per_second']:.2f} | {row['speed_up']:.2f} x | "
        f"{row['speed_up'] / row['accepted_length']:.2f} | {amount(int(row['streamed_bytes_per_cycle']))} | {row['cycle_seconds']:.3f} | "
        f"{row['cycle_times_bound']:.2f} | {row['cycle_times_model']:.2f} | {row['overhead_share']:.1%} |"
        for label, row in methods.items()
    ]
    return "\n".join(lines) + "\n"


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Load, answer in turns, report."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    presets = parse_presets([PLAIN, *args.methods])
    if args.coarse is not None:
        check_coarse(presets.values())
    place = chosen_model(list(presets.values()), args)
    with heartbeat(f"loading {place.name}"):
        contenders = contenders_of(args, place, presets)
    emulated = imitated(args)
    bandwidth = measure_read_rate(weight_files(place.directory)[0]) if emulated is None else emulated
    for contender in contenders.values():
        sys.stderr.write("\n".join(contender.source.report()) + "\n\n")
    answer_in_turns(args, place.directory, contenders)
    methods = {label: figures_of(contender, bandwidth) for label, contender in contenders.items()}
    for row in methods.values():
        row["speed_up"] = row["tokens_per_second"] / methods[PLAIN]["tokens_per_second"]
    budget = contenders[PLAIN].source.plan.budget_bytes or 0
    streams = any(contender.source.streamer is not None for contender in contenders.values())
    disk = f"this disk, {rate_text(bandwidth)}" if streams else "everything in memory"
    link = disk if emulated is None else f"emulated {rate_text(bandwidth)}"
    title = f"budget {amount(budget)} of weights, {link}, {'no pinning' if args.no_pinning else 'pinned'}, greedy answers identical\n\n"
    sys.stdout.write(title + table(methods))
    for label, row in methods.items():
        if row["hidden_drafting"] is not None:
            sys.stdout.write(sentence(label, row["hidden_drafting"]))
    if args.output:
        result = {"methods": methods, "budget_bytes": budget, "link": link, "pinning": not args.no_pinning, "environment": environment()}
        write_json(args.output, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
