"""Why verify, and not just run the coarse model? Its greedy answers beside the exact model's: how fast they come, and how many differ.

    python -m evaluation.coarse_alone --model-path NESTED --prompts mtbench --limit 20 --max-new-tokens 160 --output coarse_alone.json
    python -m evaluation.coarse_alone --coarse int8 --prompts mtbench --limit 20

The coarse form of nested weights, or an int8 copy, reads the prompt and writes the answer by itself, all of it in memory: nothing verifies
it, so its text is another model's. Its speed is the upper bound of what drafting with it can reach. The exact answers, and the speed beside
it, are those of the method nested, which are plain decoding's token for token. Prompts count in neither speed.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats import CatsError, GenerationConfig, NestedConfig
from cats.cats_model import MultiAdapterCATSModel
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.engine import Limits, Stop, with_end_tokens
from cats.masks import causal_sight
from cats.planning.plan import COARSE, PREFILL_ROWS
from cats.rows import Rows
from cats.state import DecodeState
from evaluation.chosen_model import chosen_model
from evaluation.correctness import first_difference, read_prompts
from evaluation.options import add_model_flags, chosen_memory
from evaluation.processes import choose_device
from evaluation.questions import select_questions
from evaluation.record_file import write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment

EXACTLY = NestedConfig()


@dataclass(frozen=True)
class Speed:
    """Tokens behind the first one of each answer, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def rate(self) -> float | None:
        """Tokens per second; None where there were none."""
        return self.tokens / self.seconds if self.seconds else None


def next_token(state: DecodeState, tokens: Sequence[int], start: int) -> int:
    """The coarse form's best token after these, the first of which is at position `start`; its caches hold all before."""
    base, end = state.base, start + len(tokens)
    hidden = base.embed_tokens(torch.tensor([list(tokens)], device=base.device))
    rope = base.rope.rows(torch.arange(start, end, device=base.device), base.dtype)
    rows = Rows(hidden, rope, causal_sight(len(tokens), start, base.dtype, base.device), state.cache, slice(start, end), end)
    base.run_layers([rows], 0, base.layer_count, COARSE)
    return int(base.target_logits(rows.hidden_BTD[0, -1:]).argmax())


@torch.inference_mode()
def coarse_answer(
    model: MultiAdapterCATSModel, prompt_ids: Sequence[int], config: GenerationConfig, stop: Stop | None = None
) -> tuple[list[int], Speed]:
    """The greedy answer of the coarse form alone, prompt and all; it ends as any answer does."""
    limits = Limits(with_end_tokens(config, model), len(prompt_ids), model.base.context, stop)
    answer: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(model.base.turns.step(stack.enter_context(model.base.turns.answer())))
        stack.enter_context(model.base.stepping())
        state = stack.enter_context(closing(DecodeState(model, prompt_ids, (), len(prompt_ids) + limits.room, max_nodes=1)))
        for start in range(0, len(prompt_ids), PREFILL_ROWS):
            token = next_token(state, prompt_ids[start : start + PREFILL_ROWS], start)
        began = time.perf_counter()
        kept, finish = limits.cut(answer, [token])
        answer = [*answer, token][:kept]
        while finish is None:
            token = next_token(state, answer[-1:], len(prompt_ids) + len(answer) - 1)
            kept, finish = limits.cut(answer, [token])
            answer = [*answer, token][:kept]
        seconds = time.perf_counter() - began
    return answer, Speed(max(len(answer) - 1, 0), seconds)


def compare(subject: Subject, prompt_ids: list[int], config: GenerationConfig) -> dict[str, Any]:
    """One prompt, both ways."""
    exact = subject.answer(prompt_ids, EXACTLY, config)
    answer, coarse = coarse_answer(subject.model, prompt_ids, config, subject.text.stop())
    cycles = [trace for trace in exact.traces if not trace.prefill]
    exactly = Speed(sum(trace.committed for trace in cycles), sum(trace.seconds.total for trace in cycles))
    differing = first_difference(exact.ids, answer)
    return {
        "tokens": len(exact.ids),
        "first_difference": None if differing is None else differing.position,
        "coarse": dataclasses.asdict(coarse),
        "exact": dataclasses.asdict(exactly),
    }


def result_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All prompts put together; positions of first differences count tokens of the answer from 0."""
    places = sorted(record["first_difference"] for record in records if record["first_difference"] is not None)
    return {
        "answers": len(records),
        "differing": len(places),
        "share_differing": len(places) / len(records),
        "median_first_difference": statistics.median(places) if places else None,
        "earliest_difference": places[0] if places else None,
        "coarse_tokens_per_second": sum((Speed(**record["coarse"]) for record in records), Speed()).rate,
        "exact_tokens_per_second": sum((Speed(**record["exact"]) for record in records), Speed()).rate,
    }


def report(result: dict[str, Any]) -> str:
    """The outcome in words."""
    rates = {name: result[f"{name}_tokens_per_second"] for name in ("coarse", "exact")}
    said = {name: "no tokens behind the first" if rate is None else f"{rate:.2f} tokens/s" for name, rate in rates.items()}
    text = f"the coarse model alone: {said['coarse']}; exact answers, drafted by it: {said['exact']}\n"
    text += f"{result['differing']} of {result['answers']} answers differ from the exact model's ({result['share_differing']:.0%})"
    if result["differing"]:
        places = f"{result['median_first_difference']:g} (median), {result['earliest_difference']} at the earliest"
        text += f"; tokens that agree before the first that differs: {places}"
    return text + "\n"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.coarse_alone", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--prompts", required=True, help="a bench name, a question file (.jsonl) or a ShareGPT file (.json, .json.gz)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="per answer (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="take the first so many prompts (default: all)")
    parser.add_argument("--output", type=Path, help="result file (.json)")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Check, load, answer both ways, report."""
    args = parse(argv)
    config, model = GenerationConfig(max_new_tokens=args.max_new_tokens), chosen_model([EXACTLY], args)
    prompts = select_questions(read_prompts(args.prompts), 0, args.limit)
    text, memory = load_text(model.directory, args.template), chosen_memory([EXACTLY], args.max_new_tokens, args)
    with heartbeat(f"loading {model.name}"):
        device = choose_device(args.device)
        subject = load_subject(model.directory, model.adapters, text, args.dtype, device, memory, args.compute_dtype)
    records = []
    for prompt in live_bar(prompts, desc=f"{len(prompts)} prompts", unit="prompt"):
        prompt_ids = text.prompt_ids(prompt.turns[0])
        if len(prompt_ids) < subject.model.base.context:
            records.append({"question_id": prompt.question_id, **compare(subject, prompt_ids, config)})
    if not records:
        raise CatsError(f"no prompt of {args.prompts} leaves room for an answer in the model's context; give shorter prompts.")
    result = result_of(records)
    if args.output is not None:
        settings = subject_settings(args, model, memory, text) | {"max_new_tokens": args.max_new_tokens}
        write_json(args.output, {**result, "records": records, "settings": settings, "environment": environment()})
    sys.stdout.write(report(result))


if __name__ == "__main__":
    main()
