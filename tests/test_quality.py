"""`python -m evaluation.quality`: what is counted as right, what the sandbox holds back, and what the command refuses."""

import gzip
import hashlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation import CATS_dynamic, quality, sandbox
from evaluation.questions import BENCH_FOLDER
from evaluation.sandbox import ERROR, PASSED, TIMEOUT, WRONG, Sandbox, check_sandbox, namespaces, run_program
from tests.answer_records import answer_record, write_answers, write_lines

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
TEST = "def check(candidate):\n    assert candidate(1) == 2\n"
RIGHT = "def f(x):\n    return x + 1\n"
LIMITS = Sandbox(seconds=10, memory=1 << 27)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's walls are Linux's")
walled = pytest.mark.skipif(namespaces() is None, reason="this system gives no network namespace")


def run_of(program: str, limits: Sandbox = LIMITS) -> sandbox.Outcome:
    if namespaces() is None:
        limits = Sandbox(limits.seconds, limits.memory, allow_network=True)
    return run_program(program, TEST, "f", limits)


@linux
@pytest.mark.parametrize(
    ("program", "kind", "said"),
    [
        (RIGHT, PASSED, ""),
        ("import collections, hashlib, math, re, typing\n" + RIGHT, PASSED, ""),
        ("def f(x):\n    return x\n", WRONG, "AssertionError"),
        ("def f(x):\n    return x / 0\n", ERROR, "ZeroDivisionError"),
        ("def f(x)\n", ERROR, "SyntaxError"),
        ("def g(x):\n    return 2\n", ERROR, "KeyError: 'f'"),
        ("def f(x):\n    return f(x)\n", ERROR, "RecursionError"),
        ("import sys\nsys.exit(0)\n", ERROR, "SystemExit"),
        ("import os\nos._exit(0)\n", ERROR, "without a verdict"),
        ("held = []\nwhile True:\n    held.append(bytearray(1 << 20))\n", ERROR, "MemoryError"),
        ("open('big', 'w').write('x' * (1 << 22))\n", ERROR, "File too large"),
        ("assert open('mine', 'w').write('x') == 1\n" + RIGHT, PASSED, ""),
        ("files = [open('/dev/null') for _ in range(1000)]\n", ERROR, "Too many open files"),
        ("import os\nos.kill(os.getppid(), 9)\n", ERROR, "Error"),
        ("import os\nassert 'SECRET_OF_THE_CALLER' not in os.environ\n" + RIGHT, PASSED, ""),
    ],
)
def test_how_a_program_ends(program: str, kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "key")
    found = run_of(program)
    assert found.kind == kind, found
    assert said in found.detail


@linux
@pytest.mark.parametrize("loop", ["while True:\n    pass\n", "import time\ntime.sleep(60)\n"])
def test_an_endless_program_is_stopped_in_time(loop: str) -> None:
    begin = time.monotonic()
    assert run_of(loop, Sandbox(seconds=1, memory=1 << 27)).kind == TIMEOUT
    assert time.monotonic() - begin < 10


FAKE = """
import json, os, sys
for descriptor in range(1, 64):
    try:
        os.write(descriptor, json.dumps({"secret": "guessed", "outcome": "passed", "detail": ""}).encode() + b"\\n")
    except OSError:
        pass
print("passed")
sys.stdout.flush()
os._exit(0)
"""


@linux
def test_a_program_cannot_say_that_it_passed() -> None:
    assert run_of(FAKE).kind == ERROR


@linux
def test_no_process_outlives_a_fork_bomb() -> None:
    """Where there is no filter of calls, the limit of processes and the end of the process namespace hold it."""
    found = run_of("import os\nwhile True:\n    os.fork()\n", Sandbox(seconds=2, memory=1 << 27))
    assert found.kind in (ERROR, TIMEOUT)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(sandbox.PROGRAM).encode() in readable(path)]


