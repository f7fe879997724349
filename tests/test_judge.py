"""`python -m evaluation.judge` against a server that misbehaves: patience, resuming, what is missing, and what is asked at all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from evaluation import judge
from evaluation.answer_files import find_questions, read_answers
from evaluation.judge_endpoint import LONGEST_WAIT, Patience, wanted_wait
from evaluation.judging import REMINDER, rating_in, requests_for
from evaluation.record_file import read_records
from tests.answer_records import write_answers, write_lines
from tests.judge_server import serving

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--backoff", "0.01", "--attempts", "3", "--request-timeout", "2"]


def answer_file(folder: Path, count: int = 1, turns: int = 1) -> tuple[Path, Path]:
    """Answers to `count` questions, and their questions."""
    rows = [
        {"question_id": place, "category": "math" if place % 2 else "writing", "turns": [f"Ask {place}.{turn}" for turn in range(turns)]}
        for place in range(count)
    ]
    questions = write_lines(folder / "questions.jsonl", rows)
    return write_answers(folder, {place: [f"Say {place}.{turn}" for turn in range(turns)] for place in range(count)}, questions), questions


def command(folder: Path, url: str, count: int = 1, turns: int = 1, more: Sequence[str] = ()) -> list[str]:
    answers, questions = answer_file(folder, count, turns)
    known = ["--questions", str(questions), "--endpoint", url, "--judge-model", "grader", "--no-api-key", "--concurrency", "1"]
    return [str(answers), *known, *FAST, *more]


def ended_with(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """Exit status and the last line of standard error."""
    capsys.readouterr()
    try:
        judge.main(arguments)
    except SystemExit as ended:
        return ended.code, capsys.readouterr().err.strip().split("\n")[-1]
    return 0, ""


@pytest.mark.parametrize("act", ["429", "500", "half", "broken", "html", "null"])
def test_what_may_pass_is_asked_again(tmp_path: Path, act: str) -> None:
    with serving([act]) as (url, script):
        judge.main(command(tmp_path, url))
    found = json.loads((tmp_path / "0.judge.json").read_text())
    assert (found["score"], found["judgements"], found["missing"]) == (7, 1, [])
    assert len(script.asked) == 2
    assert script.asked[0] == script.asked[1]
    assert found["tokens"] == {"tokens_in": 100, "tokens_out": 10}


def test_a_slow_answer_is_given_up_and_asked_for_again(tmp_path: Path) -> None:
    with serving(["slow"]) as (url, script):
        judge.main(command(tmp_path, url, more=["--request-timeout", "0.5"]))
    assert len(script.asked) == 2
    assert json.loads((tmp_path / "0.judge.json").read_text())["score"] == 7


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    with serving(["429"], retry_after="0.6") as (url, script):
        judge.main(command(tmp_path, url))
    assert script.times[1] - script.times[0] >= 0.6


def test_a_grade_that_cannot_be_read_is_asked_for_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(["mumble", "good", "mumble", "mumble"]) as (url, script):
        status, said = ended_with(command(tmp_path, url, count=3), capsys)
    assert status == 2
    assert "1 of 3 judgements are missing (question 1, turn 1: no grade can be read" in said
    assert [len(body["messages"]) for body in script.asked] == [2, 4, 2, 4, 2]
    assert script.asked[1]["messages"][-1]["content"] == REMINDER
    found = json.loads((tmp_path / "0.judge.json").read_text())
    assert [(item["question_id"], item["rating"]) for item in found["items"]] == [(0, 7), (2, 7)]


def test_a_failure_leaves_the_others_judged_and_the_next_run_asks_for_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(failing="Say 1.1") as (url, script):
        arguments = command(tmp_path, url, count=3, turns=2, more=["--concurrency", "3"])
        status, said = ended_with(arguments, capsys)
        assert status == 2
        assert "1 of 6 judgements are missing (question 1, turn 2: status 500: told to say 500 (3 attempts))" in said
        found = json.loads((tmp_path / "0.judge.json").read_text())
        assert (found["judgements"], found["turns"], found["categories"]) == (5, {"1": 7, "2": 7}, {"writing": 7, "math": 7})
        assert len(script.asked) == 8
        script.failing = ""
        assert ended_with(arguments, capsys) == (0, "")
        assert len(script.asked) == 9
        assert ended_with(arguments, capsys) == (0, "")
        assert len(script.asked) == 9
    assert json.loads((tmp_path / "0.judge.json").read_text())["missing"] == []


def test_a_refused_question_is_missing_and_not_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(["400"]) as (url, script):
        status, said = ended_with(command(tmp_path, url, count=2), capsys)
    assert status == 2
    assert "question 0, turn 1: status 400: told to say 400" in said
    assert len(script.asked) == 2


def test_a_wrong_key_ends_the_command_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(["401"] * 9) as (url, script):
        status, said = ended_with(command(tmp_path, url, count=5), capsys)
    assert status == 2
    assert "check the key" in said
    assert len(script.asked) <= 2


def test_an_address_where_nothing_answers_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    status, said = ended_with(command(tmp_path, f"http://127.0.0.1:{port}/v1", count=2), capsys)
    assert status == 2
    assert "nothing answers at" in said


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(["good", "good", "slow"]) as (url, script):
        arguments = command(tmp_path, url, count=5, more=["--request-timeout", "60"])
        process = subprocess.Popen([sys.executable, "-m", "evaluation.judge", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
        records, begin = tmp_path / "0.judge.records.jsonl", time.monotonic()
        while len(script.asked) < 3 and time.monotonic() - begin < 60:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(read_records(records)) == 2
        with records.open("a") as file:
            file.write('{"question_id": 2, "torn')
        assert ended_with(arguments, capsys) == (0, "")
    assert len(script.asked) == 3 + 3
    assert [record["question_id"] for record in read_records(records)] == [0, 1, 2, 3, 4]


def test_the_cost_is_said_first_and_a_dry_run_asks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as (url, script):
        arguments = command(tmp_path, url, count=2, turns=2)
        judge.main([*arguments, "--dry-run"])
        said = capsys.readouterr().out
        assert said.startswith(f"4 requests to grader at {url}, about ")
        assert "at most 4,096 out (0 judged already)" in said
        assert not script.asked
        assert not (tmp_path / "0.judge.json").exists()
        judge.main(arguments)
        assert "4 requests to grader" in capsys.readouterr().err
        judge.main([*arguments, "--dry-run"])
        assert "0 requests" in capsys.readouterr().out


def test_the_key_is_sent_and_kept_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (url, script):
        arguments = [word for word in command(tmp_path, url) if word != "--no-api-key"]
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        status, said = ended_with(arguments, capsys)
        assert status == 2
        assert "OPENAI_API_KEY holds no key" in said
        monkeypatch.setenv("JUDGE_KEY", "sesame")
        judge.main([*arguments, "--api-key-env", "JUDGE_KEY"])
        assert script.keys == ["Bearer sesame"]
    assert not [path for path in tmp_path.iterdir() if "sesame" in path.read_text()]


def test_other_settings_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as (url, _):
        arguments = command(tmp_path, url)
        judge.main(arguments)
        status, said = ended_with([*arguments, "--judge-model", "another"], capsys)
        assert status == 2
        assert "begun with judge 'grader', now it is 'another'" in said
        for change, said in ((["--endpoint", "ftp://x"], "is no address"), (["--concurrency", "0"], "--concurrency is 0")):
            assert said in ended_with([*arguments, *change], capsys)[1]


def test_a_changed_answer_is_judged_again(tmp_path: Path) -> None:
    with serving() as (url, script):
        arguments = command(tmp_path, url, count=2)
        judge.main(arguments)
        write_answers(tmp_path, {0: ["Say 0.0"], 1: ["Say it otherwise"]}, tmp_path / "questions.jsonl")
        judge.main(arguments)
    assert len(script.asked) == 3
    assert "otherwise" in script.asked[2]["messages"][1]["content"]


def test_a_request_shows_the_conversation_up_to_its_answer(tmp_path: Path) -> None:
    row = {"question_id": 7, "category": "math", "turns": ["First?", "Second?"], "reference": ["", "Forty."]}
    questions = write_lines(tmp_path / "questions.jsonl", [row])
    answers = read_answers(write_answers(tmp_path, {7: ["One.", "Two."]}, questions))
    first, second = requests_for(answers, find_questions(answers, str(questions))[1])
    shown = first.messages[1]["content"]
    assert "One." in shown
    assert not any(hidden in shown for hidden in ("Two.", "Second?", "Forty.", "reference"))
    shown = second.messages[1]["content"]
    assert [shown.index(part) for part in ("First?", "One.", "Second?", "Two.", "Forty.")] == sorted(
        shown.index(part) for part in ("First?", "One.", "Second?", "Two.", "Forty.")
    )
    assert "Grade answer 2" in shown
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good.\nRating: 7", 7),
        ("Rating: 10", 10),
        ("**Rating: 3**\n", 3),
        ("Rating: 8/10", 8),
        ("Rating: 5.", 5),
        ("Rating: 7\nIt was good.", None),
        ("Rating: 3\nRating: 7", None),
        ("Rating: 0", None),
        ("Rating: 11", None),
        ("Rating: 7.5", None),
        ("My Rating: 7", None),
        ("Rating: 70", None),
        ("seven", None),
        ("", None),
    ],
)
def test_a_grade_is_read_strictly(text: str, rating: int | None) -> None:
    assert rating_in(text) == rating


def test_pauses_double_and_obey() -> None:
    patience = Patience(first=1.0)
    assert all(2**attempt / 2 <= patience.pause(attempt, None) <= 2**attempt for attempt in range(6))
    assert patience.pause(50, None) <= LONGEST_WAIT
    assert patience.pause(0, 7.0) == 7.0
    assert patience.pause(0, 1e9) == LONGEST_WAIT
    assert wanted_wait({"retry-after": "2"}) == 2
    assert wanted_wait({"retry-after": "-2"}) == 0
    assert wanted_wait({}) is None
    assert wanted_wait({"retry-after": "soon"}) is None
    assert wanted_wait({"retry-after": "nan"}) is None
    date = wanted_wait({"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=60))})
    assert date is not None
    assert 50 < date <= 60


def test_help_loads_no_model_and_no_client() -> None:
    code = "import sys, evaluation.judge, evaluation.quality; sys.exit(bool({'torch', 'openai', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), check=False).returncode == 0
