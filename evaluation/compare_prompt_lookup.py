"""Prompt lookup beside transformers' own, `generate(prompt_lookup_num_tokens=...)`: tokens a pass of the target, and the same text?

    python -m evaluation.compare_prompt_lookup --prompts heldout.json.gz --limit 40 --output prompt_lookup.json

Greedy. What counts is the same on both sides: passes of the whole model behind the answer's first token, and the tokens that they commit.
transformers drafts in the prompt's pass already, so it is given the prompt with that first token, and calls of its model are counted by
a hook. It copies from the earliest place of the longest n-gram that matches, ours from the latest. So ours also runs with the earliest
place, where it must make as many passes as transformers does: what is left between the two is the choice of the place alone.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig as TransformersConfig

from cats import CatsError, GenerationConfig, MemoryOptions, PromptLookupConfig, generate
from cats.checkpoint import DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.files import write_atomically
from cats.methods import Method
from cats.methods.prompt_lookup import PromptLookup
from cats.records import sha256
from cats.settings import as_record
from cats.text import ModelText
from evaluation.chosen_model import ChosenModel, chosen_model
from evaluation.correctness import prompts_file, read_prompts, refuse_half
from evaluation.metrics import ratio, ratio_interval
from evaluation.options import add_model_flags, chosen_memory
from evaluation.processes import choose_device
from evaluation.questions import Question, select_questions
from evaluation.record_file import Record, append_record, check_settings, read_records, write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment
from evaluation.transformers_reference import Reference

if TYPE_CHECKING:
    from cats.state import Cycle

TITLES = {"transformers": "transformers", "earliest": "ours, from the earliest place", "latest": "ours (`prompt_lookup`)"}


class EarliestLookup(PromptLookup):
    """Prompt lookup that copies from the earliest place of the longest n-gram, as transformers does; for comparison alone."""

    def propose(self, cycle: "Cycle") -> Sequence[int]:
        """See `Method`."""
        nodes = [0]
        for token in earliest_continuation(cycle.state.tokens, self.config.max_ngram, min(self.config.continuation, cycle.depth_limit)):
            nodes.append(cycle.tree.add(nodes[-1], token, "lookup"))
        return nodes


def earliest_continuation(tokens: Sequence[int], longest: int, count: int) -> list[int]:
    """Up to `count` tokens behind the earliest place at which the longest n-gram that ends `tokens` stands; none where there is none."""
    for size in range(min(longest, len(tokens) - 1), 0, -1):
        last = list(tokens[-size:])
        for start in range(len(tokens) - size):
            if list(tokens[start : start + size]) == last:
                return list(tokens[start + size : start + size + count])
    return []


@contextmanager
def counted_calls(model: torch.nn.Module) -> Iterator[list[int]]:
    """A list that gets an entry with every call of the model within the block."""
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


def by_transformers(reference: Reference, ids: Sequence[int], max_new_tokens: int, method: PromptLookupConfig) -> tuple[list[int], int]:
    """What transformers' prompt lookup appends to `ids`, and the passes that it takes."""
    settings = TransformersConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        prompt_lookup_num_tokens=method.continuation,
        max_matching_ngram_size=method.max_ngram,
        eos_token_id=list(reference.end_token_ids) or None,
        pad_token_id=0,
    )
    prompt = torch.tensor([list(ids)], device=reference.device)
    model: Any = reference.model
    with counted_calls(model) as calls:
        whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return [int(token) for token in whole[0, len(ids) :]], len(calls)


def compare_prompt(
    subject: Subject, reference: Reference, prompt_ids: list[int], method: PromptLookupConfig, max_new_tokens: int
) -> Record:
    """One prompt by all three: tokens behind the answer's first, passes that they took, and whether the text is transformers'."""
    room = subject.model.base.context - len(prompt_ids)
    if room < 2:
        return {"skipped": True}
    config = GenerationConfig(max_new_tokens=min(max_new_tokens, room), eos_token_ids=tuple(reference.end_token_ids))
    ways: dict[str, Method] = {"latest": PromptLookup(method), "earliest": EarliestLookup(method)}
    answers = {name: generate(subject.model, prompt_ids, way, config, stop=subject.text.stop()) for name, way in ways.items()}
    ids = {name: answer.ids for name, answer in answers.items()}
    passes = {name: sum(not trace.prefill for trace in answer.traces) for name, answer in answers.items()}
    first, left = ids["latest"][:1], config.max_new_tokens - 1
    ended = not left or first[0] in reference.end_token_ids
    appended, passes["transformers"] = ([], 0) if ended else by_transformers(reference, [*prompt_ids, *first], left, method)
    ids["transformers"] = [*first, *appended]
    same = {name: ids[name] == ids["transformers"] for name in ways}
    return {"skipped": False, "tokens": {name: len(ids[name]) - 1 for name in TITLES}, "passes": passes, "identical": same}


