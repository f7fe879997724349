"""What goes wrong outside the program while it answers: a full disk, a path that is gone, Ctrl-C and SIGTERM in mid-cycle.

Each ends with one sentence, no hang, the right exit status, finished answers intact, and a next run that answers the rest.
"""

import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cats import CatsError, Generation, GenerationConfig
from cats.cli.command import CommandParser, Terminated, exit_with_sentence, sigterm_as_interrupt
from cats.errors import ContractError
from cats.files import write_atomically
from evaluation import CATS_dynamic, record_file
from evaluation.eval import Asking, Contender, run_eval
from evaluation.questions import Question
from evaluation.record_file import read_records, write_json
from tests.test_eval import Letters, Scripted
from tests.test_options import paths, questions
from tests.tiny_models import TinyModel

ROOT = Path(__file__).resolve().parent.parent
LONGEST_WAIT = 120
SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
FULL_MOUNT_BYTES = 3 * 4096


def flags_of(asked: str, output: Path, *more: str) -> list[str]:
    where = ["--model-id", "m", "--question-file", asked, "--output-dir", str(output)]
    return [*where, "--method", "autoregressive", "--device", "cpu", *more]


def stopped_with(argv: Sequence[str]) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        CATS_dynamic.main(argv)
    return stopped.value.code


@pytest.fixture(scope="module")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[signal.Signals, tuple[Path, int, str]]]:
    """Runs of the evaluation command on the fixture data/tiny, each ended by a signal in its second or third answer, side by side."""
    folder = tmp_path_factory.mktemp("signals")
    asked = questions(folder, *[(f"Write a list of {count} things.",) for count in (2, 3, 4)])
    started = {}
    for number in SIGNALS:
        flags = flags_of(asked, folder / number.name, "--model-path", str(ROOT / "data" / "tiny"), "--max-new-tokens", "60")
        command = [sys.executable, "-m", "evaluation.CATS_dynamic", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started[number] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        )
    try:
        with ThreadPoolExecutor() as pool:
            ends = {number: pool.submit(stop, process, number, folder / number.name) for number, process in started.items()}
            yield {number: end.result() for number, end in ends.items()}
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def heed_interrupts() -> None:
    """Undo what a shell does to programs in the background, which makes them deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Interrupts are heard in this process, wherever the tests were started."""
    previous = signal.getsignal(signal.SIGINT)
    heed_interrupts()
    yield
    signal.signal(signal.SIGINT, previous)


def stop(process: "subprocess.Popen[str]", number: signal.Signals, output: Path) -> tuple[Path, int, str]:
    """Send the signal once an answer is written; the answers, the exit status and stderr."""
    answers, begin = output / "0.jsonl", time.monotonic()
    while not (answers.exists() and answers.read_bytes().endswith(b"\n")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() - begin < LONGEST_WAIT
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=LONGEST_WAIT)
    return answers, process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_mid_cycle_ends_the_run_with_a_sentence_and_the_next_run_goes_on(
    number: signal.Signals, stopped_runs: dict[signal.Signals, tuple[Path, int, str]]
) -> None:
    answers, status, said = stopped_runs[number]
    assert status == SIGNALS[number][0]
    assert said.splitlines()[-1] == f"{SIGNALS[number][1]}: finished work is kept; run the same command again to go on."
    assert "Traceback" not in said
    finished = read_records(answers)
    assert 0 < len(finished) < 3
    asked = str(answers.parent.parent / "asked.jsonl")
    CATS_dynamic.main(flags_of(asked, answers.parent, "--model-path", str(ROOT / "data" / "tiny"), "--max-new-tokens", "60"))
    whole = read_records(answers)
    assert [record["question_id"] for record in whole] == [1, 2, 3]
    assert whole[: len(finished)] == finished


