"""`python -m cats "prompt"`: one answer, shown as it is made; drafted tokens that the target accepted stand out in green."""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cats
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.default_model import default_model, shipped_adapters
from cats.cli.live_text import LiveText
from cats.cli.memory_flags import add_memory_flags, memory_options
from cats.cli.method_flags import add_method_flags, chosen_method
from cats.cli.method_list import ListMethods
from cats.cli.planned import add_plan_flags, is_planned, load_planned
from cats.errors import CatsError
from cats.methods import best_method, build_method, check_runnable, needs_of
from cats.methods.fallback import Fallback, with_fallback

if TYPE_CHECKING:
    from cats.api import AdapterPlace, CatsModel
    from cats.trace import StepTrace

ADAPTERS = ("draft", "shallow")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="python -m cats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listing = "show every method in a line, and end; adapters given before it count"
    parser.add_argument("--list-methods", action=ListMethods, brought=shipped_adapters(), dest=argparse.SUPPRESS, help=listing)
    parser.add_argument("prompt", help="what to ask; '-' reads it from standard input")
    parser.add_argument(
        "--model-path", metavar="DIRECTORY_OR_HUB_ID", help="checkpoint (default: SmolLM2-135M-Instruct, fetched on first use: 93 MB)"
    )
    for name in ADAPTERS:
        parser.add_argument(
            f"--{name}-adapter-path", metavar="DIRECTORY_OR_HUB_ID", help=f"{name} adapter (the default model may bring its own)"
        )
        parser.add_argument(f"--{name}-layer", type=int, help="exit layer (default: what the adapter's config.json says)")
    default = "default: the best that the adapters allow; with --memory-budget, what is predicted to be fastest"
    parser.add_argument("--method", choices=sorted(cats.METHODS), help=default)
    add_method_flags(parser)
    parser.add_argument("--no-fallback", action="store_true", help="keep to the method where plain decoding is faster")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="that weights are held in; auto is what config.json says (default: %(default)s)")
    parser.add_argument("--compute-dtype", default="auto", help="of the arithmetic (default: float32 on a CPU, elsewhere --dtype)")
    parser.add_argument("--device", default="cpu")
    add_memory_flags(parser)
    add_plan_flags(parser)
    parser.add_argument("--stop", action="append", default=[], help="end the answer after this text (may be given several times)")
    parser.add_argument(
        "--template", help="chat template: vicuna_v1.1, llama-2, another of FastChat's names, a .jinja file (default: the checkpoint's own)"
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without a chat template")
    return parser.parse_args(argv)


def chosen_adapters(arguments: argparse.Namespace, brought: Mapping[str, Path]) -> "dict[str, AdapterPlace]":
    """Places and exits of all adapters that were given, or else brought by the model; an exit without an adapter is refused."""
    adapters: dict[str, AdapterPlace] = {}
    for name in ADAPTERS:
        place, layer = getattr(arguments, f"{name}_adapter_path") or brought.get(name), getattr(arguments, f"{name}_layer")
        if place is None and layer is not None:
            raise CatsError(f"--{name}-layer {layer} is the exit of an adapter that was not given; give --{name}-adapter-path with it.")
        if place is not None:
            adapters[name] = (place, layer)
    return adapters


def needed_adapters(
    arguments: argparse.Namespace, adapters: "dict[str, AdapterPlace]", method: str, needed: Sequence[str]
) -> "dict[str, AdapterPlace]":
    """Those that the method needs; a missing one, or one that was given for nothing, raises `CatsError`."""
    for name in ADAPTERS:
        if name in needed and name not in adapters:
            raise CatsError(f"the method {method} needs the {name} adapter; give --{name}-adapter-path.")
        for flag in (f"{name}_adapter_path", f"{name}_layer"):
            if name not in needed and getattr(arguments, flag) is not None:
                said = f"--{flag.replace('_', '-')}"
                raise CatsError(f"{said} does nothing for the method {method}, which has no {name} adapter; leave it out.")
    return {name: adapters[name] for name in needed}


def load_model(arguments: argparse.Namespace) -> "tuple[CatsModel, cats.MethodConfig]":
    """The model and the configuration of the method, after everything that can be refused without weights was."""
    if arguments.raw and arguments.template is not None:
        raise CatsError("--raw leaves the chat template out, so --template does nothing; leave one of them out.")
    from cats.cli.progress import heartbeat
    from cats.earlyexit import read_config
    from cats.hub import locate

    ready_to_compute(arguments)
    default = default_model() if arguments.model_path is None else None
    path = default.path if default else arguments.model_path
    adapters = chosen_adapters(arguments, default.adapters if default else {})
    if is_planned(arguments):
        return load_planned(arguments, path, adapters)
    name = arguments.method or best_method(adapters)
    if default and arguments.method is None and not adapters:
        sys.stderr.write(f"no adapters for {default.name} lie beside this installation, so it drafts by {name.replace('_', ' ')}.\n")
    config = chosen_method(name, arguments)
    with heartbeat("loading"):
        check_runnable([config], read_config(locate(path)), arguments.coarse)
        memory = memory_options(arguments, arguments.max_new_tokens, [config])
        chosen = needed_adapters(arguments, adapters, name, needs_of(config).adapters)
        dtypes = {"dtype": arguments.dtype, "compute_dtype": arguments.compute_dtype}
        template = arguments.template
        return cats.load(path, chosen, device=arguments.device, memory=memory, template=template, plan=None, **dtypes), config


def ready_to_compute(arguments: argparse.Namespace) -> None:
    """Compile what is compiled once on a machine, with a word about it; say where nothing can be."""
    from cats import kernels
    from cats.cli.progress import heartbeat

    if arguments.device != "cpu" or arguments.compute_dtype not in ("auto", "float32"):
        return
    with heartbeat("preparing (the first time on a machine, some fifteen seconds of compiling)"):
        reason = kernels.why_not()
    if reason is not None:
        sys.stderr.write(f"not compiled, so slower: {reason}.\n")


def answer(arguments: argparse.Namespace, prompt: str) -> None:
    """Load, decode, show."""
    from cats.cli.progress import heartbeat

    generation = cats.GenerationConfig(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed)
    model, config = load_model(arguments)
    if arguments.ledger:
        sys.stderr.write("\n".join(model.base.source.report()) + "\n")
    text = model.text
    ids = text.ids(prompt) if arguments.raw else text.prompt_ids(prompt)
    live, traces = LiveText(text), []
    method = build_method(config, model)
    method = method if arguments.no_fallback else with_fallback(method, model)
    steps = cats.stream(model, ids, method, generation, stop=text.stop(arguments.stop, chat=not arguments.raw))
    with heartbeat("reading the prompt"):
        first = next(steps)
    for step in itertools.chain([first], steps):
        traces.append(step.trace)
        for place, token in enumerate(step.tokens):
            live.show(token, drafted=place < step.trace.accepted)
    print_summary(traces[1:], traces[0].seconds.total)
    if isinstance(method, Fallback) and method.fell_back:
        sys.stderr.write(
            f"{config.name} made {method.gain.value:.2f} x the tokens/s of plain decoding, which took {method.plain_cycles} of "
            f"{method.cycles} cycles over (--no-fallback: none).\n"
        )


def print_summary(traces: "Sequence[StepTrace]", prefill_seconds: float) -> None:
    """One line of figures below the answer."""
    tokens, seconds = sum(trace.committed for trace in traces), sum(trace.seconds.total for trace in traces)
    if traces:
        rate = f"{tokens / seconds:.1f} tokens/s, {tokens / len(traces):.2f} tokens per target pass"
        print(f"\n\n[{tokens + 1} tokens, {rate}, prompt read in {prefill_seconds:.2f} s]")
    else:
        print("\n\n[1 token]")


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    answer(arguments, sys.stdin.read() if arguments.prompt == "-" else arguments.prompt)