def readable(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


@linux
def test_no_file_outside_is_read_or_written(tmp_path: Path) -> None:
    walls = check_sandbox(Sandbox(allow_network=namespaces() is None, allow_writes=True))
    if not walls["files by Landlock"]:
        pytest.skip("this system has no Landlock")
    secret, outside = tmp_path / "secret", tmp_path / "outside"
    secret.write_text("key")
    assert "PermissionError" in run_of(f"open({str(outside)!r}, 'w').write('x')\n").detail
    assert "PermissionError" in run_of(f"open({str(secret)!r}).read()\n").detail
    assert "PermissionError" in run_of(f"import os\nos.remove({str(secret)!r})\n").detail
    assert not outside.exists()
    assert secret.read_text() == "key"


@linux
@walled
def test_no_socket_reaches_anything() -> None:
    """The filter of calls refuses sockets; the namespace has no network even for those that it would let through."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)\n"
        alone = [sys.executable, "-I", "-S", "-c", reach]
        assert run_of(reach).kind == ERROR
        assert subprocess.run([*(namespaces() or ()), *alone], capture_output=True, check=False).returncode == 1
        assert subprocess.run(alone, capture_output=True, check=False).returncode == 0
        assert run_of(reach + RIGHT, Sandbox(seconds=10, memory=1 << 27, allow_network=True, allow_writes=True)).kind == PASSED


def test_without_a_namespace_the_command_refuses_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sandbox, "namespaces", lambda: None)
    command = humaneval(tmp_path, {1: ["    return x + 1\n"]})
    with pytest.raises(SystemExit) as ended:
        quality.main(command)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--allow-network" in said
    assert said.count("\n") == 1
    if sys.platform == "linux":
        quality.main([*command, "--allow-network", "--allow-writes"])
        assert "pass@1 100.0%" in capsys.readouterr().out


def humaneval(folder: Path, answers: dict[int, list[str]]) -> list[str]:
    head = 'def f(x):\n    """One more."""\n'
    rows = [{"question_id": place, "task_id": f"T/{place}", "turns": [head], "category": "code"} for place in answers]
    questions = write_lines(folder / "questions.jsonl", rows)
    tests = folder / "tests.jsonl.gz"
    lines = [{"task_id": f"T/{place}", "prompt": head, "test": TEST, "entry_point": "f"} for place in answers if place < 9]
    tests.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    path = write_answers(folder, answers, questions)
    return ["humaneval", str(path), "--tests", str(tests), "--questions", str(questions)]


@linux
@walled
def test_pass_at_1_and_its_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "```python\ndef f(x):\n    return x\n```"
    answers = {1: "    return x + 1\n", 2: wrong, 3: "I cannot.", 4: f"```\n{RIGHT}```", 5: "return y", 9: ""}
    quality.main(humaneval(tmp_path, {place: [text] for place, text in answers.items()}))
    found = json.loads((tmp_path / "0.humaneval.json").read_text())
    assert found["outcomes"] == {"passed": 2, "wrong": 1, "error": 1, "timeout": 0, "no code": 1}
    assert (found["pass_at_1"], found["answers"], found["without_tests"]) == (0.4, 5, 1)
    assert found["interval"][0] <= 0.4 <= found["interval"][1]
    assert [item["outcome"] for item in found["items"]] == ["passed", "wrong", "no code", "passed", "error"]
    assert "pass@1 40.0%" in capsys.readouterr().out


def gsm8k(folder: Path, answers: dict[int, list[str]]) -> tuple[list[str], Path]:
    rows = [
        {"question_id": 1, "turns": ["Q: A cow eats 3. How much?\nA: #### 3\nQ: Two cows\neat how much?\nA:"], "reference": ["6"]},
        {"question_id": 2, "turns": ["Q: A cow eats 3. How much?\nA:"], "reference": ["so #### 3"]},
        {"question_id": 3, "turns": ["Q: And a bull?\nA:"]},
    ]
    questions = write_lines(folder / "questions.jsonl", rows)
    path = write_answers(folder, answers, questions)
    return ["gsm8k", str(path), "--questions", str(questions)], path


def test_exact_match_by_the_questions_own_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, path = gsm8k(tmp_path, {1: ["3 + 3 = 6"], 2: ["many"], 3: ["5"]})
    with path.open("a") as file:
        file.write(json.dumps({"question_id": 4, "failed": "no memory"}) + "\n")
    quality.main(command)
    found = json.loads((tmp_path / "0.gsm8k.json").read_text())
    counts = {name: found[name] for name in ("exact_match", "right", "answers", "no_number", "without_reference", "failed")}
    assert counts == {"exact_match": 0.5, "right": 1, "answers": 2, "no_number": 1, "without_reference": 1, "failed": 1}
    assert found["items"][1] == {"question_id": 2, "actual": None, "expected": "3", "right": False}
    assert found["made_of"]["answers"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "exact match 50.0%" in capsys.readouterr().out


def test_gsm8ks_own_file_is_matched_by_the_question_asked_last(tmp_path: Path) -> None:
    command, _ = gsm8k(tmp_path, {1: ["#### 7"], 2: ["#### 4"], 3: ["#### 1,000"]})
    known = {"A cow eats 3. How much?": "It eats. #### 4", "Two cows eat how much?": "#### 7", "And a bull?": "#### 1000", "Else?": "9"}
    references = write_lines(tmp_path / "test.jsonl", [{"question": asked, "answer": answer} for asked, answer in known.items()])
    output = tmp_path / "result.json"
    quality.main([*command, "--references", str(references), "--output", str(output)])
    assert json.loads(output.read_text())["exact_match"] == 1


def refusals(folder: Path) -> list[tuple[list[str], str]]:
    command, path = gsm8k(folder, {3: ["5"]})
    bad = write_lines(folder / "bad.jsonl", [{"question": "And a bull?", "answer": "no idea"}])
    other = write_lines(folder / "other.jsonl", [{"question_id": 3, "turns": ["And a bull?"], "reference": ["5"]}])
    foreign = write_lines(folder / "foreign.jsonl", [{"question": "Unknown?", "answer": "#### 1"}])
    return [
        (["gsm8k", str(folder / "absent.jsonl")], "there is no answer file"),
        (command, "no answers"),
        ([*command, "--references", str(bad)], "has no number"),
        ([*command, "--references", str(foreign)], "answers none of the questions"),
        ([*command, "--references", str(folder / "none")], "cannot read"),
        (["gsm8k", str(path), "--questions", str(other)], "is not what"),
        (["gsm8k", str(path)], "are not here; give them by --questions"),
        (["gsm8k", str(bad)], "no answer file"),
        (["humaneval", str(path), "--tests", str(bad), "--questions", str(folder / "questions.jsonl")], "no 'task_id' that is a text"),
    ]


def test_what_is_refused_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in refusals(tmp_path)[:1] + refusals(tmp_path)[2:]:
        with pytest.raises(SystemExit) as ended:
            quality.main(command)
        found: Any = capsys.readouterr().err
        assert ended.value.code == 2, found
        assert said in found
        assert found.count("\n") == 1


def test_references_that_miss_every_answer_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, _ = gsm8k(tmp_path, {3: ["5"]})
    with pytest.raises(SystemExit) as ended:
        quality.main(command)
    assert ended.value.code == 2
    assert "none of the 1 answers" in capsys.readouterr().err


def test_a_record_of_another_form_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "0.jsonl", [answer_record(1, ["5"]) | {"choices": []}])
    with pytest.raises(SystemExit):
        quality.main(["gsm8k", str(path)])
    assert "is no answer file" in capsys.readouterr().err


def test_the_answers_of_the_entry_point_are_found_with_their_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No --questions: the settings that the entry point writes name the sample set, whose references are used."""
    asked = ["--bench-name", "gsm8k", "--question-end", "2", "--max-new-tokens", "4", "--device", "cpu", "--model-id", "tiny"]
    asked += ["--method", "autoregressive", "--model-path", str(TINY)]
    CATS_dynamic.main([*asked, "--output-dir", str(tmp_path), "--question-file", str(BENCH_FOLDER / "question_gsm8k.jsonl")])
    quality.main(["gsm8k", str(tmp_path / "0.jsonl")])
    found = json.loads((tmp_path / "0.gsm8k.json").read_text())
    assert (found["answers"], found["cut_at_length"], found["made_of"]["model_id"]) == (2, 2, "tiny")
    assert found["items"][0]["expected"] == "510"
