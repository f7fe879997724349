"""How many answers are right: GSM8K by exact match of the final number, HumanEval by running the tests (pass@1).

    python -m evaluation.quality gsm8k data/gsm8k/ID/0.jsonl [--references test.jsonl]
    python -m evaluation.quality humaneval data/humaneval/ID/0.jsonl --tests HumanEval.jsonl.gz

Answers are files of evaluation/CATS_dynamic.py. HumanEval runs programs that a model wrote, in a sandbox (docs/quality.md says what it
holds back, and what not). Each writes a JSON file beside the answers. Intervals are 90 %, by bootstrap over the questions.
"""

import argparse
import gzip
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.config import require
from cats.errors import CatsError
from cats.records import sha256
from evaluation.answer_files import Answers, find_questions, read_answers
from evaluation.candidate_code import program_of
from evaluation.final_number import final_number
from evaluation.metrics import ratio, ratio_interval
from evaluation.questions import Question, QuestionId
from evaluation.record_file import Record, write_json
from evaluation.sandbox import ERROR, PASSED, TIMEOUT, WRONG, Sandbox, check_sandbox, run_program

NO_CODE = "no code"
REASONS = (PASSED, WRONG, ERROR, TIMEOUT, NO_CODE)
Rows = list[tuple[str, dict[str, Any]]]


def read_rows(path: Path) -> Rows:
    """The JSON objects of a file, one a line (`.gz`: unpacked), each with the words for where it stands; `CatsError` names a bad line."""
    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}: {error}; give a file with one JSON object per line.") from error
    rows: Rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append((f"line {number} of {path}", parsed(line, f"line {number} of {path}")))
    require(bool(rows), f"{path} is empty; give a file with one JSON object per line.")
    return rows


def parsed(line: str, where: str) -> dict[str, Any]:
    """One JSON object."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CatsError(f"{where} is not JSON ({error.msg}); mend or remove the line.") from error
    if not isinstance(row, dict):
        raise CatsError(f"{where} is a JSON {type(row).__name__}, not an object.")
    return row


def fields_of(row: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, ...]:
    """Texts of a row, none of them missing."""
    for name in names:
        if not isinstance(row.get(name), str):
            raise CatsError(f"{where} has no {name!r} that is a text; it needs {', '.join(names)}.")
    return tuple(row[name] for name in names)


def expected_numbers(questions: Mapping[QuestionId, Question], source: Path, references: Path | None) -> dict[QuestionId, Fraction]:
    """The right numbers by question: the question file's references, or those of a file in GSM8K's layout, found by the text."""
    if references is None:
        given = {place: question.reference[-1] for place, question in questions.items() if question.reference and question.reference[-1]}
        require(bool(given), f"{source} holds no 'reference'; give GSM8K's own file (lines with 'question' and 'answer') by --references.")
        return {place: number_of(text, f"the reference of question {place!r} in {source}") for place, text in given.items()}
    answers: dict[str, Fraction] = {}
    for where, row in read_rows(references):
        question, answer = fields_of(row, ("question", "answer"), where)
        answers[spaced(question)] = number_of(answer, where)
    matched = {place: reference_in(spaced(question.turns[-1]), answers) for place, question in questions.items()}
    expected = {place: number for place, number in matched.items() if number is not None}
    require(bool(expected), f"{references} answers none of the questions in {source}; give the references of this set.")
    return expected


def reference_in(asked: str, answers: Mapping[str, Fraction]) -> Fraction | None:
    """The answer to the known question that a prompt ends with; worked examples before it do not count."""
    places = [(asked.rfind(question), len(question), answer) for question, answer in answers.items() if question in asked]
    return max(places)[2] if places else None


def spaced(text: str) -> str:
    """With every stretch of white space as one space."""
    return " ".join(text.split())


def number_of(text: str, where: str) -> Fraction:
    """The number of a reference."""
    number = final_number(text)
    if number is None:
        raise CatsError(f"{where} has no number in {text[-60:]!r}; a reference ends in '#### N'.")
    return number


def grade_numbers(answers: Answers, expected: Mapping[QuestionId, Fraction]) -> dict[str, Any]:
    """Exact match of the answers to questions with a known number."""
    items: list[Record] = []
    for place, turns in answers.turns.items():
        if place in expected:
            number = final_number(turns[-1])
            about = {"question_id": place, "actual": None if number is None else str(number), "expected": str(expected[place])}
            items.append(about | {"right": number == expected[place]})
    require(bool(items), f"none of the {len(answers.turns)} answers in {answers.path} has a reference; give those of its questions.")
    counts = {"no_number": sum(item["actual"] is None for item in items), "without_reference": len(answers.turns) - len(items)}
    return graded("exact_match", items, answers) | counts | {"items": items}


def graded(name: str, items: Sequence[Record], answers: Answers) -> dict[str, Any]:
    """The share of right answers, its interval, and what else to know of them."""
    right = sum(item["right"] for item in items)
    return {
        name: ratio(right, len(items)),
        "interval": ratio_interval([[(int(item["right"]), 1) for item in items]]),
        "right": right,
        "answers": len(items),
        "cut_at_length": sum(item["question_id"] in answers.cut for item in items),
        "failed": answers.failed,
    }


def read_tests(path: Path) -> dict[str, tuple[str, str, str]]:
    """Prompt, test and entry point by task id, from a file in HumanEval's layout."""
    tests: dict[str, tuple[str, str, str]] = {}
    for where, row in read_rows(path):
        task, prompt, test, entry_point = fields_of(row, ("task_id", "prompt", "test", "entry_point"), where)
        if not entry_point.isidentifier():
            raise CatsError(f"{where} has the entry_point {entry_point!r}, which is no name of a function.")
        tests[task] = prompt, test, entry_point
    return tests


