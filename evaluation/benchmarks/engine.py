"""What a pass and a token cost with all weights in memory, beside transformers and llama.cpp, and what a cycle spends outside the model.

    python -m evaluation.benchmarks.engine [--gguf FILE.gguf ...] [--threads 1 2] [--output FILE.json]

Engines and methods take turns in one run: milliseconds of a pass over 1 to 40 rows behind a prompt of 40 tokens, tokens per second of
plain greedy decoding (on text that must be transformers' own), and per method the cycle by stage. "Overhead" is the part of a cycle
outside layers, adapters and lm_head. GGUF files of the same model are read by llama-cpp-python, where that is installed.
"""

import argparse
import cProfile
import io
import json
import pstats
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cats
from cats import kernels
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.files import write_atomically
from evaluation.benchmarks.pass_engines import LlamaCpp, Ours, PassEngine, Transformers
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.options import add_place_flags
from evaluation.timing import environment, seconds_of

ROWS = (1, 4, 8, 20, 40)
METHODS: dict[str, cats.MethodConfig] = {
    "plain": cats.AutoregressiveConfig(),
    "kangaroo": cats.KangarooConfig(),
    "prompt lookup": cats.PromptLookupConfig(),
    "cats chain": cats.CascadeConfig(),
    "cats tree": cats.CascadeConfig(tree_topk=10, total_tokens=40),
}
QUESTIONS = (
    "Describe a market street early in the morning.",
    "Write a Python function that counts the words of a text.",
    "Tom has 12 apples and buys 3 bags of 5. How many apples has he now?",
    "Explain why the sea is salty.",
    "Give me three tips for learning a language.",
)


@dataclass(frozen=True)
class Subject:
    """The engines on one number of threads, ours first, and the prompts."""

    model: cats.MultiAdapterCATSModel
    engines: list[PassEngine]
    prompts: list[list[int]]
    config: cats.GenerationConfig

    def ours(self, method: cats.MethodConfig) -> list[cats.Generation]:
        """All prompts through one method."""
        return [cats.generate(self.model, prompt, cats.build_method(method), self.config) for prompt in self.prompts]


def load_subject(place: ChosenModel, arguments: argparse.Namespace, threads: int) -> Subject:
    """Load everything once."""
    model = cats.load(place.directory, place.adapters)
    prompts = [model.text.prompt_ids(question) for question in QUESTIONS]
    engines: list[PassEngine] = [Ours(model, f"ours, {str(model.base.weight_dtype).removeprefix('torch.')} weights")]
    engines += [Transformers(place.directory), *(LlamaCpp(path, threads) for path in arguments.gguf)]
    return Subject(model, engines, prompts, cats.GenerationConfig(max_new_tokens=arguments.new_tokens, eos_token_ids=()))


