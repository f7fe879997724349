"""The harness: questions in, answer records out, one by one, so that a run can be killed and taken up again.

Knows prompts, decoding functions and record files; knows no method and no model. A record is FastChat's answer format
with, per turn, what every step did:

    {"question_id": 81, "answer_id": "...", "model_id": "...", "tstamp": 1.7e9, "choices": [{"index": 0,
     "turns": ["text", ...], "ids": [[...], ...], "new_tokens": [...], "wall_time": [...], "finish": [...], "steps": [{...}, ...]}]}

or, with keep_going, {"question_id": 81, "model_id": "...", "tstamp": 1.7e9, "failed": "the cause"}, with a "traceback" where the cause
is a bug of ours.
"""

import hashlib
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import OutOfMemoryError

from cats import CatsError, Generation, GenerationConfig
from cats.cli.command import first_line
from cats.cli.progress import heartbeat, live_bar
from cats.text import Message
from cats.trace import StepTrace
from evaluation.processes import OneProcess, Processes, own_share
from evaluation.questions import Question, QuestionId
from evaluation.record_file import Record, append_record, read_records, rewrite_records

MENDABLE = (CatsError, MemoryError, OutOfMemoryError)
BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
WARM_UP_TOKENS = 32
Forward = Callable[[list[int], GenerationConfig], Generation]
STEP_VALUES = ("nodes", "accepted", "committed", "shallow_accepted", "layer_passes", "coarse_layer_passes", "bytes_streamed")


class Dialogue(Protocol):
    """Prompts and texts of a conversation; `cats.ModelText` is one."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids that ask for the answer to the last of `messages`."""
        ...

    def answer(self, ids: Sequence[int]) -> str:
        """Answer ids as text."""
        ...


class Watcher(Protocol):
    """Is told what is being answered; `evaluation.live_view.LiveView` is one."""

    def begin_turn(self, label: Mapping[str, Any]) -> None:
        """A turn is about to be answered; the label has its model_id, run, question_id and turn."""
        ...

    def end_turn(self, generation: Generation) -> None:
        """It is answered."""
        ...


@dataclass(frozen=True)
class Contender:
    """One way of decoding under evaluation, and the file of its answers."""

    model_id: str
    forward: Forward
    answers: Path


@dataclass(frozen=True)
class Asking:
    """How every question of a run is asked."""

    dialogue: Dialogue
    config: GenerationConfig
    seed: int = 0
    run: int = 0
    keep_going: bool = False
    watcher: Watcher | None = None
    warm_up: bool = True


def run_eval(
    contenders: Sequence[Contender],
    questions: Sequence[Question],
    asking: Asking,
    processes: Processes | None = None,
    on_start: Callable[[], object] | None = None,
) -> None:
    """Ask every contender every question that its file has no answer to, then sort and clean the files.

    Contenders take turns question by question, and in the order of turns, so that noise of the machine hits all alike.
    The questions are shared among the processes of `accelerate launch`; with `asking.warm_up` one question is asked first without
    being recorded; `on_start` is called in the main process after that and before the first answer. A question that
    fails raises `CatsError` with its id and cause (a bug is raised as it stands, with the id as a note), or is recorded as failed if
    `asking.keep_going`; failed questions are asked again by the next run.
    """
    processes = processes or OneProcess()
    missing = missing_answers(contenders, questions)
    processes.wait_for_everyone()
    mine = own_share(missing, processes)
    if mine and asking.warm_up:
        with heartbeat("warm-up", processes.is_main_process):
            warm_up(contenders, mine[0][0], asking)
    processes.wait_for_everyone()
    if missing and on_start is not None and processes.is_main_process:
        on_start()
    processes.wait_for_everyone()
    with live_bar(mine, desc=contenders[0].model_id, unit="question", disable=not processes.is_main_process) as bar:
        for place, (question, waiting) in enumerate(bar):
            for contender in waiting if place % 2 == 0 else reversed(waiting):
                append_record(contender.answers, ask(contender, question, asking))
    processes.wait_for_everyone()
    if processes.is_main_process:
        for contender in contenders:
            reorg_answer_file(contender.answers)
    processes.wait_for_everyone()


def missing_answers(contenders: Sequence[Contender], questions: Sequence[Question]) -> list[tuple[Question, list[Contender]]]:
    """Questions that some contender has not answered yet, each with those contenders."""
    done = {id(contender): answered_ids(contender.answers) for contender in contenders}
    waiting = [
        (question, [contender for contender in contenders if question.question_id not in done[id(contender)]]) for question in questions
    ]
    return [(question, left) for question, left in waiting if left]


def answered_ids(path: Path) -> set[QuestionId]:
    """Ids of the questions that an answer file holds an answer to; failed ones are not among them."""
    return {record["question_id"] for record in read_records(path) if "failed" not in record}


