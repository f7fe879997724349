"""The memory flags that every command shares: a budget, what it covers, an imitated flash, and the paper's way."""

import argparse
from collections.abc import Iterable

from cats.config import COARSE_COPIES, MemoryOptions, MethodConfig, require
from cats.methods import needs_of, with_needs
from cats.planning.plan import COARSE_PRECISION, COVERS, parse_amount

PROMPT_POSITIONS = 1024
"""Positions planned for the prompt where --budget-positions does not say."""


def add_memory_flags(parser: argparse.ArgumentParser) -> None:
    """Add them to a parser; none has an effect unless it is given."""
    group = parser.add_argument_group("memory")
    group.add_argument("--memory-budget", help="like 8GB: what does not fit is streamed from the checkpoint (default: all is resident)")
    group.add_argument("--budget-covers", choices=COVERS, help="the whole process, or the weights only as in the paper (default: process)")
    group.add_argument("--flash-bandwidth", help="like 1GB/s: imitate a slower flash; figures then say so")
    group.add_argument("--no-pinning", action="store_true", help="the paper's way: hold only the layers that drafting needs")
    group.add_argument("--ring-buffers", type=int, help="size of the ring for streamed weights, in largest matrices (default: 3)")
    group.add_argument(
        "--budget-positions", type=int, help=f"prompt and answer together, at most (default: {PROMPT_POSITIONS} and --max-new-tokens)"
    )
    group.add_argument(
        "--coarse",
        choices=COARSE_COPIES,
        help="hold a copy of the layers' matrices of eight bits a weight, for methods that draft with one",
    )
    group.add_argument("--ledger", action="store_true", help="print what the budget is spent on")


def memory_options(args: argparse.Namespace, max_new_tokens: int, methods: Iterable[MethodConfig] | None) -> MemoryOptions | None:
    """The options that were given; None where none was. Contradictions raise `CatsError`.

    Args:
        methods: to be run; the options have room for what any of them grows, drafts with and holds. None: the planner will choose.
    """
    planned, methods = methods is None, tuple(methods or ())
    given = args.memory_budget is not None or args.no_pinning
    if args.coarse is not None and not planned:
        check_coarse(methods)
    if not given:
        for flag in ("budget_covers", "flash_bandwidth", "ring_buffers", "budget_positions"):
            require(
                getattr(args, flag) is None,
                f"--{flag.replace('_', '-')} is about weights that are streamed; give --memory-budget or --no-pinning with it.",
            )
        require(not args.ledger, "--ledger shows what a budget is spent on; give --memory-budget or --no-pinning with it.")
        return None if args.coarse is None else with_needs(MemoryOptions(coarse=args.coarse), *methods)
    require(
        args.budget_positions is None or (args.memory_budget is not None and args.budget_covers != "weights"),
        "--budget-positions sizes the caches, which only a --memory-budget for the whole process counts; give one, or leave it out.",
    )
    default = MemoryOptions()
    positions = PROMPT_POSITIONS + max_new_tokens if args.budget_positions is None else args.budget_positions
    memory = MemoryOptions(
        budget_bytes=None if args.memory_budget is None else parse_amount(args.memory_budget, "--memory-budget"),
        covers=args.budget_covers or default.covers,
        flash_bandwidth=None if args.flash_bandwidth is None else float(parse_amount(args.flash_bandwidth, "--flash-bandwidth")),
        pinning=not args.no_pinning,
        ring_buffers=default.ring if args.ring_buffers is None else args.ring_buffers,
        positions=positions,
        coarse=args.coarse,
    )
    return with_needs(memory, *methods)


def drafts_coarsely(config: MethodConfig) -> bool:
    """Whether a method drafts with a coarse form of the weights."""
    return any(view.precision == COARSE_PRECISION for view in needs_of(config).views)


def check_coarse(methods: Iterable[MethodConfig]) -> None:
    """Raise `CatsError` where a coarse copy would be resident for nothing."""
    require(
        any(map(drafts_coarsely, methods)),
        "--coarse holds a copy that some methods draft with; name one of them by --method, or leave it out.",
    )
