"""`python -m cats chat`: turns, commands, colours and Ctrl-C, by a pipe in process and by a real terminal."""

import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

import cats
from cats.__main__ import main as front
from cats.cli.chat import COMMANDS, Interruption, main
from cats.cli.line_reader import line_reader
from cats.text import Message
from tests.tiny_models import TinyModel

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
COLOUR = re.compile(r"\033\[\d+m")
FIGURES = re.compile(r"\n\n\[\d+ tokens?.*?, (\d+) of (\d+) prompt tokens read in [\d.]+ s\]( interrupted)?\n\n")
Chat = Callable[..., str]


def flags(model: TinyModel, *more: str) -> list[str]:
    return [
        *("--model-path", str(model.base), "--draft-adapter-path", str(model.draft), "--shallow-adapter-path", str(model.shallow)),
        *("--max-new-tokens", "12", *more),
    ]


@pytest.fixture
def chat(speaking: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """What a chat says to these lines from a pipe, below its first line."""

    def said(*lines: str, more: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        main(flags(speaking, *more))
        return capsys.readouterr().out.partition("\n")[2]

    return said


def answers(out: str) -> list[str]:
    """The answers in what was said; each third piece is followed by the numbers of its line of figures."""
    return FIGURES.split(out)[0:-1:4]


def read(out: str) -> list[tuple[int, int]]:
    """Tokens that were run, and tokens, of each prompt."""
    return [(int(found[1]), int(found[2])) for found in FIGURES.finditer(out)]


def expected(speaking: TinyModel, *questions: str, system: str | None = None) -> list[str]:
    """What `CatsModel.chat` answers in such a conversation, as it was decoded."""
    model = cats.load(speaking.base, dtype="float32")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    texts = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        found = model.chat(messages, "autoregressive", max_new_tokens=12)
        texts.append(model.text.decode(found.ids))
        messages.append({"role": "assistant", "content": found.text})
    return texts


def test_turns_follow_on_each_other_and_only_what_is_new_is_read(chat: Chat, speaking: TinyModel) -> None:
    out = chat("Hi.", "And?", "", "So?")
    assert answers(out) == expected(speaking, "Hi.", "And?", "So?")
    first, *later = read(out)
    assert first[0] == first[1]
    assert all(run < whole for run, whole in later)


def test_commands(chat: Chat, speaking: TinyModel) -> None:
    out = chat(
        "/retry", "Hi.", "/retry", "And?", "/undo", "So?", "/reset", "Hi.", "/undo", "/undo", "/help", "/etc", "//etc", "/quit", "No."
    )
    hi, so = expected(speaking, "Hi.", "So?")
    found = answers(out.replace("nothing was answered yet.\n", ""))
    assert found[:2] == [hi, hi]
    assert found[3:5] == [so, hi]
    assert out.count("nothing was answered yet.") == 2
    assert read(out)[1][0] == 1  # of a prompt that is known, the last token is run
    assert all(f"\n{name}" in out for name in list(COMMANDS)[1:])
    assert "there is no command /etc; /help shows" in out
    assert len(read(out)) == 6
    assert out.endswith(f"{expected(speaking, '/etc')[0]}{list(FIGURES.finditer(out))[-1][0]}")


def test_a_system_message_goes_in_front(chat: Chat, speaking: TinyModel) -> None:
    more = ("--system", "Be brief.", "--template", "vicuna_v1.1")
    with_it, without = read(chat("Hi.", more=more)), read(chat("Hi.", more=more[2:]))
    assert with_it != without


def test_sampled_answers_differ_from_turn_to_turn_and_not_from_run_to_run(chat: Chat) -> None:
    hot = ("--temperature", "1.5", "--top-p", "0.95", "--seed", "4")
    once, again = (answers(chat("Hi.", "/retry", more=hot)) for _ in range(2))
    assert once == again
    assert once[0] != once[1]


def test_colours_change_no_text(chat: Chat) -> None:
    plain, coloured = chat("Hi.", "And?"), chat("Hi.", "And?", more=("--colour",))
    legend, _, rest = coloured.partition("\n")
    assert "correction" in legend
    assert COLOUR.search(rest)
    assert answers(COLOUR.sub("", rest)) == answers(plain)


def test_what_cannot_be_is_said_in_a_sentence(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    for lines, more, sentence in (
        (("Hi.",), ("--temperature", "-1"), "temperature is -1.0"),
        (("Hi.",), ("--top-p", "0.5"), "top-p and top-k shape sampling"),
        (("Hi." * 400,), (), "the model's context holds 1024"),
    ):
        with pytest.raises(SystemExit) as stopped:
            chat(*lines, more=more)
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", re.findall(r"python -m cats chat( .*?)?(?:  .*)?$", PAGE, flags=re.MULTILINE))
def test_the_commands_of_the_page_run(chat: Chat, command: str) -> None:
    assert len(answers(chat("Hi.", "And?", more=tuple(command.split())))) == 2


def test_without_prompt_toolkit_lines_are_read_plainly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr(sys, "stdin", Terminal("Hi.\n"))
    next_line = line_reader()
    assert "pip install 'cats-speculation[chat]'" in capsys.readouterr().err
    assert next_line() == "Hi."
    with pytest.raises(EOFError):
        next_line()


def test_the_first_ctrl_c_waits_for_the_pass_in_hand_and_the_second_does_not() -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), 2)
        assert interruption.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), 2)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), 2)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *command: str):
        self._screen, side = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=side,
            stdout=side,
            stderr=side,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal there
        )
        os.close(side)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, pattern: str, silent: int = 120) -> None:
        """Until something new matches, or so many seconds were silent; what was shown before counts no more."""
        while not (found := re.search(pattern, self.shown)):
            if select.select([self._screen], [], [], 1.0)[0]:
                self.shown += os.read(self._screen, 4096).decode(errors="replace")
            else:
                silent -= 1
            assert silent, self.shown
        self.shown = self.shown[found.end() :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_ends_the_answer_and_not_the_program(speaking: TinyModel) -> None:
    pytest.importorskip("prompt_toolkit")
    endless = ["--max-new-tokens", "1000000", "--method", "autoregressive", "--model-path", str(speaking.base)]
    with Terminal(sys.executable, "-m", "cats", "chat", *endless) as terminal:
        ready, answering = r"\?2004h", r"\?2004l(.|\n)*[^\x1b\n]{10}"
        terminal.wait_for(f"/help shows the commands(.|\\n)*{ready}")
        terminal.press("Hi.\r")
        terminal.wait_for(answering)
        terminal.press("\x03")
        terminal.wait_for(rf"read in [\d.]+ s\] interrupted(.|\n)*{ready}")
        terminal.press("\x03")
        terminal.wait_for(f"Ctrl-D ends the conversation(.|\\n)*{ready}")
        terminal.press("\x04")
        assert terminal.process.wait(timeout=300) == 0


def test_the_first_word_names_a_command_and_any_other_is_asked(speaking: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        front(["chat", "--help"])
    assert "--colour" in capsys.readouterr().out
    front([*flags(speaking), "--", "chat"])
    assert "tokens/s" in capsys.readouterr().out
