"""`python -m cats "prompt"`: one answer, shown as it is made; drafted tokens that the target accepted stand out in green.

Commands with a word of their own (`python -m cats WORD --help`; `-- WORD` asks the word itself):

    chat     a conversation in the terminal
    serve    a model behind OpenAI's protocol, and a page to try it on
"""

import argparse
import itertools
import sys
from collections.abc import Sequence

import cats
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.live_text import LiveText, drafts_in_green, figures
from cats.cli.model_flags import add_model_flags, load_model
from cats.errors import CatsError
from cats.methods.fallback import Fallback


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m cats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what to ask; '-' reads it from standard input")
    add_model_flags(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="end the answer after this text (may be given several times)")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    return parser.parse_args(argv)


def answer(arguments: argparse.Namespace, prompt: str) -> None:
    """Load, decode, show."""
    from cats.cli.progress import heartbeat

    if arguments.raw and arguments.template is not None:
        raise CatsError("--raw leaves the chat template out, so --template does nothing; leave one of them out.")
    generation = cats.GenerationConfig(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed)
    model, method = load_model(arguments)
    text = model.text
    ids = text.ids(prompt) if arguments.raw else text.prompt_ids(prompt)
    live, traces = LiveText(text, drafts_in_green()), []
    steps = cats.stream(model, ids, method, generation, stop=text.stop(arguments.stop, chat=not arguments.raw))
    with heartbeat("reading the prompt"):
        first = next(steps)
    for step in itertools.chain([first], steps):
        traces.append(step.trace)
        for place, token in enumerate(step.tokens):
            live.show(token, "draft" if place < step.trace.accepted else "target")
    live.end()
    print(f"\n\n{figures(traces, 'prompt')}")
    if isinstance(method, Fallback) and method.fell_back:
        sys.stderr.write(
            f"{method.config.name} made {method.gain.value:.2f} x the tokens/s of plain decoding, which took {method.plain_cycles} of "
            f"{method.cycles} cycles over (--no-fallback: none).\n"
        )


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    answer(arguments, sys.stdin.read() if arguments.prompt == "-" else arguments.prompt)
