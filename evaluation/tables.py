"""Tables 3 and 4 of the paper on any model: speed by memory budget, and bytes of weights per token by method, measured beside the formulas.

    python -m evaluation.tables memory-budget --output FILE.json
    python -m evaluation.tables bytes-per-token --model-path M --draft-adapter-path D --shallow-adapter-paths S... --output FILE.json
    python -m evaluation.tables bytes-per-token --model-path M --adapters FOLDER ...

Without --model-path it is the default model. Of a folder of adapters the first exit drafts, the others are shallow exits to choose from.
Budgets cover the weights only, as the paper's do. Without --budgets they are the paper's 2, 6 and 8 GB scaled to this model: head and
adapters, and the same share of its decoder layers that these hold of Vicuna-7B's. Every row stands once with pinning (ours: what the
budget has room for stays) and once without (the paper's way). Of two figures for bytes per token one is counted while decoding and one
follows from the memory plan, bytes streamed per pass by accepted length; where they differ by more than 2 % the command fails.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cats import (
    AutoregressiveConfig,
    CascadeConfig,
    CatsError,
    Generation,
    GenerationConfig,
    KangarooConfig,
    MemoryOptions,
    MethodConfig,
    MultiAdapterCATSModel,
    build_method,
    generate,
    load,
)
from cats.checkpoint import DTYPES, locate_tensors
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.errors import BudgetError
from cats.files import write_atomically
from cats.hub import locate
from cats.loading import EMBEDDING, HEAD
from cats.planning.plan import amount, parse_amount
from cats.runtime.direct_file import window, window_bytes
from cats.runtime.link import rate_text
from cats.runtime.store import Store
from cats.text import ModelText
from evaluation.chosen_model import adapters_in, base_model, exit_of
from evaluation.metrics import ModelShape, paper_bytes_per_token
from evaluation.questions import ALIASES, BENCHES, read_questions, resolve_bench, select_questions
from evaluation.record_file import write_json
from evaluation.subject import load_text, stored_bytes
from evaluation.timing import environment

TOLERANCE = 0.02
WARM_UP_TOKENS = 8
PAPER_BUDGETS_GB = (2, 6, 8)
VICUNA_GB = {"head": 0.262144, "adapters": 2 * 0.134234, "layers": 32 * 0.404767}
"""Weights of Vicuna-7B in float16, and of two adapters."""
PAPER_SPEEDS = {
    (2, "Baseline"): "1.00, 0.117",
    (2, "Kangaroo"): "2.27, 0.266",
    (2, "CATS"): "2.80, 0.329",
    (6, "Baseline"): "1.00, 0.126",
    (6, "Kangaroo"): "2.27, 0.267",
    (6, "CATS"): "2.94, 0.373",
    (8, "Baseline"): "1.00, 0.146",
    (8, "Kangaroo"): "2.27, 0.282",
    (8, "CATS"): "3.05, 0.461",
}
"""Table 3 of the paper: accepted length and tokens/s, by budget in GB and method."""
PAPER_BYTES = {"Baseline": ("12.95",), "Kangaroo": ("8.37 (d=3)", "8.67 (d=4)", "11.1 (d=10)"), "CATS": ("5.84 (d=3, s=15)",)}
"""Table 4 of the paper: GB per token at 8 GB."""
Adapters = dict[str, tuple[Path, int | None]]
Budget = tuple[int, int]
"""Bytes of weights, and the budget of the paper in GB that they stand for; 0 where they stand for none."""


@dataclass(frozen=True)
class Row:
    """One line to measure: the first of `choices` (methods with adapters, the most wanted first) that fits the budget is taken."""

    budget_bytes: int
    name: str
    pinning: bool
    choices: tuple[tuple[MethodConfig, Adapters], ...]
    paper: str


@dataclass(frozen=True)
class Exercise:
    """What every row does."""

    model_path: Path
    prompts: list[list[int]]
    config: GenerationConfig
    dtype: str
    flash_bandwidth: float | None
    ring_buffers: int


def scaled_budgets(model_path: Path, adapter_bytes: int) -> list[Budget]:
    """The paper's budgets for this model: its own head and two adapters, and the share of layers that the paper's hold of Vicuna-7B."""
    places = locate_tensors(model_path)
    layers = sum(place.nbytes for name, place in places.items() if ".layers." in name)
    head = places[HEAD if HEAD in places else EMBEDDING].nbytes
    shares = {budget: (budget - VICUNA_GB["head"] - VICUNA_GB["adapters"]) / VICUNA_GB["layers"] for budget in PAPER_BUDGETS_GB}
    return [(round(head + 2 * adapter_bytes + share * layers), budget) for budget, share in shares.items()]


def rows_of_memory_budget(budgets: Sequence[Budget], draft: Path, shallows: Sequence[Path]) -> Iterator[Row]:
    """Table 3: every method at every budget; CATS with the deepest shallow exit that fits."""
    deepest_first = sorted(shallows, key=exit_of, reverse=True)
    choices: dict[str, tuple[tuple[MethodConfig, Adapters], ...]] = {
        "Baseline": ((AutoregressiveConfig(), {}),),
        "Kangaroo": ((KangarooConfig(), {"draft": (draft, None)}),),
        "CATS": tuple(cats_with(draft, shallow) for shallow in deepest_first),
    }
    for nbytes, paper in budgets:
        for pinning in (True, False):
            for name, methods in choices.items():
                yield Row(nbytes, name, pinning, methods, PAPER_SPEEDS.get((paper, name), "-"))


def rows_of_bytes_per_token(budgets: Sequence[Budget], draft: Path, shallows: Sequence[Path]) -> Iterator[Row]:
    """Table 4: every method at the largest budget; Kangaroo at every exit."""
    nbytes, paper = max(budgets)
    printed = PAPER_BYTES if paper == PAPER_BUDGETS_GB[-1] else dict.fromkeys(PAPER_BYTES, ())
    for pinning in (True, False):
        yield Row(nbytes, "Baseline", pinning, ((AutoregressiveConfig(), {}),), at(printed["Baseline"], 0))
        for place, adapter in enumerate(sorted((draft, *shallows), key=exit_of)):
            yield Row(nbytes, "Kangaroo", pinning, ((KangarooConfig(), {"draft": (adapter, None)}),), at(printed["Kangaroo"], place))
        for place, shallow in enumerate(sorted(shallows, key=exit_of)):
            yield Row(nbytes, "CATS", pinning, (cats_with(draft, shallow),), at(printed["CATS"], place))


TABLES = {"memory-budget": rows_of_memory_budget, "bytes-per-token": rows_of_bytes_per_token}
TITLES = {"memory-budget": "Table 3: speed by memory budget", "bytes-per-token": "Table 4: bytes of weights per token"}
PAPER_COLUMNS = {"memory-budget": "paper, Vicuna-7B: accepted, tokens/s", "bytes-per-token": "paper, Vicuna-7B: GB/token"}


def at(texts: Sequence[str], place: int) -> str:
    """The text at a place, "-" beyond the last."""
    return texts[place] if place < len(texts) else "-"


def cats_with(draft: Path, shallow: Path) -> tuple[MethodConfig, Adapters]:
    """The paper's chain with these adapters."""
    return CascadeConfig(), {"draft": (draft, None), "shallow": (shallow, None)}


