"""The flags of commands that answer with one model: which one, its adapters, its method, what it may hold; and the model that they mean."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cats
from cats.cli.default_model import default_model, shipped_adapters
from cats.cli.memory_flags import add_memory_flags, memory_options
from cats.cli.method_flags import add_method_flags, chosen_method
from cats.cli.method_list import ListMethods
from cats.cli.planned import add_plan_flags, is_planned, load_planned
from cats.errors import CatsError
from cats.methods import Method, best_method, build_method, check_runnable, needs_of
from cats.methods.fallback import with_fallback

if TYPE_CHECKING:
    from cats.api import AdapterPlace, CatsModel

ADAPTERS = ("draft", "shallow")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add them; the command brings `--max-new-tokens` itself."""
    listing = "show every method in a line, and end; adapters given before it count"
    parser.add_argument("--list-methods", action=ListMethods, brought=shipped_adapters(), dest=argparse.SUPPRESS, help=listing)
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
    parser.add_argument("--dtype", default="float32", help="of the weights in memory; auto is what config.json says (default: %(default)s)")
    parser.add_argument("--compute-dtype", default="auto", help="of the arithmetic (default: float32 on a CPU, elsewhere --dtype)")
    parser.add_argument("--device", default="cpu")
    add_memory_flags(parser)
    add_plan_flags(parser)
    parser.add_argument(
        "--template", help="chat template: vicuna_v1.1, llama-2, another of FastChat's names, a .jinja file (default: the checkpoint's own)"
    )


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


def load_model(arguments: argparse.Namespace) -> "tuple[CatsModel, Method]":
    """The model, and the method that answers, with its fall-back unless that was refused; prints the ledger where it was asked for."""
    model, config = load_with_method(arguments)
    if arguments.ledger:
        sys.stderr.write("\n".join(model.base.source.report()) + "\n")
    method = build_method(config, model)
    return model, method if arguments.no_fallback else with_fallback(method, model)


def load_with_method(arguments: argparse.Namespace) -> "tuple[CatsModel, cats.MethodConfig]":
    """The model and the configuration of the method, after everything that can be refused without weights was."""
    from cats.cli.progress import heartbeat
    from cats.earlyexit import read_config
    from cats.hub import locate

    default = default_model() if arguments.model_path is None else None
    path = default.path if default else arguments.model_path
    adapters = chosen_adapters(arguments, default.adapters if default else {})
    with heartbeat("looking for the model"):
        properties = read_config(locate(path))
    ready_to_compute(arguments)
    if is_planned(arguments):
        return load_planned(arguments, path, adapters)
    name = arguments.method or best_method(adapters)
    if default and arguments.method is None and not adapters:
        sys.stderr.write(f"no adapters for {default.name} lie beside this installation, so it drafts by {name.replace('_', ' ')}.\n")
    config = chosen_method(name, arguments)
    with heartbeat("loading"):
        check_runnable([config], properties, arguments.coarse)
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
