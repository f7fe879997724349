"""Grades answers by a judge: every turn from 1 to 10, by any endpoint that speaks OpenAI's protocol.

    python -m evaluation.judge data/mt_bench/ID/0.jsonl --endpoint https://api.openai.com/v1 --judge-model NAME --dry-run
    python -m evaluation.judge data/mt_bench/ID/0.jsonl --endpoint http://localhost:8000/v1 --judge-model NAME --no-api-key

Says first what it will ask. Every judgement is kept at once beside the answers, so the same command goes on after an interruption and
asks again for what failed; where some failed it ends with status 2 and names them. The prompt is our own (evaluation/judging.py), so grades
compare with each other and with no published ones. Intervals are 90 %, by bootstrap over the questions.
"""

import argparse
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.config import require
from cats.errors import CatsError
from cats.records import sha256
from evaluation.answer_files import Answers, find_questions, read_answers
from evaluation.judge_endpoint import Endpoint, Patience, UnansweredError
from evaluation.judging import REMINDER, Request, rating_in, requests_for
from evaluation.metrics import mean, ratio_interval
from evaluation.record_file import Record, append_record, check_settings, read_records, write_json

LOCAL_KEY = "none"
"""Sent where the endpoint wants no key; the client insists on one."""


@dataclass(frozen=True)
class Judging:
    """Answers to be judged, and the files of what is known of them."""

    answers: Answers
    requests: list[Request]
    output: Path
    settings: dict[str, Any]
    made_of: dict[str, Any]

    @property
    def records(self) -> Path:
        """One line a judgement, or a failure."""
        return self.output.with_suffix(".records.jsonl")

    @property
    def settings_file(self) -> Path:
        """What the judgements were made with."""
        return self.output.with_suffix(".settings.json")

    def judged(self) -> dict[tuple[Any, ...], Record]:
        """The judgements of these very requests, by `key_of`."""
        known = {(record["question_id"], record["turn"], record["request"]): record for record in kept(self.records)}
        return {key: known[key] for request in self.requests if (key := key_of(request)) in known}


def kept(path: Path) -> list[Record]:
    """Judgements of a records file, failures left out."""
    return [record for record in read_records(path) if "failed" not in record]


def key_of(request: Request) -> tuple[Any, ...]:
    """What a judgement is found by."""
    return request.question_id, request.turn, request.fingerprint


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.judge", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("answers", type=Path, metavar="ANSWERS.jsonl", help="written by evaluation/CATS_dynamic.py")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="root of the protocol, like https://api.openai.com/v1")
    parser.add_argument("--judge-model", required=True, metavar="NAME", help="as the endpoint calls it")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key (default: %(default)s)")
    key.add_argument("--no-api-key", action="store_true", help="the endpoint wants none")
    asked = "their questions, a bench or a file (default: what the settings beside them name)"
    parser.add_argument("--questions", metavar="FILE", help=asked)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="result; judgements lie beside it (default: ANSWERS.judge.json)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be asked, and what it holds")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at once (default: %(default)s)")
    default = Patience()
    parser.add_argument("--attempts", type=int, default=default.attempts, help="times that a request is sent (default: %(default)s)")
    parser.add_argument("--backoff", type=float, default=default.first, help="seconds before the next, then doubled (default: %(default)s)")
    parser.add_argument("--request-timeout", type=float, default=default.timeout, help="seconds for an answer (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a judgement; 0 sends no limit (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the judge; below 0 sends none (default: %(default)s)")
    return parser.parse_args(argv)


def make_judging(args: argparse.Namespace) -> Judging:
    """Check everything that needs no endpoint; the first fault raises `CatsError`."""
    require(args.endpoint.startswith(("http://", "https://")), f"--endpoint {args.endpoint!r} is no address; it begins with http or https.")
    for name, valid in (
        ("concurrency", args.concurrency >= 1),
        ("attempts", args.attempts >= 1),
        ("backoff", args.backoff >= 0),
        ("request_timeout", args.request_timeout > 0),
        ("max_tokens", args.max_tokens >= 0),
    ):
        require(valid, f"--{name.replace('_', '-')} is {getattr(args, name)}, which is too small.")
    answers = read_answers(args.answers)
    source, questions = find_questions(answers, args.questions)
    output = args.output or args.answers.with_suffix(".judge.json")
    settings = {"judge": args.judge_model, "endpoint": args.endpoint, **options_of(args)}
    made_of = {"model_id": answers.model_id, "answers": sha256(args.answers), "questions": sha256(source)}
    judging = Judging(answers, requests_for(answers, questions), output, settings, made_of)
    check_settings(judging.settings_file, settings, judging.records)
    return judging


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """What every request says beside its words."""
    options = {} if args.max_tokens == 0 else {"max_tokens": args.max_tokens}
    return options | ({} if args.temperature < 0 else {"temperature": args.temperature})


def cost_of(waiting: Sequence[Request], judging: Judging, args: argparse.Namespace) -> str:
    """What the command is about to ask for."""
    tokens, done = sum(request.tokens for request in waiting), len(judging.requests) - len(waiting)
    out = f"at most {len(waiting) * args.max_tokens:,} out" if args.max_tokens else "out without a limit"
    text = f"{len(waiting)} requests to {args.judge_model} at {args.endpoint}, about {tokens:,} tokens in, {out} ({done} judged already)"
    return f"{text}; a grade that cannot be read is asked for once more\n"