@pytest.mark.usefixtures("heeded_interrupts")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_two_questions_keeps_what_is_finished(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Signalled(Scripted):
        def __call__(self, prompt_ids: list[int], config: GenerationConfig) -> Generation:
            if prompt_ids[0] == ord("c"):
                signal.raise_signal(number)
            return super().__call__(prompt_ids, config)

    @exit_with_sentence
    def main() -> None:
        contender = Contender("scripted", Signalled(), tmp_path / "0.jsonl")
        letters = [Question(place, "", (letter,)) for place, letter in enumerate("abcd")]
        run_eval([contender], letters, Asking(Letters(), GenerationConfig()))

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == SIGNALS[number][0]
    assert capsys.readouterr().err.splitlines()[-1].startswith(SIGNALS[number][1]), "the sentence has a line of its own below the bar"
    assert [record["question_id"] for record in read_records(tmp_path / "0.jsonl")] == [0, 1]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sigterm_is_not_waited_out() -> None:
    with sigterm_as_interrupt():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_is_left_alone_off_the_main_thread_and_where_it_is_handled() -> None:
    found = []

    def look() -> None:
        with sigterm_as_interrupt():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        look()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert found == [signal.SIG_DFL, signal.SIG_IGN]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three blocks; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    options = f"size={FULL_MOUNT_BYTES}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_with_more_space_the_next_goes_on(
    speaking: TinyModel, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = questions(tmp_path, *[(letter,) for letter in "abcdefgh"])
    argv = flags_of(asked, small_disk, *paths(speaking), "--max-new-tokens", "30")
    assert stopped_with(argv) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        f"error: No space left on device at {small_disk / '0.jsonl'}; free some space or choose another place, then run again."
    )
    assert "Traceback" not in said
    finished = read_records(small_disk / "0.jsonl")
    assert 0 < len(finished) < 8
    assert (small_disk / "0.jsonl").read_bytes().endswith(b"\n")
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    CATS_dynamic.main(argv)
    whole = read_records(small_disk / "0.jsonl")
    assert [record["question_id"] for record in whole] == list(range(1, 9))
    assert whole[: len(finished)] == finished


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_full_disk_under_any_append_keeps_the_records_before_it(
    speaking: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    writes, write_all = [], record_file._write_all

    def full(descriptor: int, data: bytes, offset: int) -> None:
        writes.append(data)
        if len(writes) == fails_at:
            os.pwrite(descriptor, data[:20], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(descriptor, data, offset)

    output = tmp_path / "o"
    argv = flags_of(questions(tmp_path, ("a",), ("b",), ("c",), ("d",)), output, *paths(speaking), "--max-new-tokens", "4")
    monkeypatch.setattr(record_file, "_write_all", full)
    assert stopped_with(argv) == 2
    assert f"No space left on device at {output / '0.jsonl'}; free some space" in capsys.readouterr().err
    assert [record["question_id"] for record in read_records(output / "0.jsonl")] == list(range(1, fails_at))
    CATS_dynamic.main(argv)
    assert [record["question_id"] for record in read_records(output / "0.jsonl")] == [1, 2, 3, 4]


def test_a_full_disk_under_a_whole_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "x.json", {"a": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.json'"):
        write_json(tmp_path / "x.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == b'{\n  "a": 1\n}\n'


def test_an_output_folder_that_goes_away_ends_the_run(
    speaking: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, append = tmp_path / "o", record_file.append_record

    def append_then_lose(path: Path, record: record_file.Record) -> None:
        append(path, record)
        output.rename(tmp_path / "elsewhere")

    monkeypatch.setattr("evaluation.eval.append_record", append_then_lose)
    argv = flags_of(questions(tmp_path, ("a",), ("b",)), output, *paths(speaking), "--max-new-tokens", "4")
    assert stopped_with(argv) == 2
    assert f"No such file or directory at {output / '0.jsonl'}; mend that" in capsys.readouterr().err
    assert len(read_records(tmp_path / "elsewhere" / "0.jsonl")) == 1


@pytest.mark.parametrize("fault", ["cut short", "changed or replaced"])
def test_weights_that_change_under_a_streamed_run_end_it(
    speaking: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, output, append = tmp_path / "base", tmp_path / "o", record_file.append_record
    weights, spare = base / "model.safetensors", tmp_path / "spare"
    shutil.copytree(speaking.base, base)
    shutil.copy(weights, spare)

    def append_then_change(path: Path, record: record_file.Record) -> None:
        append(path, record)
        if fault == "cut short":
            os.truncate(weights, weights.stat().st_size // 2)
        else:
            os.replace(spare, weights)

    monkeypatch.setattr("evaluation.eval.append_record", append_then_change)
    argv = flags_of(questions(tmp_path, ("a",), ("b",)), output, "--model-path", str(base), "--max-new-tokens", "4")
    assert stopped_with([*argv, "--memory-budget", "1GB", "--budget-covers", "weights", "--no-pinning"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: question 2 failed with m: {weights} was {fault}")
    assert [record["question_id"] for record in read_records(output / "0.jsonl")] == [1]


FAULTS: dict[str, tuple[BaseException, str]] = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "a.jsonl"), "at a.jsonl; free some space"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded; free some space"),
    "too large": (OSError(errno.EFBIG, "File too large", "a.jsonl"), "at a.jsonl; free some space"),
    "read only": (OSError(errno.EROFS, "Read-only file system", "a.jsonl"), "at a.jsonl; mend that or choose another place"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "a.jsonl"), "Permission denied at a.jsonl; mend that"),
    "device": (OSError(errno.EIO, "Input/output error", "a.jsonl"), "Input/output error at a.jsonl; mend that"),
    "bad input": (CatsError("the file is not there."), "error: the file is not there."),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_files_are_one_sentence_and_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, sentence = FAULTS[name]

    @exit_with_sentence
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def ended(capsys: pytest.CaptureFixture[str], error: BaseException, *argv: str) -> tuple[int, str]:
    """Exit status and stderr of a command that raises `error`."""

    @exit_with_sentence
    def main(argv: Sequence[str] | None = None) -> None:
        assert vars(CommandParser().parse_args(argv)) == {}
        raise error

    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("no such model on the hub"), IndexError("list index out of range"), ContractError("too deep")])
def test_a_bug_is_one_line_and_status_1_and_its_traceback_is_to_be_had(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    error.add_note("question 7 with m")
    status, said = ended(capsys, error)
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith(f"internal error: {type(error).__name__} ({error}; question 7 with m); run again with --traceback")
    status, said = ended(capsys, error, "--traceback")
    assert status == 1
    assert said.startswith("Traceback")
    assert said.splitlines()[-1].startswith("internal error: ")


def test_tracebacks_of_the_users_errors_are_to_be_had_too_and_asked_for_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = ended(capsys, CatsError("not there."), "--traceback")
    assert (status, said.splitlines()[0]) == (2, "Traceback (most recent call last):")
    assert ended(capsys, CatsError("not there.")) == (2, "error: not there.\n"), "the flag holds for one command"
    monkeypatch.setenv("CATS_TRACEBACK", "1")
    assert "Traceback" in ended(capsys, CatsError("not there."))[1]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_too_little_memory_is_the_users_to_mend(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = ended(capsys, error)
    assert (status, said.count("\n")) == (2, 1)
    assert said.startswith("error: out of memory")


@pytest.mark.parametrize(
    "module",
    [
        *("cats.__main__", "evaluation.CATS_dynamic", "evaluation.acceptance_table", "evaluation.correctness", "evaluation.reproduce"),
        *("evaluation.live_view", "training.ge_data", "training.train_finetune", "training.fine_tune_adapter", "training.compare_starts"),
    ],
)
def test_every_command_can_show_tracebacks(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    assert "--traceback" in capsys.readouterr().out


def test_an_interrupt_leaves_no_half_of_a_whole_file(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        part.write_text("half")
        raise Terminated

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x.json", write)
    assert list(tmp_path.iterdir()) == []
