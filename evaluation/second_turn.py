"""Seconds to the first token of a conversation's second turn, with the caches of the first turn kept and without.

    python -m evaluation.second_turn --limit 8 --output second_turn.json
    python -m evaluation.second_turn --memory-budget 184MB --budget-covers weights --flash-bandwidth 100MB/s --method cascade_chain

Each question is answered, and its second turn read twice, in turns: behind kept caches, which lack what is new, and from nothing. Both must
say the same token. Without --method, plain decoding.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cats
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.errors import CatsError
from evaluation.chosen_model import chosen_model
from evaluation.options import add_model_flags, chosen_memory
from evaluation.presets import PRESET_HELP, parse_preset
from evaluation.processes import choose_device
from evaluation.questions import Question, read_questions, resolve_bench, select_questions
from evaluation.record_file import write_json
from evaluation.subject import Subject, load_subject, load_text, subject_settings
from evaluation.timing import environment

WAYS = ("kept", "from_nothing")


def measure(subject: Subject, method: cats.MethodConfig, question: Question, tokens: int, kept_first: bool) -> dict[str, Any]:
    """One conversation: rows of its second prompt that were run, and seconds to the first token, both ways."""
    text, model, kept = subject.text, subject.model, cats.KeptCaches(subject.model)
    one, asked = cats.GenerationConfig(max_new_tokens=1), [{"role": "user", "content": question.turns[0]}]
    built = cats.build_method(method, model)
    first = cats.generate(model, text.prompt_ids(asked), built, cats.GenerationConfig(max_new_tokens=tokens), stop=text.stop(), kept=kept)
    asked += [{"role": "assistant", "content": text.answer(first.ids)}, {"role": "user", "content": question.turns[1]}]
    prompt, answers = text.prompt_ids(asked), {}
    for name in WAYS if kept_first else reversed(WAYS):
        answers[name] = cats.generate(model, prompt, built, one, kept=kept if name == "kept" else None)
    kept.close()
    if answers["kept"].ids != answers["from_nothing"].ids:
        raise RuntimeError(f"question {question.question_id}: kept caches change the first token of the second turn")
    reads = {name: {"rows": answer.traces[0].prompt_rows, "seconds": answer.traces[0].seconds.total} for name, answer in answers.items()}
    return {"question_id": question.question_id, "prompt": len(prompt), **reads}


def result_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians."""
    ways = {way: {key: statistics.median(record[way][key] for record in records) for key in ("rows", "seconds")} for way in WAYS}
    ratio = statistics.median(record["from_nothing"]["seconds"] / record["kept"]["seconds"] for record in records)
    return {"conversations": len(records), "prompt": statistics.median(record["prompt"] for record in records), **ways, "ratio": ratio}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.second_turn", description=__doc__.splitlines()[0], allow_abbrev=False)
    add_model_flags(parser)
    parser.add_argument("--method", default="autoregressive", metavar="METHOD", help=PRESET_HELP)
    parser.add_argument("--bench", default="mtbench", help="with questions of two turns (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of the first answer (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=8, help="conversations (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="result file (.json)")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Check, load, ask, report."""
    args = parse(argv)
    _, method = parse_preset(args.method)
    model = chosen_model([method], args)
    questions = [question for question in read_questions(resolve_bench(args.bench).path) if len(question.turns) > 1]
    if not questions:
        raise CatsError(f"no question of {args.bench} has a second turn; give --bench mtbench.")
    text, memory = load_text(model.directory, args.template), chosen_memory([method], args.max_new_tokens, args)
    with heartbeat(f"loading {model.name}"):
        subject = load_subject(model.directory, model.adapters, text, args.dtype, choose_device(args.device), memory, args.compute_dtype)
    records = [
        measure(subject, method, question, args.max_new_tokens, place % 2 == 0)
        for place, question in enumerate(live_bar(select_questions(questions, 0, args.limit), desc="conversations", unit="conversation"))
    ]
    result = result_of(records)
    if args.output is not None:
        settings = subject_settings(args, model, memory, text) | {"method": args.method, "max_new_tokens": args.max_new_tokens}
        write_json(args.output, {**result, "records": records, "settings": settings, "environment": environment()})
    ways = ", ".join(f"{way.replace('_', ' ')} {result[way]['seconds']:.3f} s ({result[way]['rows']:g} rows)" for way in WAYS)
    sys.stdout.write(f"second turn's first token, median of {len(records)}: {ways}; {result['ratio']:.2f} x sooner\n")


if __name__ == "__main__":
    main()