def passes(subject: Subject, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a pass by engine and rows; engines take turns, each behind its own prompt of 40 tokens."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for turn in live_bar(range(repeats + 1), desc="passes"):
        for engine in subject.engines:
            engine.begin(subject.prompts[0][:1] * 40)
            for rows in ROWS:
                several = [seconds_of(lambda: engine.run(rows)) for _ in range(5)]  # noqa: B023 - called at once
                seconds.setdefault((engine.name, rows), []).extend(several[1:] if turn else [])
    return {engine.name: {str(rows): 1e3 * statistics.median(seconds[engine.name, rows]) for rows in ROWS} for engine in subject.engines}


def plain_decoding(subject: Subject, repeats: int) -> dict[str, Any]:
    """Tokens per second of greedy decoding by engine, the prompt's pass included; answers of ours are transformers' or this raises."""
    answers = {
        engine.name: [engine.greedy(prompt, subject.config.max_new_tokens) for prompt in subject.prompts] for engine in subject.engines
    }
    ours, theirs = subject.engines[0].name, subject.engines[1].name
    if answers[ours] != answers[theirs]:
        raise cats.CatsError("plain decoding differs from transformers.generate; run evaluation.correctness to see where.")
    seconds: dict[str, list[float]] = {engine.name: [] for engine in subject.engines}
    for _ in live_bar(range(repeats), desc="plain decoding"):
        for engine in subject.engines:
            for prompt in subject.prompts:
                seconds[engine.name].append(seconds_of(lambda: engine.greedy(prompt, subject.config.max_new_tokens)))  # noqa: B023
    rates = {name: subject.config.max_new_tokens / statistics.median(times) for name, times in seconds.items()}
    same = {name: sum(one == other for one, other in zip(own, answers[theirs], strict=True)) for name, own in answers.items()}
    return {name: {"tokens_per_s": rates[name], "answers_equal_to_transformers": same[name], "of": len(subject.prompts)} for name in rates}


def overheads(subject: Subject, repeats: int) -> dict[str, Any]:
    """Per method: speed against plain, seconds per cycle by stage, and the share outside the model; methods take turns."""
    answers: dict[str, list[cats.Generation]] = {name: [] for name in METHODS}
    for _ in live_bar(range(repeats), desc="methods in turns"):
        for name, method in METHODS.items():
            answers[name] += subject.ours(method)
    plain = seconds_per_token(answers["plain"])
    speed_ups = {name: plain / seconds_per_token(generations) for name, generations in answers.items()}
    return {name: method_figures(generations) | {"speed_up": speed_ups[name]} for name, generations in answers.items()}


def seconds_per_token(generations: Sequence[cats.Generation]) -> float:
    """Median over answers, prefill left out."""
    return statistics.median(
        sum(trace.seconds.total for trace in answer.traces[1:]) / max(1, sum(trace.committed for trace in answer.traces[1:]))
        for answer in generations
    )


def method_figures(generations: Sequence[cats.Generation]) -> dict[str, float]:
    """Medians over cycles, in milliseconds, and the overhead's share (median over cycles)."""
    traces = [trace for answer in generations for trace in answer.traces[1:]]
    usual = ("draft", "shallow", "target", "accept", "total", "compute")
    stages = dict.fromkeys((*usual, *(stage for trace in traces for stage in trace.seconds.stages)))
    figures = {f"{stage}_ms": 1e3 * statistics.median(trace.seconds[stage] for trace in traces) for stage in stages}
    figures["overhead_share"] = statistics.median(1 - trace.seconds["compute"] / trace.seconds.total for trace in traces)
    figures["accepted_length"] = sum(trace.committed for trace in traces) / len(traces)
    figures["nodes"] = statistics.mean(trace.nodes for trace in traces)
    return figures


def profile(subject: Subject, name: str, lines: int = 25) -> str:
    """cProfile of one method over all prompts, by own time."""
    profiler = cProfile.Profile()
    profiler.runcall(subject.ours, METHODS[name])
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    return f"{name}\n{text.getvalue()}"


def measured(place: ChosenModel, arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Everything, on so many threads."""
    torch.set_num_threads(threads)
    with heartbeat(f"loading {place.name}"):
        subject = load_subject(place, arguments, threads)
    decoding = plain_decoding(subject, arguments.repeats)
    return {"pass_ms": passes(subject, arguments.repeats), "plain": decoding, "methods": overheads(subject, arguments.repeats)}


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_flags(parser)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="files of the same model for llama.cpp")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads, one run for each (default: 1)")
    parser.add_argument("--profile", action="store_true", help="print where the time of each method goes, and stop")
    parser.add_argument("--output", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    place = chosen_model(list(METHODS.values()), arguments)
    if arguments.profile:
        torch.set_num_threads(arguments.threads[0])
        print("\n".join(profile(load_subject(place, arguments, arguments.threads[0]), name) for name in METHODS))
        return
    result = {
        "model": place.name,
        "compiled": kernels.why_not() or True,
        "prompt": "40 tokens before the passes",
        "threads": {str(threads): measured(place, arguments, threads) for threads in arguments.threads},
        "environment": environment(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_atomically(arguments.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