@dataclass(frozen=True)
class Comparison:
    """What is compared, checked as far as it can be without loading the model."""

    args: argparse.Namespace
    method: PromptLookupConfig
    model: ChosenModel
    memory: MemoryOptions | None
    prompts: list[Question]
    text: ModelText

    @property
    def records(self) -> Path:
        """One line a prompt."""
        return Path(self.args.output).with_suffix(".records.jsonl")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an outcome; a comparison that goes on must have the same."""
        prompts = prompts_file(self.args.prompts)
        return subject_settings(self.args, self.model, self.memory, self.text) | {
            "method": as_record(self.method),
            "max_new_tokens": self.args.max_new_tokens,
            "prompts": {"file": prompts.name, "sha256": sha256(prompts)},
        }


def make_comparison(args: argparse.Namespace) -> Comparison:
    """Check what needs no weights; the first fault raises `CatsError`."""
    method = PromptLookupConfig(max_ngram=args.max_ngram, continuation=args.continuation)
    refuse_half(DTYPES.get(args.compute_dtype))
    GenerationConfig(max_new_tokens=args.max_new_tokens)
    model, memory = chosen_model([method], args), chosen_memory([method], args.max_new_tokens, args)
    prompts = select_questions(read_prompts(args.prompts), 0, args.limit)
    comparison = Comparison(args, method, model, memory, prompts, load_text(model.directory, args.template))
    kept = comparison.records.with_suffix(".settings.json")
    check_settings(kept, comparison.settings, comparison.records)
    write_json(kept, {"settings": comparison.settings})
    return comparison


def compare_all(comparison: Comparison) -> None:
    """A record for every prompt that has none yet."""
    args, model, text = comparison.args, comparison.model, comparison.text
    done = {record["question_id"] for record in read_records(comparison.records)}
    waiting = [prompt for prompt in comparison.prompts if prompt.question_id not in done]
    if not waiting:
        return
    with heartbeat(f"loading {model.name}, twice"):
        device = choose_device(args.device)
        subject = load_subject(model.directory, model.adapters, text, args.dtype, device, comparison.memory, args.compute_dtype)
        base = subject.model.base
        refuse_half(base.dtype)
        reference = Reference(model.directory, base.weight_dtype, base.dtype, base.device, text.end_token_ids)
        _ = reference.model
    for prompt in live_bar(waiting, desc=f"{len(waiting)} prompts", unit="prompt"):
        outcome = compare_prompt(subject, reference, text.prompt_ids(prompt.turns[0]), comparison.method, args.max_new_tokens)
        append_record(comparison.records, {"question_id": prompt.question_id, **outcome})


def result_of(comparison: Comparison) -> dict[str, Any]:
    """All prompts put together; raises `CatsError` where none left room for an answer."""
    chosen = {prompt.question_id for prompt in comparison.prompts}
    known = [record for record in read_records(comparison.records) if record["question_id"] in chosen]
    records = [record for record in known if not record["skipped"]]
    counts = {name: [(record["tokens"][name], record["passes"][name]) for record in records] for name in TITLES}
    if not any(passes for _, passes in counts["latest"]):
        raise CatsError(f"no prompt of {comparison.args.prompts} leaves room for an answer of two tokens; give shorter prompts.")
    return {
        "prompts": len(records),
        "skipped_prompts": len(known) - len(records),
        "accepted_length": {name: ratio(sum(t for t, _ in pairs), sum(p for _, p in pairs)) for name, pairs in counts.items()},
        "accepted_length_interval": {name: ratio_interval([pairs]) for name, pairs in counts.items()},
        "passes": {name: sum(passes for _, passes in pairs) for name, pairs in counts.items()},
        "identical": {name: sum(record["identical"][name] for record in records) for name in ("latest", "earliest")},
        "prompts_of_equal_passes": sum(record["passes"]["earliest"] == record["passes"]["transformers"] for record in records),
        "settings": comparison.settings,
        "environment": environment(),
    }


def markdown(result: dict[str, Any]) -> str:
    """The outcome in a table and a sentence."""
    settings, rows = result["settings"], []
    for name, title in TITLES.items():
        low, high = result["accepted_length_interval"][name]
        same = "-" if name == "transformers" else f"{result['identical'][name]} of {result['prompts']}"
        rows.append(f"| {title} | {result['accepted_length'][name]:.3f} ({low:.2f} to {high:.2f}) | {result['passes'][name]} | {same} |\n")
    method = settings["method"]
    return (
        f"# Prompt lookup beside transformers {result['environment']['transformers']}\n\n"
        f"{settings['model']['name']}, {settings['dtype']}, greedy, {result['prompts']} prompts of {settings['prompts']['file']}, at most "
        f"{settings['max_new_tokens']} tokens an answer; n-grams of up to {method['max_ngram']}, {method['continuation']} tokens copied. "
        "Passes of the whole model behind the answer's first token; 90 % intervals by bootstrap over prompts.\n\n"
        "| prompt lookup of | tokens a pass | passes | text is transformers' |\n|---|---|---|---|\n"
        f"{''.join(rows)}\n"
        f"From the earliest place of the n-gram, which is transformers' rule, our engine makes as many passes as transformers on "
        f"{result['prompts_of_equal_passes']} of {result['prompts']} prompts. What lies between that row and the last one is the rule: the "
        "latest place is nearer to what is written now, and has less text behind it to copy.\n"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    default = PromptLookupConfig()
    parser = CommandParser(prog="python -m evaluation.compare_prompt_lookup", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--prompts", required=True, help="a bench name, a question file (.jsonl) or a ShareGPT file (.json, .json.gz)")
    parser.add_argument("--limit", type=int, help="take the first so many prompts (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per answer (default: %(default)s)")
    parser.add_argument("--max-ngram", type=int, default=default.max_ngram, help="longest n-gram looked up (default: %(default)s)")
    parser.add_argument("--continuation", type=int, default=default.continuation, help="tokens copied (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json), with a table (.md) and records beside it")
    parser.set_defaults(dtype="float32")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Check, compare, report; exit status 1 where a text differs."""
    comparison = make_comparison(parse(argv))
    compare_all(comparison)
    result, output = result_of(comparison), Path(comparison.args.output)
    text = markdown(result)
    write_json(output, result)
    write_atomically(output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    sys.stdout.write(text)
    if min(result["identical"].values()) < result["prompts"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