def check_exits(draft: Path, shallows: Sequence[Path]) -> None:
    """Raise `CatsError` where a shallow adapter's exit does not come after the draft adapter's."""
    for shallow in shallows:
        if exit_of(shallow) <= exit_of(draft):
            raise CatsError(
                f"the exit {exit_of(shallow)} of {shallow} is not behind the exit {exit_of(draft)} of the draft adapter {draft}; "
                "exchange or replace them."
            )


def measure(row: Row, exercise: Exercise) -> dict[str, Any]:
    """The first choice that fits, measured; the last refusal where none does."""
    refused: dict[str, Any] = {}
    for method, adapters in row.choices:
        memory = MemoryOptions(
            budget_bytes=row.budget_bytes,
            covers="weights",
            flash_bandwidth=exercise.flash_bandwidth,
            pinning=row.pinning,
            ring_buffers=exercise.ring_buffers,
        )
        try:
            model = load(exercise.model_path, adapters, dtype=exercise.dtype, memory=memory, plan=None)
        except BudgetError as error:
            refused = {"refused": str(error), "exits": {name: exit_of(path) for name, (path, _) in adapters.items()}}
            continue
        return figures(model, method, exercise)
    return refused


def figures(model: MultiAdapterCATSModel, method: MethodConfig, exercise: Exercise) -> dict[str, Any]:
    """Decode, count, and compare what was counted with what the plan says; closes the model's files."""
    source = model.base.source
    if source.plan.budget_bytes is None:
        raise CatsError("the model was loaded without a memory plan; give a budget.")
    try:
        warm_up = GenerationConfig(max_new_tokens=WARM_UP_TOKENS, eos_token_ids=())
        generate(model, exercise.prompts[0], build_method(method, model), warm_up)
        before = disk_bytes()
        answers = [generate(model, prompt, build_method(method, model), exercise.config) for prompt in exercise.prompts]
        after = disk_bytes()
        return summary(model, method, source, answers, None if before is None or after is None else after - before)
    finally:
        source.close()


