"""Is greedy output the model's own? Compares methods, token by token, with transformers' `generate(do_sample=False)`.

    python -m evaluation.correctness --all-methods --prompts heldout.json.gz --limit 40 --output correctness.json
    python -m evaluation.correctness --methods kangaroo cascade_chain cascade_tree --prompts heldout.json.gz --limit 10 \
        --max-new-tokens 256 --memory-budget 184MB --budget-covers weights --output correctness_streamed.json
    python -m evaluation.correctness --model-path NESTED --reference-model PUBLISHED --reference-answers published.jsonl \
        --methods nested nested_adaptive --prompts heldout.json.gz --memory-budget 170MB --budget-covers weights --output nested.json

The default model and its adapters, unless --model-path names others. Per prompt, transformers generates once, for all methods,
at the longest length; the answer at a shorter length is a prefix of it, which is what greedy decoding means. transformers cannot run
nested weights: --reference-model names the checkpoint that they were made of. With --reference-answers its answers are kept, for
comparisons under other budgets. Exit status 1 when anything differs. In half precision near ties may flip between one row and several
rows in a pass, so the comparison is offered in float32 and float64 only.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cats import CatsError, GenerationConfig, MemoryOptions, MethodConfig
from cats.checkpoint import DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.dtypes import HALVES, NEAR_TIES
from cats.records import sha256
from cats.settings import as_record
from cats.text import ModelText
from evaluation.chosen_model import ChosenModel, base_model, chosen_model
from evaluation.metrics import ratio
from evaluation.options import add_model_flags, chosen_memory
from evaluation.presets import PRESET_HELP, parse_presets, runnable_presets
from evaluation.processes import Processes, choose_device, own_share, start_processes
from evaluation.questions import ALIASES, BENCHES, Question, read_questions, resolve_bench, select_questions
from evaluation.record_file import Record, append_record, check_settings, read_records, write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings, weights_fingerprint
from evaluation.timing import environment
from evaluation.transformers_reference import Reference, check_reference, reference_place
from training.conversations import read_sharegpt


@dataclass(frozen=True)
class Difference:
    """The first token at which two answers part; a token is None where that answer has ended."""

    position: int
    expected: int | None
    actual: int | None


def first_difference(expected: Sequence[int], actual: Sequence[int]) -> Difference | None:
    """Where `actual` leaves `expected`, None where they are equal."""
    for position in range(max(len(expected), len(actual))):
        wanted = expected[position] if position < len(expected) else None
        got = actual[position] if position < len(actual) else None
        if wanted != got:
            return Difference(position, wanted, got)
    return None


def compare_prompt(
    subject: Subject,
    reference: Reference,
    prompt_ids: list[int],
    methods: dict[str, MethodConfig],
    lengths: Sequence[int],
    on_answer: Callable[[], object] = lambda: None,
) -> Record:
    """Every method at every length on one prompt.

    Args:
        on_answer: called when another answer is there, the reference's among them.

    Returns:
        how many comparisons, each one that differs, and per method the tokens and the passes of the longest answer, prefill left out.
    """
    room = subject.model.base.context - len(prompt_ids)
    if room < 1:
        return {"comparisons": 0, "skipped": True, "differences": [], "passes": {}}
    longest = reference.greedy(prompt_ids, min(max(lengths), room))
    on_answer()
    differences: list[dict[str, Any]] = []
    passes: dict[str, tuple[int, int]] = {}
    for label, method in methods.items():
        for length in lengths:
            answer = subject.answer(prompt_ids, method, GenerationConfig(max_new_tokens=length))
            on_answer()
            differing = first_difference(longest[:length], answer.ids)
            if differing is not None:
                gap = reference.gap([*prompt_ids, *longest[: differing.position]])
                differences.append({"method": label, "max_new_tokens": length, **dataclasses.asdict(differing), "logit_gap": gap})
            if length == max(lengths):
                committed = [trace.committed for trace in answer.traces if not trace.prefill]
                passes[label] = (sum(committed), len(committed))
    return {"comparisons": len(methods) * len(lengths), "skipped": False, "differences": differences, "passes": passes}


def prompts_file(prompts: str) -> Path:
    """The file of a bench, or the one that was named."""
    return resolve_bench(prompts).path if prompts in BENCHES or prompts in ALIASES else Path(prompts)


def read_prompts(prompts: str) -> list[Question]:
    """Questions of a bench, of a question file (.jsonl), or the opening turns of a ShareGPT file (.json, .json.gz)."""
    path = prompts_file(prompts)
    if path.suffix == ".jsonl":
        return read_questions(path)
    return [Question(place, "", (talk.turns[0].text,)) for place, talk in enumerate(read_sharegpt(prompts))]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.correctness", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--methods", nargs="+", metavar="METHOD", help=PRESET_HELP)
    which.add_argument("--all-methods", action="store_true", help="every name that has what it needs here")
    parser.add_argument("--prompts", required=True, help="a bench name, a question file (.jsonl) or a ShareGPT file (.json, .json.gz)")
    parser.add_argument("--max-new-tokens", type=int, nargs="+", default=[64], help="lengths to compare at (default: 64)")
    parser.add_argument("--limit", type=int, help="compare the first so many prompts (default: all)")
    theirs = "checkpoint that transformers runs (default: the same); nested weights need the one that they were made of"
    parser.add_argument("--reference-model", metavar="DIRECTORY", help=theirs)
    kept = "transformers' answers: what is there is not made again"
    parser.add_argument("--reference-answers", type=Path, metavar="FILE.jsonl", help=kept)
    parser.add_argument("--output", type=Path, help="result file (.json); the comparison can then be interrupted and taken up again")
    parser.set_defaults(dtype="float32")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Comparison:
    """A comparison that was checked as far as it can be without loading the model.

    Attributes:
        reference: the checkpoint that transformers runs.
        same_model: what shows that it is the same model.
    """

    args: argparse.Namespace
    methods: dict[str, MethodConfig]
    model: ChosenModel
    memory: MemoryOptions | None
    prompts: list[Question]
    text: ModelText
    records: Path
    reference: Path
    same_model: str

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides an outcome; a resumed comparison must have the same."""
        return subject_settings(self.args, self.model, self.memory, self.text) | {
            "methods": {label: as_record(method) for label, method in self.methods.items()},
            "max_new_tokens": self.args.max_new_tokens,
            "prompts": {"file": Path(self.args.prompts).name, "sha256": sha256(prompts_file(self.args.prompts))},
            "seed": None,
            **({} if self.args.reference_model is None else {"reference": weights_fingerprint(self.reference)}),
        }

    @property
    def settings_file(self) -> Path:
        """Beside the records."""
        return self.records.with_suffix(".settings.json")