def key_from(args: argparse.Namespace) -> str:
    """The key that the endpoint wants; `CatsError` where it is not there."""
    if args.no_api_key:
        return LOCAL_KEY
    key = os.environ.get(args.api_key_env, "")
    require(bool(key), f"the variable {args.api_key_env} holds no key; set it, or give --no-api-key where the endpoint wants none.")
    return key


def judge(request: Request, endpoint: Endpoint, records: Path) -> None:
    """Ask for one grade and keep it, or why there is none."""
    key: Record = dict(zip(("question_id", "turn", "request"), key_of(request), strict=True))
    try:
        reply = endpoint.ask(request.messages)
        texts, tokens = [reply.text], [reply.tokens_in, reply.tokens_out]
        if rating_in(reply.text) is None:
            spoken = [{"role": "assistant", "content": reply.text}, {"role": "user", "content": REMINDER}]
            reply = endpoint.ask([*request.messages, *spoken])
            texts, tokens = [*texts, reply.text], [tokens[0] + reply.tokens_in, tokens[1] + reply.tokens_out]
        rating = rating_in(reply.text)
        if rating is None:
            raise UnansweredError(f"no grade can be read in {reply.text[-80:]!r}, asked twice")
    except UnansweredError as error:
        append_record(records, {**key, "failed": str(error)})
        return
    append_record(records, {**key, "rating": rating, "judgements": texts, "tokens_in": tokens[0], "tokens_out": tokens[1]})


def judge_all(waiting: Sequence[Request], judging: Judging, args: argparse.Namespace) -> None:
    """All requests, several at once. Interrupted, it starts no other, and keeps the judgements of those that are on their way."""
    stop = threading.Event()
    patience = Patience(args.attempts, args.backoff, args.request_timeout)
    endpoint = Endpoint(args.endpoint, args.judge_model, key_from(args), options_of(args), patience, stop)
    if not judging.records.exists():
        write_json(judging.settings_file, {"settings": judging.settings})
    threads = ThreadPoolExecutor(args.concurrency)
    try:
        futures = [threads.submit(judge, request, endpoint, judging.records) for request in waiting]
        with live_bar(total=len(waiting), desc="judgements", unit="judgement") as bar:
            for future in as_completed(futures):
                future.result()
                bar.update()
    finally:
        stop.set()
        threads.shutdown(cancel_futures=True)


def result_of(judging: Judging) -> dict[str, Any]:
    """Means over turns and categories, and what is missing."""
    judged = judging.judged()
    rated = [(request, judged[key]["rating"]) for request in judging.requests if (key := key_of(request)) in judged]
    turns = sorted({request.turn for request in judging.requests})
    categories = dict.fromkeys(request.category for request in judging.requests)
    by_question: dict[Any, list[int]] = {}
    for request, rating in rated:
        by_question.setdefault(request.question_id, []).append(rating)
    return {
        "score": mean([rating for _, rating in rated]),
        "interval": ratio_interval([[(sum(ratings), len(ratings)) for ratings in by_question.values()]]),
        "turns": {str(turn): mean([rating for request, rating in rated if request.turn == turn]) for turn in turns},
        "categories": {name: mean([rating for request, rating in rated if request.category == name]) for name in categories},
        "judgements": len(rated),
        "failed_answers": judging.answers.failed,
        "tokens": {name: sum(record[name] for record in judged.values()) for name in ("tokens_in", "tokens_out")},
        "missing": missing_of(judging, judged),
        "items": [{"question_id": request.question_id, "turn": request.turn, "rating": rating} for request, rating in rated],
        "settings": judging.settings,
        "made_of": judging.made_of,
    }


def missing_of(judging: Judging, judged: Mapping[tuple[Any, ...], Record]) -> list[Record]:
    """The requests without a judgement, each with the cause that was met last."""
    causes = {(record["question_id"], record["turn"]): record["failed"] for record in read_records(judging.records) if "failed" in record}
    left = [request for request in judging.requests if key_of(request) not in judged]
    missing = [(request, causes.get((request.question_id, request.turn), "not asked")) for request in left]
    return [{"question_id": request.question_id, "turn": request.turn, "cause": cause} for request, cause in missing]


def report(result: Mapping[str, Any]) -> str:
    """The outcome in a few words."""
    if result["score"] is None:
        return "no judgement\n"
    (low, high), turns = result["interval"], result["turns"].items()
    by_turn = ", ".join(f"turn {turn}: {score:.2f}" for turn, score in turns if score is not None)
    return f"{result['settings']['judge']}: {result['score']:.2f} ({low:.2f} to {high:.2f}), {by_turn}; {result['judgements']} judgements\n"


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Say the cost, ask, write, report; missing judgements end with status 2."""
    args = parse(argv)
    judging = make_judging(args)
    judged = judging.judged()
    waiting = [request for request in judging.requests if key_of(request) not in judged]
    said = cost_of(waiting, judging, args)
    if args.dry_run:
        sys.stdout.write(said)
        return
    sys.stderr.write(said)
    if waiting:
        judge_all(waiting, judging, args)
    result = result_of(judging)
    from evaluation.timing import environment  # takes seconds to load, with torch, and --help should not

    write_json(judging.output, {**result, "environment": environment()})
    sys.stdout.write(report(result))
    if result["missing"]:
        first, count = result["missing"][0], len(result["missing"])
        cause = f"question {first['question_id']!r}, turn {first['turn']}: {first['cause']}"
        raise CatsError(f"{count} of {len(judging.requests)} judgements are missing ({cause}); the same command asks for them again.")


if __name__ == "__main__":
    main()