def warm_up(contenders: Sequence[Contender], question: Question, asking: Asking) -> None:
    """Ask for a few tokens, unrecorded: first-call costs fall here, and so do faults of the set-up."""
    config = replace(asking.config, max_new_tokens=min(WARM_UP_TOKENS, asking.config.max_new_tokens))
    short = replace(asking, config=config, watcher=None)
    for contender in contenders:
        ask(contender, replace(question, turns=question.turns[:1]), short)


def ask(contender: Contender, question: Question, asking: Asking) -> Record:
    """All turns of one question to one contender; every turn follows on the answers before it."""
    stamp: Record = {"question_id": question.question_id, "model_id": contender.model_id, "tstamp": time.time()}
    answers: list[str] = []
    turns: list[tuple[Generation, float]] = []
    try:
        for turn in range(len(question.turns)):
            prompt_ids = asking.dialogue.prompt_ids(conversation(question.turns[: turn + 1], answers))
            config = replace(asking.config, seed=question_seed(asking.seed, asking.run, question.question_id, turn))
            if asking.watcher is not None:
                asking.watcher.begin_turn(turn_label(contender, question, asking, turn))
            begin = time.perf_counter()
            generation = contender.forward(prompt_ids, config)
            turns.append((generation, time.perf_counter() - begin))
            if asking.watcher is not None:
                asking.watcher.end_turn(generation)
            answers.append(asking.dialogue.answer(generation.ids))
    except MENDABLE as error:
        cause = first_line(error) or type(error).__name__
        if not asking.keep_going:
            raise CatsError(f"question {question.question_id!r} failed with {contender.model_id}: {cause}") from error
        return {**stamp, "failed": cause}
    except BUGS as error:
        if not asking.keep_going:
            error.add_note(f"question {question.question_id!r} with {contender.model_id}")
            raise
        return {**stamp, "failed": f"{type(error).__name__}: {first_line(error)}", "traceback": traceback.format_exc()}
    return {**stamp, "answer_id": uuid.uuid4().hex, "choices": [choice_record(turns, answers)]}


def conversation(turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """Questions and the answers to all but the last of them, as messages."""
    spoken = [text for place, turn in enumerate(turns) for text in (turn, *answers[place : place + 1])]
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(spoken)]


def turn_label(contender: Contender, question: Question, asking: Asking, turn: int) -> Record:
    """What a watcher is told of a turn."""
    return {"model_id": contender.model_id, "run": asking.run, "question_id": question.question_id, "turn": turn}


def question_seed(seed: int, run: int, question_id: QuestionId, turn: int) -> int:
    """A seed of its own for every turn of every question and run, whatever the order in which they are asked."""
    digest = hashlib.sha256(f"{seed}/{run}/{question_id}/{turn}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def choice_record(turns: Sequence[tuple[Generation, float]], answers: Sequence[str]) -> dict[str, Any]:
    """FastChat's choice, with per-turn lists."""
    return {
        "index": 0,
        "turns": list(answers),
        "ids": [generation.ids for generation, _ in turns],
        "new_tokens": [len(generation.ids) for generation, _ in turns],
        "wall_time": [seconds for _, seconds in turns],
        "finish": [generation.finish for generation, _ in turns],
        "steps": [steps_record(generation.traces) for generation, _ in turns],
    }


def steps_record(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """What the steps of one turn did, as lists over the steps after the prefill; kinds and confusion counts are summed."""
    cycles = [trace for trace in traces if not trace.prefill]
    stages = dict.fromkeys(stage for trace in cycles for stage in trace.seconds)
    verdicts = [trace.confusion for trace in cycles if trace.confusion is not None]
    return {
        **{name: [getattr(trace, name) for trace in cycles] for name in STEP_VALUES},
        "accepted_kinds": dict(Counter(kind for trace in cycles for kind in trace.accepted_kinds)),
        "confusion": {name: sum(getattr(verdict, name) for verdict in verdicts) for name in ("tp", "fp", "fn", "tn")} if verdicts else None,
        "seconds": {stage: [round(trace.seconds[stage], 6) for trace in cycles] for stage in stages},
        "prefill_seconds": sum(trace.seconds.total for trace in traces if trace.prefill),
    }


def reorg_answer_file(path: str | Path) -> None:
    """Sort an answer file by question id and keep one record of each, the last one that did not fail; atomic."""
    path = Path(path)
    if not path.exists():
        return
    kept: dict[QuestionId, Record] = {}
    for record in read_records(path):
        if "failed" not in record or "failed" in kept.get(record["question_id"], record):
            kept[record["question_id"]] = record
    rewrite_records(path, sorted(kept.values(), key=lambda record: sort_key(record["question_id"])))


def sort_key(question_id: QuestionId) -> tuple[bool, int, str]:
    """Numbers first, in their order, then names."""
    return (isinstance(question_id, str), question_id if isinstance(question_id, int) else 0, str(question_id))
