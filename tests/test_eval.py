"""The harness with scripted answers: resuming after a kill, torn lines, failing questions, sharding, several contenders."""

import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cats import CatsError, Generation, GenerationConfig
from cats.text import Message
from cats.trace import Confusion, StageSeconds, StepTrace
from evaluation import record_file
from evaluation.eval import Asking, Contender, Forward, question_seed, reorg_answer_file, run_eval
from evaluation.questions import Question
from evaluation.record_file import append_record, check_settings, read_records, write_json

QUESTIONS = [Question(10, "x", ("ten",)), Question(2, "x", ("two", "more")), Question(7, "x", ("seven",)), Question(5, "x", ("five",))]
PREFILL = StepTrace(prefill=True, nodes=1, accepted=0, committed=1, layer_passes=6)
CYCLE = StepTrace(False, 4, 1, 2, ("trunk",), 1, Confusion(tp=1, fn=1), 9, 4096, StageSeconds(stream_wait=0.5))


class Letters:
    """A dialogue whose ids are characters."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        parts = [message["content"] for role in ("user", "assistant") for message in messages if message["role"] == role]
        return [ord(letter) for letter in "|".join(parts)]

    def answer(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class Scripted:
    """Answers the prompt's first letter thrice; keeps what it was asked; may fail or be interrupted at a prompt."""

    fails_at: str | None = None
    error: BaseException = field(default_factory=lambda: RuntimeError("out of memory\nby 3 GB"))
    asked: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def __call__(self, prompt_ids: list[int], config: GenerationConfig) -> Generation:
        prompt = "".join(map(chr, prompt_ids))
        self.asked.append(prompt)
        self.seeds.append(config.seed)
        if prompt == self.fails_at:
            raise self.error
        return Generation([prompt_ids[0]] * 3, "length", [PREFILL, CYCLE])


def run(folder: Path, forward: Forward, questions: Sequence[Question] = QUESTIONS, keep_going: bool = False) -> Path:
    answers = folder / "0.jsonl"
    run_eval([Contender("scripted", forward, answers)], questions, Asking(Letters(), GenerationConfig(), keep_going=keep_going))
    return answers


def ids_of(path: Path) -> list[object]:
    return [record["question_id"] for record in read_records(path)]


def test_records_are_fastchats_with_what_each_turn_did(tmp_path: Path) -> None:
    answers = run(tmp_path, Scripted())
    records = read_records(answers)
    assert [record["question_id"] for record in records] == [2, 5, 7, 10]
    choice = records[0]["choices"][0]
    assert choice["turns"] == ["ttt", "ttt"]
    assert choice["new_tokens"] == [3, 3]
    assert choice["finish"] == ["length", "length"]
    assert choice["steps"][0]["committed"] == [2]
    assert choice["steps"][0]["accepted_kinds"] == {"trunk": 1}
    assert choice["steps"][0]["confusion"] == {"tp": 1, "fp": 0, "fn": 1, "tn": 0}
    assert choice["steps"][0]["layer_passes"] == [9]
    assert choice["steps"][0]["bytes_streamed"] == [4096]
    assert choice["steps"][0]["seconds"]["stream_wait"] == [0.5]
    assert records[0]["model_id"] == "scripted"
    assert len({record["answer_id"] for record in records}) == 4


def test_a_turn_follows_on_the_answer_before_it(tmp_path: Path) -> None:
    forward = Scripted()
    run(tmp_path, forward)
    assert "two|more|ttt" in forward.asked


def test_the_first_question_warms_up_unrecorded(tmp_path: Path) -> None:
    forward = Scripted()
    run(tmp_path, forward)
    assert forward.asked == ["ten", "ten", "two", "two|more|ttt", "seven", "five"]


def test_every_turn_has_a_seed_of_its_own_whatever_the_order(tmp_path: Path) -> None:
    forward, backward = Scripted(), Scripted()
    run(tmp_path, forward)
    (tmp_path / "0.jsonl").unlink()
    run(tmp_path, backward, QUESTIONS[::-1])
    assert len(set(forward.seeds[1:])) == 5
    assert dict(zip(forward.asked, forward.seeds, strict=True)) == dict(zip(backward.asked, backward.seeds, strict=True))
    assert question_seed(0, 0, 1, 0) != question_seed(0, 1, 1, 0) != question_seed(1, 0, 1, 0)