def grade_programs(
    answers: Answers, questions: Mapping[QuestionId, Question], tests: Mapping[str, tuple[str, str, str]], sandbox: Sandbox
) -> dict[str, Any]:
    """pass@1 of the answers to questions with tests."""
    tested = [place for place in answers.turns if questions[place].task_id in tests]
    require(bool(tested), f"none of the answers in {answers.path} has tests: no 'task_id' of their questions is among those of --tests.")
    items: list[Record] = []
    for place in live_bar(tested, desc="programs", unit="program"):
        prompt, test, entry_point = tests[questions[place].task_id]
        program = program_of(answers.turns[place][-1], prompt, entry_point)
        outcome, detail = NO_CODE, ""
        if program is not None:
            ended = run_program(program, test, entry_point, sandbox)
            outcome, detail = ended.kind, ended.detail
        about = {"question_id": place, "task_id": questions[place].task_id, "outcome": outcome, "detail": detail}
        items.append(about | {"right": outcome == PASSED})
    counted = Counter(item["outcome"] for item in items)
    counts = {"outcomes": {reason: counted[reason] for reason in REASONS}, "without_tests": len(answers.turns) - len(items)}
    return graded("pass_at_1", items, answers) | counts | {"items": items}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.quality", description=__doc__.splitlines()[0], allow_abbrev=False)
    benches = parser.add_subparsers(dest="bench", required=True, metavar="gsm8k|humaneval", parser_class=CommandParser)
    numbers = benches.add_parser("gsm8k", help="exact match of the final number", allow_abbrev=False)
    own = "GSM8K's own file, lines with 'question' and 'answer' (default: the question file's references)"
    numbers.add_argument("--references", type=Path, metavar="FILE", help=own)
    programs = benches.add_parser("humaneval", help="pass@1, by running what the model wrote", allow_abbrev=False)
    layout = "HumanEval's own file (.jsonl, .jsonl.gz): task_id, prompt, test, entry_point"
    programs.add_argument("--tests", type=Path, metavar="FILE", required=True, help=layout)
    programs.add_argument("--timeout", type=float, default=Sandbox().seconds, metavar="SECONDS", help="of a program (default: %(default)s)")
    programs.add_argument("--memory-mb", type=int, default=Sandbox().memory >> 20, help="of a program, in MiB (default: %(default)s)")
    programs.add_argument("--allow-network", action="store_true", help="run programs of a model where they can reach the network")
    programs.add_argument("--allow-writes", action="store_true", help="run them where they could write to your files")
    for bench in (numbers, programs):
        bench.add_argument("answers", type=Path, metavar="ANSWERS.jsonl", help="written by evaluation/CATS_dynamic.py")
        asked = "their questions, a bench or a file (default: what the settings beside them name)"
        bench.add_argument("--questions", metavar="FILE", help=asked)
        bench.add_argument("--output", type=Path, metavar="FILE.json", help="result (default: ANSWERS.<bench>.json)")
    return parser.parse_args(argv)


def grade(args: argparse.Namespace) -> dict[str, Any]:
    """What the command found, without what it was made with."""
    answers = read_answers(args.answers)
    source, questions = find_questions(answers, args.questions)
    if args.bench == "gsm8k":
        grades = grade_numbers(answers, expected_numbers(questions, source, args.references))
        extra = args.references and {"references": sha256(args.references)}
    else:
        require(args.timeout > 0, f"--timeout is {args.timeout}; it must be above 0.")
        require(args.memory_mb >= 64, f"--memory-mb is {args.memory_mb}; Python needs at least 64.")
        sandbox = Sandbox(args.timeout, args.memory_mb << 20, allow_network=args.allow_network, allow_writes=args.allow_writes)
        tests, walls = read_tests(args.tests), check_sandbox(sandbox)
        grades = grade_programs(answers, questions, tests, sandbox)
        extra = {"tests": sha256(args.tests), "sandbox": {"seconds": args.timeout, "memory_mb": args.memory_mb, **walls}}
    made_of = {"model_id": answers.model_id, "answers": sha256(args.answers), "questions": sha256(source), **(extra or {})}
    return {"bench": args.bench, **grades, "made_of": made_of}


def report(grades: Mapping[str, Any]) -> str:
    """The outcome in a few words."""
    name, title = ("exact_match", "exact match") if grades["bench"] == "gsm8k" else ("pass_at_1", "pass@1")
    low, high = grades["interval"]
    text = f"{title} {grades[name]:.1%} ({low:.1%} to {high:.1%}), {grades['right']} of {grades['answers']}"
    if grades["bench"] == "gsm8k":
        parts = [f"{grades['no_number']} without a number", f"{grades['without_reference']} without a reference, not counted"]
    else:
        parts = [f"{grades['outcomes'][reason]} {reason}" for reason in REASONS[1:]]
        parts += [f"{grades['without_tests']} without tests, not counted"]
    parts += [f"{grades['cut_at_length']} cut at their length", f"{grades['failed']} questions failed to be answered, not counted"]
    return f"{text}: {', '.join(parts)}\n"


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Read, grade, write, report."""
    args = parse(argv)
    grades = grade(args)
    from evaluation.timing import environment  # takes seconds to load, with torch, and --help should not

    output = args.output or args.answers.with_suffix(f".{args.bench}.json")
    write_json(output, {**grades, "environment": environment()})
    sys.stdout.write(report(grades))


if __name__ == "__main__":
    main()