def summary(
    model: MultiAdapterCATSModel, method: MethodConfig, source: Store, answers: Sequence[Generation], disk: int | None
) -> dict[str, Any]:
    """All figures of a row; raises `CatsError` where bytes disagree."""
    traces = [trace for answer in answers for trace in answer.traces[1:]]
    tokens = sum(trace.committed for trace in traces)
    if not tokens:
        raise CatsError("the answers end with their first token; give other questions or more --max-new-tokens.")
    length = tokens / len(traces)
    counted = sum(trace.bytes_streamed for trace in traces) / tokens
    planned = planned_bytes(source, sum(trace.nodes for trace in traces) / len(traces)) / length
    exits = {name: int(adapter.exit_layer or 0) for name, adapter in model.adapters.items()}
    seconds, waited = (sum(trace.seconds[name] for trace in traces) for name in ("total", "stream_wait"))
    found = {
        "exits": exits,
        "accepted_length": length,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "compute_s_per_token": (seconds - waited) / tokens,
        "bytes_per_token": counted,
        "planned_bytes_per_token": planned,
        "disk_bytes": disk,
        "taken_bytes": sum(trace.bytes_streamed for answer in answers for trace in answer.traces),
        "paper_bytes_per_token": paper_bytes_per_token(shape_of(model, method, source), length),
        "streamed_bytes_per_pass": source.plan.streamed_bytes,
        "held_bytes": source.plan.charged,
    }
    check_bytes(found, source)
    return found


def check_bytes(found: dict[str, Any], source: Store) -> None:
    """Raise `CatsError` where counted bytes are not those of the plan, or not those that the disk delivered."""
    counted, planned = found["bytes_per_token"], found["planned_bytes_per_token"]
    if source.streamer is None:
        return
    if abs(counted - planned) > TOLERANCE * planned:
        raise CatsError(
            f"{counted:.0f} bytes per token were counted and {planned:.0f} follow from the plan, more than {TOLERANCE:.0%} apart; "
            "the stream reads what it should not, or the count is wrong."
        )
    disk, taken = found["disk_bytes"], found["taken_bytes"]
    ahead = source.plan.ring_bytes + source.streamer.bytes_discarded
    if disk and source.streamer.mode == "direct" and abs(disk - taken) > TOLERANCE * taken + ahead:
        raise CatsError(
            f"the kernel says that {disk} bytes came off the disk and {taken} were counted, more than {TOLERANCE:.0%} apart; "
            "another part of the process reads from the disk, or weights are read twice."
        )


def planned_bytes(source: Store, nodes: float) -> float:
    """Bytes that one pass takes from flash: the windows of what is streamed, and one row of the embedding table per node."""
    streamed = sum(window_bytes(source.places[source.names[piece]]) for piece in source.plan.streamed)
    table = source.places[EMBEDDING]
    if table == source.places[HEAD]:
        return streamed
    rows, width = table.shape[0], table.nbytes // table.shape[0]
    return streamed + nodes * sum(window(table.offset + row * width, width)[1] for row in range(rows)) / rows


