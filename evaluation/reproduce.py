"""Every table and figure of the paper, by one command: measures what is missing, then writes Markdown, LaTeX, pictures and JSON.

    python -m evaluation.reproduce table1 figure1
    python -m evaluation.reproduce all --quick
    python -m evaluation.reproduce table1 --model-path lmsys/vicuna-7b-v1.3 --draft-adapter-path D --shallow-adapter-path S

Without --model-path it is the default model at 85, 151 and 184 MB of weights, its own disk and two slower ones imitated; with one it is
the paper's experiment: 2, 6 and 8 GB scaled to the model, its disk as it is. Each quantity is measured once and kept in a file that
every table reads (evaluation/quantities.py); an interrupted run goes on where it stopped. docs/reproduce.md says what each name makes.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cats import CatsError
from cats.checkpoint import DTYPES, locate_tensors
from cats.cli.command import CommandParser, exit_with_sentence
from cats.earlyexit import read_config
from cats.files import write_atomically
from cats.loading import EMBEDDING, HEAD
from cats.methods import CLASSES
from cats.planning.plan import amount, parse_amount
from evaluation import paper_figures, paper_tables
from evaluation.acceptance_report import PLAIN
from evaluation.cycles import Entry, Place
from evaluation.options import add_place_flags
from evaluation.paper_tables import TREE_VARIANTS, ablated, ablated_places, depths, headline
from evaluation.presets import PRESET_HELP, parse_preset
from evaluation.quantities import (
    CYCLE_BENCH,
    Exits,
    Results,
    Run,
    Wire,
    Work,
    chosen_base,
    fill_context,
    fill_cycles,
    fill_lengths,
    fill_memory,
    fill_quality,
    read_results,
    variant,
)
from evaluation.questions import BENCHES
from evaluation.record_file import write_json
from evaluation.sheets import Sheet, save_figure
from evaluation.subject import stored_bytes
from evaluation.timing import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTITIES = ("acceptance", "cycles", "quality", "memory", "context")
FULL = Work(8, 64, 8, 48, (1024, 4096, 8192), 2, 16)
QUICK = Work(1, 12, 1, 6, (256, 512), 1, 6)
TURNS = 4
DEFAULT_BUDGETS = (85_000_000, 151_000_000, 184_000_000)
DEFAULT_WIRES = (Wire(None, TURNS), Wire(500e6, TURNS), Wire(100e6, 2))
TABLE_1 = (PLAIN, "prompt_lookup", *paper_tables.PAPER_METHODS.values())
CONTRASTED = ("kangaroo", "eagle_self_tree", "cascade_chain", "cascade_tree")
MEMORY_METHODS = (PLAIN, "cascade_tree")
PAPER_BUDGETS_GB = (2, 6, 8)
VICUNA_GB = {"head": 0.262144, "adapters": 2 * 0.134234, "layers": 32 * 0.404767}
"""Weights of Vicuna-7B in float16, and of two adapters."""
NEEDS = (
    "Table 2 is about Vicuna-13B and LLaMA2-7B and 13B: give --model-path with --draft-adapter-path and --shallow-adapter-path of one of "
    "them."
)
Lengths = tuple[Sequence[str], Sequence[str], Exits | None]
"""Sets, methods, exits."""
Turns = tuple[Place, str, Exits | None, int]
"""Where, which method, its exits, how many questions."""


@dataclass(frozen=True)
class Experiment:
    """A table or figure: what it needs measured, and how it is shown.

    Attributes:
        lengths, turns: accepted lengths and cycles that it reads.
        fills: other quantities.
        sheets: tables.
        figures: pictures, by what their file's name has behind the experiment's.
        needs: what it cannot do without --model-path, as a sentence.
    """

    title: str
    lengths: Callable[[Run], Sequence[Lengths]] = lambda run: ()
    turns: Callable[[Run], Iterator[Turns]] = lambda run: iter(())
    fills: Sequence[Callable[[Run], None]] = ()
    sheets: Callable[[Results], Sequence[Sheet]] = lambda results: ()
    figures: Mapping[str, Callable[[Results], "Figure"]] = dataclasses.field(default_factory=dict)
    needs: str = ""


def on_all_sets(run: Run) -> list[Lengths]:
    """The methods of table 1 on every set."""
    return [(BENCHES, run.methods, None)]


def turns_at_headline(run: Run) -> Iterator[Turns]:
    """The methods of table 1 under the largest budget, on every wire."""
    for place, wire in zip(headline(run), run.wires, strict=True):
        yield from ((place, label, None, wire.turns) for label in run.methods)


def turns_with_resident(run: Run) -> Iterator[Turns]:
    """The same, and with everything in memory."""
    yield from ((Place(), label, None, run.wires[0].turns) for label in run.methods)
    yield from turns_at_headline(run)


def turns_by_budget(run: Run) -> Iterator[Turns]:
    """Table 3."""
    wire = run.wires[-1]
    for budget in run.budgets:
        for label, exits in ((PLAIN, None), ("kangaroo", None), ("cascade_chain", run.deepest[budget])):
            yield Place(budget, wire.rate, not run.args.no_pinning), label, exits, wire.turns


def lengths_by_depth(run: Run) -> list[Lengths]:
    """Kangaroo at every exit, CATS at those that tables 3 and 4 show."""
    pairs = {exits for exits in (*run.deepest.values(), run.exits) if exits is not None}
    chains: list[Lengths] = [((CYCLE_BENCH,), ("cascade_chain",), exits) for exits in sorted(pairs)]
    return [*chains, *(((CYCLE_BENCH,), ("kangaroo",), exits) for exits in depths(run))]


def turns_by_depth(run: Run) -> Iterator[Turns]:
    """Table 4: Kangaroo at every exit, pinned and in the paper's way."""
    wire = run.wires[0]
    for pinning in (True, False):
        place = Place(run.budgets[-1], wire.rate, pinning)
        yield from ((place, label, None, wire.turns) for label in (PLAIN, "cascade_chain"))
        yield from ((place, "kangaroo", exits, wire.turns) for exits in depths(run))