def make_comparison(args: argparse.Namespace, folder: Path) -> Comparison:
    """Check everything that needs no weights; the first fault raises `CatsError`. Records go to `folder` where no output is asked for."""
    methods = runnable_presets(base_model(args.model_path)[1], args.coarse) if args.all_methods else parse_presets(args.methods)
    refuse_half(DTYPES.get(args.compute_dtype))
    for length in args.max_new_tokens:
        GenerationConfig(max_new_tokens=length)
    model = chosen_model(list(methods.values()), args)
    prompts = select_questions(read_prompts(args.prompts), 0, args.limit)
    records = (args.output or folder / "correctness.json").with_suffix(".records.jsonl")
    memory = chosen_memory(methods.values(), max(args.max_new_tokens), args)
    text, reference = load_text(model.directory, args.template), reference_place(args.reference_model, model.directory)
    with heartbeat(f"checking that {reference.name} is the same model"):
        same_model = check_reference(model.directory, reference, text)
    comparison = Comparison(args, methods, model, memory, prompts, text, records, reference, same_model)
    check_settings(comparison.settings_file, comparison.settings, records)
    return comparison


def refuse_half(compute: torch.dtype | None) -> None:
    """Raise `CatsError` where a difference would not be a fault."""
    if compute in HALVES:
        raise CatsError(f"{NEAR_TIES}; compare with --compute-dtype float32 or float64.")