def shape_of(model: MultiAdapterCATSModel, method: MethodConfig, source: Store) -> ModelShape:
    """What the paper's formula needs, in bytes as stored."""
    drafts = "draft" in model.adapters
    layer = sum(place.nbytes for name, place in source.places.items() if name.startswith("model.layers.0."))
    return ModelShape(
        layers=model.base.layer_count,
        draft_exit=int(model.adapters["draft"].exit_layer or 0) if drafts else 0,
        draft_passes=method.draft_passes if drafts else 0,
        bytes_per_layer=layer,
    )


def disk_bytes() -> int | None:
    """Bytes that the disk delivered to this process so far (/proc/self/io); None on systems that do not say."""
    process = psutil.Process()
    return int(process.io_counters().read_bytes) if hasattr(process, "io_counters") else None


def rendered(rows: Sequence[tuple[Row, dict[str, Any]]], paper: str) -> str:
    """Markdown."""
    head = (
        *("budget, weights", "method", "pinned", "accepted length", "tokens/s", "against Baseline", "compute s/token"),
        *("streamed/token, counted", "by the plan", "by the paper's formula", paper),
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    speeds = {(row.budget_bytes, row.pinning): found.get("tokens_per_s") for row, found in rows if row.name == "Baseline"}
    for row, found in rows:
        budget, pinned = amount(row.budget_bytes), "yes" if row.pinning else "no"
        exits = ", ".join(f"{name[0]}={layer}" for name, layer in found["exits"].items())
        method = f"{row.name}, {exits}" if exits else row.name
        if "refused" in found:
            cells = [budget, method, pinned, "does not fit: " + found["refused"].partition(";")[0], *[""] * 6, row.paper]
        else:
            speed, base = found["tokens_per_s"], speeds[row.budget_bytes, row.pinning]
            cells = [
                *(budget, method, pinned, f"{found['accepted_length']:.2f}", f"{speed:.3f}"),
                *("-" if base is None else f"{speed / base:.2f}x", f"{found['compute_s_per_token']:.4f}"),
                *(amount(round(found[name])) for name in ("bytes_per_token", "planned_bytes_per_token", "paper_bytes_per_token")),
                row.paper,
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(
    args: argparse.Namespace, name: str, exercise: Exercise, measured: Sequence[tuple[Row, dict[str, Any]]], about: dict[str, Any]
) -> str:
    """The Markdown file about the model of that name."""
    rate = exercise.flash_bandwidth
    flash = "the disk as it is" if rate is None else f"emulated {rate_text(rate)}"
    return (
        f"# {TITLES[args.table]}: {name}\n\nBudgets cover the weights only. {len(exercise.prompts)} "
        f"prompt(s) of {args.bench}, at most {args.max_new_tokens} tokens each, greedy; flash: {flash}; {about['threads']} thread(s), "
        f"{about['cpu']}. Speeds are of single runs, prefill left out. Streamed bytes are those read: windows of matrices and rows of "
        "the embedding table; by the plan: bytes of a pass by accepted length. The paper's formula charges the draft's layers again in "
        f"every drafting pass of a full cycle, and knows no pinning.\n\n{rendered(measured, PAPER_COLUMNS[args.table])}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="python -m evaluation.tables", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("table", choices=tuple(TABLES), help="table 3 or table 4 of the paper")
    place = "DIRECTORY_OR_HUB_ID"
    parser.add_argument("--model-path", metavar=place, help="checkpoint with safetensors (default: the default model and its adapters)")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER", help="folder of adapters, as training writes it")
    parser.add_argument("--draft-adapter-path", metavar=place, help="the draft adapter (default: the first exit of --adapters)")
    parser.add_argument("--shallow-adapter-paths", nargs="+", metavar=place, help="to choose from (default: other exits of --adapters)")
    parser.add_argument("--budgets", nargs="+", metavar="BYTES", help="like 4GB 10GB, of weights (default: the paper's, scaled)")
    parser.add_argument(
        "--bench", choices=(*ALIASES, *BENCHES), default="mtbench", help="first turns of its questions (default: %(default)s)"
    )
    parser.add_argument("--questions", type=int, default=4, help="first so many (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per answer (default: %(default)s)")
    parser.add_argument("--flash-bandwidth", help="imitate a slower flash, like 2GB/s (default: the disk as it is)")
    parser.add_argument("--ring-buffers", type=int, default=3, help="size of the ring in largest matrices (default: %(default)s)")
    parser.add_argument("--dtype", choices=(*DTYPES, "auto"), default="auto", help="that weights are held in (default: see config.json)")
    parser.add_argument("--template", help="name of the chat template, or a .jinja file (default: the model's own)")
    parser.add_argument("--output", type=Path, required=True, help="result file (.json); a .md table lies beside it")
    return parser.parse_args(argv)


def chosen_places(args: argparse.Namespace) -> tuple[str, Path, Path, list[Path]]:
    """Name and directory of the model, its draft adapter and its shallow adapters; what is missing raises `CatsError`."""
    name, directory, brought = base_model(args.model_path)
    given = (args.draft_adapter_path, args.shallow_adapter_paths)
    if None not in given and args.adapters is not None:
        raise CatsError("--adapters does nothing where every adapter has a place of its own; leave it out.")
    folder = args.adapters or next((place.parent for place in brought.values()), None)
    if None in given and folder is None:
        raise CatsError("the tables need a draft adapter and shallow ones; give --adapters FOLDER, or the places of all of them.")
    known = [places[0] for places in adapters_in(folder).values()] if None in given and folder is not None else []
    draft = locate(given[0]) if given[0] is not None else next(iter(known), None)
    shallows = [locate(place) for place in given[1]] if given[1] is not None else known[1:]
    if draft is None or not shallows:
        raise CatsError(f"{folder} holds {len(known)} adapters that say their exits; a draft adapter and a shallow one are needed.")
    check_exits(draft, shallows)
    return name, directory, draft, shallows


def exercise_of(args: argparse.Namespace, directory: Path, text: ModelText) -> Exercise:
    """Prompts and settings."""
    questions = select_questions(read_questions(resolve_bench(ALIASES.get(args.bench, args.bench)).path), 0, args.questions)
    return Exercise(
        model_path=directory,
        prompts=[text.prompt_ids(question.turns[0]) for question in questions],
        config=GenerationConfig(max_new_tokens=args.max_new_tokens, eos_token_ids=text.end_token_ids),
        dtype=args.dtype,
        flash_bandwidth=None if args.flash_bandwidth is None else float(parse_amount(args.flash_bandwidth, "--flash-bandwidth")),
        ring_buffers=args.ring_buffers,
    )


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row, write the table."""
    args = parse(argv)
    if args.questions < 1 or args.max_new_tokens < 2:
        raise CatsError("give at least 1 of --questions and 2 of --max-new-tokens.")
    name, directory, draft, shallows = chosen_places(args)
    exercise = exercise_of(args, directory, load_text(directory, args.template))
    given = [(parse_amount(text, "--budgets"), 0) for text in args.budgets or ()]
    budgets = given or scaled_budgets(directory, max(stored_bytes(path) for path in (draft, *shallows)))
    measured: list[tuple[Row, dict[str, Any]]] = []
    rows = list(TABLES[args.table](budgets, draft, shallows))
    with live_bar(total=len(rows), unit="row") as bar:
        for row in rows:
            bar.set_description(f"{amount(row.budget_bytes)}, {row.name}, {'pinned' if row.pinning else 'not pinned'}")
            measured.append((row, measure(row, exercise)))
            bar.update()
    about = environment()
    text = report(args, name, exercise, measured, about)
    lines = [
        {"budget_bytes": row.budget_bytes, "method": row.name, "pinning": row.pinning, "paper": row.paper, **found}
        for row, found in measured
    ]
    write_json(args.output, {"table": args.table, "rows": lines, "flash_bandwidth": exercise.flash_bandwidth, "environment": about})
    write_atomically(args.output.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
