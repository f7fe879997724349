"""`python -m cats "prompt"`: one answer, shown as it is made; drafted tokens that the target accepted stand out in green.

This is the one place in `cats/` that knows a tokenizer and prints.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

import cats
from cats.cli.command import exit_with_sentence
from cats.cli.memory_flags import add_memory_flags, memory_options
from cats.cli.method_flags import add_method_flags, chosen_method
from cats.config import require
from cats.trace import StepTrace

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "tiny"
GREEN, PLAIN = "\033[32m", "\033[0m"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what to ask; '-' reads it from standard input")
    parser.add_argument("--model-path", type=Path, default=EMBEDDED, help="checkpoint directory (default: the embedded model)")
    for name, directory in (("draft", "draft_exit2"), ("shallow", "shallow_exit6")):
        parser.add_argument(f"--{name}-adapter-path", type=Path, help=f"(default for the embedded model: adapters/{directory})")
        parser.add_argument(f"--{name}-layer", type=int, help="exit layer (default: what the adapter's config.json says)")
    parser.add_argument("--method", choices=sorted(cats.METHODS), default="cascade")
    add_method_flags(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    add_memory_flags(parser)
    parser.add_argument("--stop", action="append", default=[], help="end the answer after this text (may be given several times)")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    return parser.parse_args(argv)


def adapters_of(arguments: argparse.Namespace, needed: Sequence[str]) -> dict[str, tuple[Path, int | None]]:
    """Directories and exits of the adapters that the method needs; the embedded model brings its own."""
    embedded = {"draft": "draft_exit2", "shallow": "shallow_exit6"} if arguments.model_path == EMBEDDED else {}
    adapters = {}
    for name in needed:
        given = getattr(arguments, f"{name}_adapter_path")
        require(
            given is not None or name in embedded, f"the method {arguments.method} needs the {name} adapter; give --{name}-adapter-path."
        )
        adapters[name] = (given or EMBEDDED / "adapters" / embedded[name], getattr(arguments, f"{name}_layer"))
    return adapters


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool) -> list[int]:
    """Ids of the prompt, in the tokenizer's own chat template where it has one."""
    if raw or not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    templated = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(templated, add_special_tokens=False)["input_ids"])


class LiveText:
    """Writes tokens as text, never half a character, in colour where the terminal has it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self._shown = tokenizer, 0
        self._ids: list[int] = []
        self._colour = sys.stdout.isatty()

    def show(self, token: int, drafted: bool) -> None:
        """Append one token."""
        self._ids.append(token)
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if not text.endswith("\ufffd"):
            fresh, self._shown = text[self._shown :], len(text)
            sys.stdout.write(f"{GREEN}{fresh}{PLAIN}" if drafted and self._colour else fresh)
            sys.stdout.flush()


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    config = chosen_method(arguments.method, arguments)
    method = cats.build_method(config)
    memory = memory_options(arguments, arguments.max_new_tokens, [method.max_nodes])
    model = cats.load(arguments.model_path, adapters_of(arguments, method.adapters), arguments.dtype, arguments.device, memory)
    if arguments.ledger:
        sys.stderr.write("\n".join(model.base.source.report()) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_path)
    generation = cats.GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    stop = cats.StopStrings(arguments.stop, lambda ids: str(tokenizer.decode(ids))) if arguments.stop else None
    live, traces = LiveText(tokenizer), []
    for step in cats.stream(model, prompt_ids(tokenizer, text, arguments.raw), method, generation, stop=stop):
        traces.append(step.trace)
        for place, token in enumerate(step.tokens):
            live.show(token, drafted=place < step.trace.accepted)
    print_summary(traces[1:], traces[0].seconds.total)


def print_summary(traces: Sequence[StepTrace], prefill_seconds: float) -> None:
    """One line of figures below the answer."""
    tokens, seconds = sum(trace.committed for trace in traces), sum(trace.seconds.total for trace in traces)
    if traces:
        rate = f"{tokens / seconds:.1f} tokens/s, {tokens / len(traces):.2f} tokens per target pass"
        print(f"\n\n[{tokens + 1} tokens, {rate}, prompt read in {prefill_seconds:.2f} s]")
    else:
        print("\n\n[1 token]")


if __name__ == "__main__":
    main()
