"""The flags that evaluation commands share, and what they become: memory options, generation settings.

A flag works or is refused. Those of the methods' settings are in cats/cli/method_flags.py; which model and adapters are meant is
found in chosen_model.py. Knows no model and no file but by path.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from cats import GenerationConfig, MemoryOptions, MethodConfig
from cats.checkpoint import DTYPES
from cats.cli.memory_flags import add_memory_flags, memory_options

ADAPTERS = ("draft", "shallow")
Adapters = dict[str, tuple[Path, int | None]]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What is loaded: base, adapters, dtype, device, template."""
    group = parser.add_argument_group("model")
    add_place_flags(group)
    group.add_argument("--dtype", default="auto", choices=(*DTYPES, "auto"), help="of the weights in memory (default: as config.json says)")
    arithmetic = "of the arithmetic (default: float32 on a CPU, elsewhere --dtype)"
    group.add_argument("--compute-dtype", default="auto", choices=(*DTYPES, "auto"), help=arithmetic)
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is some, else cpu)")
    add_memory_flags(parser)
    group.add_argument(
        "--template", help="vicuna_v1.1, llama-2, another of FastChat's names, a .jinja file, tokenizer (default: the model's own)"
    )


def add_place_flags(group: argparse._ActionsContainer) -> None:
    """Where base and adapters lie; see chosen_model.py."""
    place = "DIRECTORY_OR_HUB_ID"
    group.add_argument("--model-path", metavar=place, help="checkpoint of the base model (default: the default model and its adapters)")
    group.add_argument("--adapters", metavar="FOLDER", help="folder of adapters, as training writes it; the layers choose among them")
    for name in ADAPTERS:
        group.add_argument(f"--{name}-adapter-path", metavar=place, help=f"the {name} adapter, for methods that use it")
        exit_help = f"exit layer of the {name} adapter; without its path, which one of --adapters or of the default model's"
        group.add_argument(f"--{name}-layer", type=int, help=f"{exit_help} (default: what the adapter's config.json says)")


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    default = GenerationConfig()
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="per answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=default.temperature, help="0 is greedy (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=default.top_p, help="for sampling (default: %(default)s, off)")
    group.add_argument("--top-k", type=int, default=default.top_k, help="for sampling (default: %(default)s, off)")
    group.add_argument(
        "--typical-tau", type=float, default=default.typical_tau, help="typical acceptance, with --typical-alpha (default: off)"
    )
    group.add_argument(
        "--typical-alpha", type=float, default=default.typical_alpha, help="typical acceptance, with --typical-tau (default: off)"
    )
    group.add_argument("--seed", type=int, default=0, help="from which every question's own seed is derived (default: %(default)s)")


def chosen_memory(methods: Iterable[MethodConfig], max_new_tokens: int, args: argparse.Namespace) -> MemoryOptions | None:
    """The memory options that were given, with room for any of `methods`; None where none was."""
    return memory_options(args, max_new_tokens, methods)


def generation_config(args: argparse.Namespace) -> GenerationConfig:
    """The generation settings, without the model's end tokens; contradictions raise `CatsError`."""
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        typical_tau=args.typical_tau,
        typical_alpha=args.typical_alpha,
        seed=args.seed,
    )