def compare_all(comparison: Comparison, processes: Processes, device: torch.device) -> dict[str, str]:
    """One record per prompt that has none yet, shared among the processes; returns the dtypes of the arithmetic."""
    args, model, shown = comparison.args, comparison.model, processes.is_main_process
    with heartbeat(f"loading {model.name}", shown):
        subject = load_subject(
            model.directory, model.adapters, comparison.text, args.dtype, device, comparison.memory, args.compute_dtype
        )
        refuse_half(subject.model.base.dtype)
        reference = reference_of(comparison, subject)
    if args.ledger and shown:
        sys.stderr.write("\n".join(subject.model.base.source.report()) + "\n")
    done = {record["question_id"] for record in read_records(comparison.records)}
    waiting = [prompt for prompt in comparison.prompts if prompt.question_id not in done]
    processes.wait_for_everyone()
    if shown and not done:
        write_json(comparison.settings_file, {"settings": comparison.settings})
    mine = own_share(waiting, processes)
    answers = 1 + len(comparison.methods) * len(args.max_new_tokens)
    with live_bar(total=len(mine) * answers, desc=f"{len(mine)} prompts", unit="answer", disable=not shown) as bar:
        for place, prompt in enumerate(mine, start=1):
            prompt_ids = comparison.text.prompt_ids(prompt.turns[0])
            outcome = compare_prompt(subject, reference, prompt_ids, comparison.methods, args.max_new_tokens, bar.update)
            append_record(comparison.records, {"question_id": prompt.question_id, **outcome})
            bar.update(place * answers - bar.n)  # a prompt that fills the context has no answers
    processes.wait_for_everyone()
    return subject.arithmetic


def reference_of(comparison: Comparison, subject: Subject) -> Reference:
    """transformers with the same rounding, arithmetic and end tokens; loaded, unless all its answers are there."""
    base, args = subject.model.base, comparison.args
    ends = subject.text.end_token_ids
    reference = Reference(comparison.reference, base.weight_dtype, base.dtype, base.device, ends, args.reference_answers)
    prompts = [comparison.text.prompt_ids(prompt.turns[0]) for prompt in comparison.prompts]
    lengths = [min(max(args.max_new_tokens), base.context - len(prompt)) for prompt in prompts]
    if any(reference.knows(prompt, room) is None for prompt, room in zip(prompts, lengths, strict=True) if room > 0):
        _ = reference.model
    return reference


def result_of(comparison: Comparison, arithmetic: dict[str, str]) -> dict[str, Any]:
    """All records of the chosen prompts put together; accepted lengths are those of the longest answers."""
    chosen = {prompt.question_id for prompt in comparison.prompts}
    records = [record for record in read_records(comparison.records) if record["question_id"] in chosen]
    differences = [{"question_id": record["question_id"], **difference} for record in records for difference in record["differences"]]
    return {
        "prompts": len(records),
        "skipped_prompts": sum(record["skipped"] for record in records),
        "comparisons": sum(record["comparisons"] for record in records),
        "differences": len(differences),
        "first_differences": differences,
        "accepted_length": {label: accepted_length(label, records) for label in comparison.methods},
        "arithmetic": arithmetic,
        "reference": {"name": comparison.reference.resolve().name, "same_model": comparison.same_model},
        "settings": comparison.settings,
        "environment": environment(),
    }


def accepted_length(label: str, records: Sequence[Record]) -> float | None:
    """Tokens per target pass of one method over all prompts, prefill left out."""
    counts = [record["passes"][label] for record in records if label in record["passes"]]
    return ratio(sum(tokens for tokens, _ in counts), sum(passes for _, passes in counts))


def report(result: dict[str, Any]) -> str:
    """The outcome in words."""
    text = f"{result['comparisons']} comparisons on {result['prompts']} prompts ({result['skipped_prompts']} fill the context): "
    text += f"{result['differences']} differ from transformers' greedy answer\n"
    text += f"transformers ran {result['reference']['name']}: {result['reference']['same_model']}\n"
    for part in result["first_differences"][:10]:
        text += (
            f"  prompt {part['question_id']}, {part['method']}, {part['max_new_tokens']} tokens: position {part['position']}, "
            f"expected {part['expected']}, found {part['actual']}, logit gap {part['logit_gap']:.3g}\n"
        )
    return text


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Check, compare, report; exit status 1 when anything differs."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        comparison = make_comparison(args, Path(folder))
        processes, device = start_processes(choose_device(args.device))
        if processes.num_processes > 1 and args.output is None:
            raise CatsError("several processes meet in the result file; give --output.")
        arithmetic = compare_all(comparison, processes, device)
        if not processes.is_main_process:
            return
        result = result_of(comparison, arithmetic)
        if not result["comparisons"]:
            raise CatsError(f"every prompt of {args.prompts} fills the model's context, so nothing was compared; give shorter prompts.")
        if args.output is not None:
            write_json(args.output, result)
    sys.stdout.write(report(result))
    if result["differences"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