def lengths_by_steps(run: Run) -> list[Lengths]:
    """Table 5."""
    labels = [variant(name, steps=steps) for name in paper_tables.STEPPED.values() for steps in paper_tables.DRAFTING_STEPS]
    return [((CYCLE_BENCH,), labels, None)]


def ablated_lengths(run: Run) -> list[Lengths]:
    """Variants of CATS."""
    others: list[Lengths] = [((CYCLE_BENCH,), (label,), exits) for label, exits in ablated(run) if exits is not None]
    return [((CYCLE_BENCH,), TREE_VARIANTS, None), *others]


def ablated_turns(run: Run) -> Iterator[Turns]:
    """Plain decoding and CATS without parts of the runtime."""
    for place in ablated_places(run):
        yield from ((place, label, None, run.wires[0].turns) for label in (PLAIN, "cascade_tree"))


def contrasted(run: Run) -> None:
    """Figure 5's answers."""
    fill_quality(run, [label for label in CONTRASTED if run.can(label)] or ["prompt_lookup"])


def memory_methods(run: Run) -> list[str]:
    """Whose memory and context is looked at."""
    return [label for label in MEMORY_METHODS if run.can(label)]


EXPERIMENTS = {
    "table1": Experiment("Table 1: accepted length and speed-up", on_all_sets, turns_at_headline, (contrasted,), paper_tables.table1),
    "table2": Experiment("Table 2: larger models", on_all_sets, turns_at_headline, sheets=paper_tables.table2, needs=NEEDS),
    "table3": Experiment("Table 3: memory budget", lengths_by_depth, turns_by_budget, sheets=paper_tables.table3),
    "table4": Experiment("Table 4: bytes per token", lengths_by_depth, turns_by_depth, sheets=paper_tables.table4),
    "table5": Experiment("Table 5: drafting steps", lengths_by_steps, sheets=paper_tables.table5),
    "figure1": Experiment(
        "Figure 1: speed-up",
        turns=turns_at_headline,
        sheets=lambda results: [paper_tables.speeds(results)],
        figures={"": paper_figures.figure1},
    ),
    "figure2": Experiment(
        "Figure 2: latency breakdown", turns=turns_with_resident, sheets=paper_tables.breakdown, figures={"": paper_figures.figure2}
    ),
    "figure3": Experiment(
        "Figure 3: resident and streamed",
        turns=turns_with_resident,
        sheets=paper_tables.resident_and_streamed,
        figures={"": paper_figures.figure3},
    ),
    "figure5": Experiment(
        "Figure 5: quality against speed", fills=(contrasted,), sheets=paper_tables.quality, figures={"": paper_figures.figure5}
    ),
    "memory": Experiment(
        "Memory and context",
        fills=(lambda run: fill_memory(run, memory_methods(run)), lambda run: fill_context(run, memory_methods(run))),
        sheets=paper_tables.memory,
        figures={"": paper_figures.memory_figure, "_context": paper_figures.context_figure},
    ),
    "ablations": Experiment("Ablations", ablated_lengths, ablated_turns, sheets=paper_tables.ablations),
}


