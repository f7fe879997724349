"""`python -m cats chat`: a conversation; Ctrl-C ends the answer, Ctrl-D the conversation (docs/chat.md)."""

import argparse
import itertools
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from types import FrameType
from typing import TYPE_CHECKING, Self

import cats
from cats.cli.command import CommandParser, Terminated, exit_with_sentence
from cats.cli.line_reader import line_reader
from cats.cli.live_text import GREEN, PLAIN, LiveText, figures
from cats.cli.model_flags import add_model_flags, load_model
from cats.errors import CatsError

if TYPE_CHECKING:
    from cats.api import CatsModel
    from cats.engine import Step
    from cats.methods import Method
    from cats.text import Message
    from cats.trace import StepTrace

COLOURS = {"draft": GREEN, "sibling": "\033[36m", "correction": "\033[33m", "lookup": "\033[34m", "coarse": "\033[35m"}
"""Of the terminal's own palette, so that light and dark ones show them; the target's own tokens stay plain."""
COMMANDS = {
    "/help": "show these commands",
    "/retry": "answer the last question again, by other random numbers where answers are sampled",
    "/undo": "take the last question and its answer back",
    "/reset": "begin a new conversation",
    "/quit": "end, as Ctrl-D does",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m cats chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", help="what the model is told in front of the conversation")
    parser.add_argument("--colour", action="store_true", help="colour each token by what wrote it")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first answer; each further one has the next (default: %(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="end an answer after this text (may be given several times)")
    add_model_flags(parser)
    return parser.parse_args(argv)


class Interruption:
    """Ctrl-C inside the block is noted in `asked`; a second one raises KeyboardInterrupt."""

    def __enter__(self) -> Self:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *about: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Chat:
    """A conversation with one model.

    Attributes:
        messages: so far; after an answer, the last one is the answer.
    """

    def __init__(self, model: "CatsModel", method: "Method", arguments: argparse.Namespace):
        self._model, self._method, self._arguments = model, method, arguments
        self._kept = cats.KeptCaches(model)
        self._answers = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        system = self._arguments.system
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def undo(self) -> str | None:
        """Take the last question and its answer back; the question, or None where there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        question = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def ask(self, question: str) -> None:
        """Show the answer as it is made; the question counts as not asked where there is none."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        ids = self._answer(self._model.text.prompt_ids(asked))
        if ids:
            self.messages = [*asked, {"role": "assistant", "content": self._model.text.answer(ids)}]

    def _answer(self, prompt: list[int]) -> list[int]:
        """Ids of the answer, up to where it was interrupted."""
        from cats.cli.progress import heartbeat

        text, arguments = self._model.text, self._arguments
        config = generation(arguments, self._answers)
        steps = cats.stream(self._model, prompt, self._method, config, stop=text.stop(arguments.stop), kept=self._kept)
        live = LiveText(text, COLOURS if arguments.colour else {})
        ids: list[int] = []
        traces: list[StepTrace] = []
        with Interruption() as interruption, closing(steps):
            with heartbeat("reading the prompt"):
                first = next(steps)
            for step in itertools.chain([first], steps):
                self._show(step, live)
                ids, traces = ids[: len(ids) - step.taken_back] + step.tokens, [*traces, step.trace]
                if interruption.asked:
                    break
        live.end()
        self._answers += 1
        read = f"{traces[0].prompt_rows} of {len(prompt)} prompt tokens"
        print(f"\n\n{figures(traces, read)}{' interrupted' if step.finish is None else ''}\n", flush=True)
        return ids

    def _show(self, step: "Step", live: LiveText) -> None:
        from cats.writers import writers_of

        for token, writer in zip(step.tokens, writers_of(step, self._method.config), strict=True):
            live.show(token, writer)


def generation(arguments: argparse.Namespace, answers: int) -> cats.GenerationConfig:
    """How the next answer is made, after so many."""
    return cats.GenerationConfig(
        arguments.max_new_tokens, temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed + answers
    )


def obey(chat: Chat, command: str) -> bool:
    """Do what a command says; whether the conversation goes on."""
    if command == "/quit":
        return False
    if command == "/reset":
        chat.reset()
    elif command in ("/undo", "/retry"):
        question = chat.undo()
        if question is None:
            print("nothing was answered yet.")
        elif command == "/retry":
            chat.ask(question)
    elif command == "/help":
        print("\n".join(f"{name:8}{meaning}" for name, meaning in COMMANDS.items()))
        print("Ctrl-C   ends the answer with the pass in hand; twice, at once. // in front asks a line that begins with /.")
    else:
        print(f"there is no command {command}; /help shows those there are, and /{command} asks it as it stands.")
    return True


def converse(chat: Chat, read: Callable[[], str]) -> None:
    """Line by line, until there are no more."""
    while True:
        try:
            line = read().strip()
            if line.startswith("/") and not line.startswith("//"):
                if not obey(chat, line):
                    return
            elif line:
                chat.ask(line.removeprefix("/"))
        except EOFError:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            print("\ngiven up; /quit or Ctrl-D ends the conversation.")
        except CatsError as error:
            if not sys.stdin.isatty():
                raise
            sys.stderr.write(f"error: {error} (/reset begins a new conversation.)\n")


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    generation(arguments, 0)
    model, method = load_model(arguments)
    print(f"{method.config.label(tuple(model.exits(method.adapters).values()))}, {model.text.template} template; /help shows the commands")
    if arguments.colour:
        from cats.writers import WRITERS

        print("written by: " + ", ".join(f"{COLOURS.get(name, '')}{name}{PLAIN}" for name in WRITERS))
    converse(Chat(model, method, arguments), line_reader())


if __name__ == "__main__":
    main()
