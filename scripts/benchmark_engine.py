"""What the engine itself costs: plain decoding against transformers' own, and the share of a cycle spent outside the model.

    python -m scripts.benchmark_engine [--model-path M --adapters FOLDER --draft-layer 3 --shallow-layer 15] [--output FILE.json]

Two things are compared in one run, in turns, in float32, all in memory: `transformers.generate` and our plain decoding, and our
methods among themselves. "Overhead" is the part of a cycle outside layers, adapters and lm_head.
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
from transformers import AutoModelForCausalLM

import cats
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.files import write_atomically
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.options import add_place_flags
from evaluation.timing import environment, paired

METHODS: dict[str, cats.MethodConfig] = {
    "plain": cats.AutoregressiveConfig(),
    "kangaroo": cats.KangarooConfig(),
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
    """The model in our engine and in transformers, and the prompts."""

    model: cats.MultiAdapterCATSModel
    plain: Any
    prompts: list[list[int]]
    config: cats.GenerationConfig

    def ours(self, method: cats.MethodConfig) -> list[cats.Generation]:
        """All prompts through one method."""
        return [cats.generate(self.model, prompt, cats.build_method(method, self.model), self.config) for prompt in self.prompts]

    def theirs(self) -> list[list[int]]:
        """All prompts through transformers' greedy generation."""
        return [self._generate(prompt) for prompt in self.prompts]

    def _generate(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=self.config.max_new_tokens, pad_token_id=0
        )
        return list(output[0, len(prompt) :].tolist())


def load_subject(place: ChosenModel, new_tokens: int) -> Subject:
    """Load everything once."""
    model = cats.load(place.directory, place.adapters, dtype="float32")
    prompts = [model.text.prompt_ids(question) for question in QUESTIONS]
    plain = AutoModelForCausalLM.from_pretrained(place.directory, dtype=torch.float32).eval()
    return Subject(model, plain, prompts, cats.GenerationConfig(max_new_tokens=new_tokens))


def against_transformers(subject: Subject, repeats: int) -> dict[str, Any]:
    """Seconds of transformers' and our plain decoding over all prompts, in turns; identical output is a condition."""
    plain = METHODS["plain"]
    if [answer.ids for answer in subject.ours(plain)] != subject.theirs():
        raise cats.CatsError("plain decoding differs from transformers.generate; run evaluation.correctness to see where.")
    tokens = sum(len(ids) for ids in subject.theirs())
    timing = paired(subject.theirs, lambda: subject.ours(plain), repeats)
    return {
        "tokens": tokens,
        "transformers_tokens_per_s": tokens / timing.first_median,
        "ours_tokens_per_s": tokens / timing.second_median,
        "speed_up": timing.ratio,
    } | timing.as_record()


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


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_place_flags(parser)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="print where the time of each method goes, and stop")
    parser.add_argument("--output", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    place = chosen_model(list(METHODS.values()), arguments)
    with heartbeat(f"loading {place.name}, twice"):
        subject = load_subject(place, arguments.new_tokens)
    if arguments.profile:
        print("\n".join(profile(subject, name) for name in METHODS))
        return
    result = {
        "model": place.name,
        "plain_against_transformers": against_transformers(subject, arguments.repeats),
        "methods": overheads(subject, arguments.repeats),
        "environment": environment(),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_atomically(arguments.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