def scaled_budgets(model_path: Path, adapter_bytes: int) -> tuple[int, ...]:
    """The paper's budgets for this model: its own head and two adapters, and the share of layers that the paper's hold of Vicuna-7B."""
    places = locate_tensors(model_path)
    layers = sum(place.nbytes for name, place in places.items() if ".layers." in name)
    head = places[HEAD if HEAD in places else EMBEDDING].nbytes
    shares = [(budget - VICUNA_GB["head"] - VICUNA_GB["adapters"]) / VICUNA_GB["layers"] for budget in PAPER_BUDGETS_GB]
    return tuple(round(head + 2 * adapter_bytes + share * layers) for share in shares)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python -m evaluation.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="+", choices=(*EXPERIMENTS, "all"), metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}, all")
    group = parser.add_argument_group("model")
    add_place_flags(group)
    group.add_argument("--dtype", default="auto", choices=(*DTYPES, "auto"), help="of the weights in memory (default: as config.json says)")
    group.add_argument(
        "--device", help="cpu, cuda, ... (default: cuda where there is some, else cpu); streamed weights are measured on a cpu"
    )
    group.add_argument("--template", help="name of the chat template, or a .jinja file (default: the model's own)")
    group = parser.add_argument_group("what is measured")
    group.add_argument("--methods", nargs="+", metavar="METHOD", help=f"of table 1 and figures 1 to 3: {PRESET_HELP}")
    group.add_argument("--budgets", nargs="+", metavar="BYTES", help="of weights, like 85MB 184MB; headlines stand at the largest")
    group.add_argument("--wires", nargs="+", metavar="RATE", help="disk, or a slower one that is imitated, like 100MB/s; the fastest first")
    group.add_argument("--no-pinning", action="store_true", help="the paper's way: hold only the layers that drafting needs")
    group.add_argument("--memory-budget", help="like 8GB: for accepted lengths and quality, stream what does not fit; the text is the same")
    group.add_argument("--questions", type=int, help="of each set, for accepted lengths and quality (default: 8)")
    group.add_argument("--max-new-tokens", type=int, help="for accepted lengths and quality (default: 64)")
    group.add_argument("--turns", type=int, help="questions for the time of cycles, on every wire (default: 4, 2 at 100 MB/s)")
    group.add_argument("--contexts", nargs="+", type=int, help="positions (default: 1024 4096 8192, as far as the model goes)")
    group.add_argument("--seed", type=int, default=0, help="of what is sampled (default: %(default)s)")
    group.add_argument("--threads", type=int, help="CPU threads where seconds count (default: those of torch, every core)")
    group.add_argument("--quick", action="store_true", help="a few tokens of a few questions: all of it in minutes, as a trial")
    parser.add_argument(
        "--output", type=Path, help="folder of results and working files (default: runs/reproduce, with --quick runs/quick)"
    )
    parser.set_defaults(compute_dtype="auto", budget_covers=None, flash_bandwidth=None, ring_buffers=None, budget_positions=None)
    parser.set_defaults(coarse=None, ledger=False)
    return parser.parse_args(argv)