def test_an_interrupt_keeps_finished_answers_and_the_next_run_asks_only_the_rest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Scripted("seven", KeyboardInterrupt()))
    assert ids_of(tmp_path / "0.jsonl") == [10, 2]
    second = Scripted()
    answers = run(tmp_path, second)
    assert second.asked == ["seven", "seven", "five"]
    assert ids_of(answers) == [2, 5, 7, 10]
    third = Scripted()
    run(tmp_path, third)
    assert third.asked == []


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_torn_last_line_is_asked_again(tmp_path: Path, cut: int) -> None:
    answers = run(tmp_path, Scripted(), QUESTIONS[:2])
    whole = answers.read_bytes()
    answers.write_bytes(whole[:-cut])
    kept = ids_of(answers)
    second = Scripted()
    run(tmp_path, second)
    assert kept == [2]
    assert "ten" in second.asked
    assert "two" not in second.asked
    assert ids_of(answers) == [2, 5, 7, 10]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    answers = run(tmp_path, Scripted(), QUESTIONS[:2])
    answers.write_bytes(b"{]\n" + answers.read_bytes())
    with pytest.raises(CatsError, match=r"line 1 of .* is not a JSON record"):
        run(tmp_path, Scripted())


def test_a_failing_question_stops_the_run_with_its_id_and_cause(tmp_path: Path) -> None:
    with pytest.raises(CatsError, match=r"question 7 failed with scripted: the prompt is too long$"):
        run(tmp_path, Scripted("seven", CatsError("the prompt is too long")))
    assert ids_of(tmp_path / "0.jsonl") == [10, 2]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), IndexError("list index out of range"), TypeError("no"), KeyError("x")])
def test_a_bug_is_not_reported_as_the_users_fault(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        run(tmp_path, Scripted("seven", error))
    assert raised.value is error
    assert raised.value.__notes__ == ["question 7 with scripted"]
    assert ids_of(tmp_path / "0.jsonl") == [10, 2]


def test_a_bug_that_a_run_goes_on_from_leaves_its_traceback_in_the_file(tmp_path: Path) -> None:
    failed = read_records(run(tmp_path, Scripted("seven", IndexError("list index out of range\nmore")), keep_going=True))[2]
    assert (failed["question_id"], failed["failed"]) == (7, "IndexError: list index out of range")
    assert "Traceback" in failed["traceback"]
    assert "test_eval.py" in failed["traceback"]


def test_keep_going_records_the_failure_and_the_next_run_asks_again(tmp_path: Path) -> None:
    answers = run(tmp_path, Scripted("seven", MemoryError("no room\nfor 3 GB")), keep_going=True)
    failed = read_records(answers)[2]
    assert (failed["question_id"], failed["failed"]) == (7, "no room")
    assert not {"choices", "traceback"} & failed.keys()
    second = Scripted()
    run(tmp_path, second, keep_going=True)
    assert second.asked == ["seven", "seven"]
    assert ids_of(answers) == [2, 5, 7, 10]
    assert not [record for record in read_records(answers) if "failed" in record]


def test_a_fault_in_the_first_question_leaves_no_file(tmp_path: Path) -> None:
    started: list[str] = []
    contender = Contender("scripted", Scripted("ten"), tmp_path / "0.jsonl")
    with pytest.raises(RuntimeError, match="out of memory"):
        run_eval([contender], QUESTIONS, Asking(Letters(), GenerationConfig()), on_start=lambda: started.append("x"))
    assert not started
    assert list(tmp_path.iterdir()) == []


@dataclass
class Rank:
    """One of several processes that meet at a barrier."""

    process_index: int
    num_processes: int
    barrier: threading.Barrier

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=60)


def test_processes_share_the_questions_and_meet_in_one_file(tmp_path: Path) -> None:
    barrier, forwards, started = threading.Barrier(2), [Scripted(), Scripted()], list[str]()
    append_record(tmp_path / "0.jsonl", {"question_id": 5, "choices": []})

    def work(rank: int) -> None:
        contender = Contender("scripted", forwards[rank], tmp_path / "0.jsonl")
        asking = Asking(Letters(), GenerationConfig())
        run_eval([contender], QUESTIONS, asking, Rank(rank, 2, barrier), on_start=lambda: started.append(f"rank {rank}"))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [None, None]
    assert forwards[0].asked == ["ten", "ten", "seven"]
    assert forwards[1].asked == ["two", "two", "two|more|ttt"]
    assert ids_of(tmp_path / "0.jsonl") == [2, 5, 7, 10]
    assert started == ["rank 0"]


def test_contenders_take_turns_and_each_keeps_its_own_file(tmp_path: Path) -> None:
    order: list[str] = []

    def noting(name: str, forward: Scripted) -> Forward:
        def answer(prompt_ids: list[int], config: GenerationConfig) -> Generation:
            order.append(name)
            return forward(prompt_ids, config)

        return answer

    contenders = [Contender(name, noting(name, Scripted()), tmp_path / f"{name}.jsonl") for name in ("cats", "plain")]
    single = [question for question in QUESTIONS if len(question.turns) == 1]
    run_eval(contenders, single, Asking(Letters(), GenerationConfig()))
    assert order == ["cats", "plain", "cats", "plain", "plain", "cats", "cats", "plain"]
    assert ids_of(tmp_path / "cats.jsonl") == ids_of(tmp_path / "plain.jsonl") == [5, 7, 10]


def test_only_the_contender_without_an_answer_is_asked(tmp_path: Path) -> None:
    run(tmp_path, Scripted())
    plain = Scripted()
    contenders = [Contender("cats", Scripted("never"), tmp_path / "0.jsonl"), Contender("plain", plain, tmp_path / "0.baseline.jsonl")]
    append_record(tmp_path / "0.baseline.jsonl", {"question_id": 10, "choices": []})
    run_eval(contenders, QUESTIONS, Asking(Letters(), GenerationConfig()))
    assert "ten" not in plain.asked
    assert ids_of(tmp_path / "0.baseline.jsonl") == [2, 5, 7, 10]


class Notes:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def begin_turn(self, label: Mapping[str, object]) -> None:
        self.told.append(tuple(label.values()))

    def end_turn(self, generation: Generation) -> None:
        self.told.append((generation.ids[0],))


def test_a_watcher_is_told_of_every_turn_but_not_of_the_warm_up(tmp_path: Path) -> None:
    notes = Notes()
    asking = Asking(Letters(), GenerationConfig(), run=3, keep_going=True, watcher=notes)
    run_eval([Contender("scripted", Scripted("seven"), tmp_path / "0.jsonl")], QUESTIONS[1:3], asking)
    two, seven = ("scripted", 3, 2), ("scripted", 3, 7)
    assert notes.told == [(*two, 0), (ord("t"),), (*two, 1), (ord("t"),), (*seven, 0)], "a turn that fails begins and has no end"


def test_records_that_need_not_survive_a_power_cut_are_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    append_record(tmp_path / "t.jsonl", {"question_id": 1}, durable=False)
    assert not flushed
    append_record(tmp_path / "t.jsonl", {"question_id": 2})
    assert len(flushed) == 1
    assert ids_of(tmp_path / "t.jsonl") == [1, 2]


def test_reorg_sorts_and_keeps_the_last_answer_that_did_not_fail(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    for record in (
        {"question_id": "b", "n": 1},
        {"question_id": 10, "n": 1},
        {"question_id": 9, "failed": "x"},
        {"question_id": 9, "n": 2},
        {"question_id": 10, "n": 2},
        {"question_id": 10, "failed": "y"},
        {"question_id": 3, "failed": "z"},
    ):
        append_record(path, record)
    reorg_answer_file(path)
    assert read_records(path) == [
        {"question_id": 3, "failed": "z"},
        {"question_id": 9, "n": 2},
        {"question_id": 10, "n": 2},
        {"question_id": "b", "n": 1},
    ]
    reorg_answer_file(tmp_path / "absent.jsonl")
    assert [name.name for name in tmp_path.iterdir()] == ["0.jsonl"]


def test_a_full_disk_leaves_only_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0.jsonl"
    append_record(path, {"question_id": 1})

    def half_then_full(descriptor: int, data: bytes, offset: int) -> None:
        os.pwrite(descriptor, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_file, "_write_all", half_then_full)
    with pytest.raises(OSError, match="No space left"):
        append_record(path, {"question_id": 2})
    assert path.read_text() == '{"question_id": 1}\n'


def test_a_long_torn_line_is_cut_off_to_the_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    append_record(path, {"question_id": 1})
    with path.open("ab") as file:
        file.write(b'{"question_id": 2, "text": "' + b"x" * 3 * record_file.CHUNK)
    append_record(path, {"question_id": 3})
    assert ids_of(path) == [1, 3]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    answers, settings = tmp_path / "0.jsonl", tmp_path / "0.settings.json"
    check_settings(settings, {"method": {"steps": 5}}, answers)
    write_json(settings, {"settings": {"method": {"steps": 5, "threshold": 0.0}}})
    check_settings(settings, {"method": {"steps": 6}}, answers)  # nothing answered yet
    append_record(answers, {"question_id": 1})
    check_settings(settings, {"method": {"threshold": 0.0, "steps": 5}}, answers)
    with pytest.raises(CatsError, match=r"begun with method\.steps 5, now it is 6; choose another place"):
        check_settings(settings, {"method": {"steps": 6, "threshold": 0.0}}, answers)
    settings.unlink()
    with pytest.raises(CatsError, match=r"has no 0\.settings\.json"):
        check_settings(settings, {"method": {"steps": 5}}, answers)


def test_json_keeps_number_lists_on_one_line_and_texts_as_they_are(tmp_path: Path) -> None:
    content = {"committed": [1, 2, -3.5e-07], "text": "[ 1,  2 ]", "rows": [{"a": []}], "nested": [[1, 2], [3]]}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert '"committed": [1, 2, -3.5e-07]' in text