def make_run(args: argparse.Namespace) -> Run:
    """What the flags mean; contradictions, and what is missing, raise `CatsError`."""
    for name in ("questions", "max_new_tokens", "turns", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise CatsError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1.")
    args.threads = args.threads or torch.get_num_threads()
    args.budget_covers = "weights" if args.memory_budget is not None else None
    name, directory, adapters, exits = chosen_base(args)
    output = args.output or Path("runs/quick" if args.quick else "runs/reproduce")
    output.mkdir(parents=True, exist_ok=True)
    config, work = read_config(directory), work_of(args)
    contexts = tuple(context for context in work.contexts if work.context_tokens < context <= config.max_position_embeddings)
    work = dataclasses.replace(work, contexts=contexts or (config.max_position_embeddings,))
    default = args.model_path is None
    largest = max((stored_bytes(path) for path in adapters.values()), default=0)
    given = tuple(sorted(parse_amount(text, "--budgets") for text in args.budgets or ()))
    budgets = given or (DEFAULT_BUDGETS if default else scaled_budgets(directory, largest))
    labels = tuple(dict.fromkeys([PLAIN, *(args.methods or TABLE_1)]))
    methods = tuple(label for label in labels if runs_here(label, config, exits is not None, args.methods is not None))
    return Run(args, work, output, name, directory, adapters, exits, methods, budgets, wires_of(args, default))


def work_of(args: argparse.Namespace) -> Work:
    """How much is done, by the flags."""
    work = QUICK if args.quick else FULL
    return dataclasses.replace(
        work,
        questions=args.questions or work.questions,
        quality_questions=args.questions or work.quality_questions,
        tokens=args.max_new_tokens or work.tokens,
        contexts=tuple(sorted(args.contexts or work.contexts)),
    )


def wires_of(args: argparse.Namespace, default: bool) -> tuple[Wire, ...]:
    """The links, by the flags."""
    wires: tuple[Wire, ...] = DEFAULT_WIRES if default else (Wire(None, TURNS),)
    if args.wires is not None:
        rates = [None if text == "disk" else float(parse_amount(text, "--wires")) for text in args.wires]
        wires = tuple(Wire(rate, TURNS) for rate in rates)
    elif args.quick:
        wires = (wires[0], *wires[2:])
    turns = args.turns or (1 if args.quick else None)
    return tuple(Wire(wire.rate, turns or wire.turns) for wire in wires)


def runs_here(label: str, config: Any, adapted: bool, asked: bool) -> bool:
    """Whether a method has what it needs; where it was asked for by name and has not, `CatsError`."""
    _, method = parse_preset(label)
    lacking = CLASSES[method.name].lacks(method, config)
    if lacking is None and CLASSES[method.name].needs(method).adapters and not adapted:
        lacking = f"{label} needs adapters; give --draft-adapter-path and --shallow-adapter-path, or --adapters FOLDER."
    if lacking is not None and asked:
        raise CatsError(lacking)
    if lacking is not None:
        sys.stderr.write(f"{label} is left out: {lacking}\n")
    return lacking is None


def fill(run: Run, experiments: Sequence[Experiment]) -> None:
    """Measure whatever these experiments need; what they need in one place, in turns."""
    for benches, labels, exits in (needed for experiment in experiments for needed in experiment.lengths(run)):
        fill_lengths(run, benches, [label for label in labels if run.can(label)], exits)
    wanted: dict[tuple[Place, int], dict[str, Entry]] = {}
    for place, label, exits, turns in (needed for experiment in experiments for needed in experiment.turns(run)):
        if run.can(label):
            entries = wanted.setdefault((place, turns), {PLAIN: run.entry(PLAIN)})
            entry = run.entry(label, exits)
            entries.setdefault(entry.name, entry)
    for (place, turns), entries in wanted.items():
        fill_cycles(run, place, entries.values(), turns)
    for work in dict.fromkeys(work for experiment in experiments for work in experiment.fills):
        work(run)


def write(name: str, results: Results) -> str:
    """The files of an experiment; returns its Markdown."""
    experiment, run = EXPERIMENTS[name], results.run
    quick = " (quick: a trial, no result)" if run.args.quick else ""
    about = environment()
    sheets = experiment.sheets(results)
    made = f"{run.name}; {about['cpu']}, {about['cores']} core(s), {run.args.threads} thread(s); commit {about['commit']}.\n"
    needs = f"{experiment.needs}\n\n" if experiment.needs and run.args.model_path is None else ""
    pictures = {f"{name}{suffix}.png": draw for suffix, draw in experiment.figures.items()}
    shown = "".join(f"![{experiment.title}]({picture})\n\n" for picture in pictures)
    text = f"# {experiment.title}{quick}\n\n{needs}{made}\n{shown}" + "\n".join(sheet.markdown() for sheet in sheets)
    latex = f"% {experiment.title}{quick}\n" + "\n".join(sheet.latex() for sheet in sheets)
    write_atomically(run.output / f"{name}.md", lambda part: part.write_text(text, encoding="utf-8"))
    write_atomically(run.output / f"{name}.tex", lambda part: part.write_text(latex, encoding="utf-8"))
    for picture, draw in pictures.items():
        save_figure(draw(results), run.output / picture)
    write_json(run.output / f"{name}.json", record_of(results, experiment, sheets) | {"environment": about})
    return text


def record_of(results: Results, experiment: Experiment, sheets: Sequence[Sheet]) -> dict[str, Any]:
    """What a result file says beside the machine: model, budgets, wires, work and seed; its tables, and where their figures lie."""
    run = results.run
    rates = [cell["bandwidth"] for cell in results.cells if cell.get("bandwidth") and cell["settings"]["place"]["flash_bandwidth"] is None]
    disk = statistics.median(rates) if rates else None
    return {
        "title": experiment.title,
        "quick": run.args.quick,
        "model": run.name,
        "exits": run.exits,
        "budgets": run.budgets,
        "wires": [{"bytes_per_second": wire.rate or disk, "emulated": wire.rate is not None, "turns": wire.turns} for wire in run.wires],
        "work": dataclasses.asdict(run.work),
        "seed": run.args.seed,
        "paper": results.paper_model,
        "files": [f"{quantity}.json" for quantity in QUANTITIES if (run.output / f"{quantity}.json").exists()],
        "tables": [dataclasses.asdict(sheet) for sheet in sheets],
    }


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, write, show."""
    args = parse(argv)
    names = list(EXPERIMENTS) if "all" in args.names else list(dict.fromkeys(args.names))
    run = make_run(args)
    torch.set_num_threads(args.threads)
    possible = [EXPERIMENTS[name] for name in names if not EXPERIMENTS[name].needs or args.model_path is not None]
    budgets, wires = ", ".join(map(amount, run.budgets)), ", ".join(Place(0, wire.rate).wire for wire in run.wires)
    sys.stderr.write(f"{run.name}: budgets of {budgets}; {wires}; results in {run.output}\n")
    fill(run, possible)
    results = read_results(run)
    for name in names:
        text = write(name, results)
        sys.stdout.write(text + "\n")
        if EXPERIMENTS[name].needs and args.model_path is None:
            sys.stderr.write(f"{EXPERIMENTS[name].needs}\n")


if __name__ == "__main__":
    main()
