"""What a run does, cycle by cycle: rows on the terminal while it answers, JSON lines in a file, and a picture of who was busy when.

    python -m evaluation.live_view FILE.jsonl [--timeline OUT.png] [--cycles A:B]

reads a file that CATS_dynamic wrote by --trace-file, prints its cycles as a table, and draws them. Knows traces and clocks;
knows no model, no method and no text.

A line of the file is one cycle. Times are seconds: `started` since the epoch, spans, waits and reads since `started`.

    {"model_id": "...", "run": 0, "question_id": 81, "turn": 0, "cycle": 3, "prefill": false, "started": 1.7e9,
     "seconds": {"draft": 0.1, ...}, "bytes_streamed": 2000000000, "nodes": 6, "accepted": 3, "committed": 4, "shallow_accepted": 4,
     "layer_passes": 44, "spans": [["draft", 0.0, 0.1], ...], "waits": [[0.31, 0.4], ...], "reads": [[-0.2, 0.4, 2000000000], ...]}

A read belongs to the cycle during which it ended; it may have begun before that cycle, since the reader runs ahead.
"""

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cats import CatsError, Generation
from cats.cli.command import CommandParser, exit_with_sentence
from cats.files import write_atomically
from cats.trace import ACROSS, StepTrace
from evaluation.metrics import ratio
from evaluation.record_file import Record, append_record, read_records

COUNTS = ("bytes_streamed", "nodes", "accepted", "committed", "shallow_accepted", "layer_passes")
STAGES = ("draft", "shallow", "target")  # these have a column whatever a method does
HIDDEN = ("accept", *ACROSS)  # and these have none of their own
COLUMN = 8  # least width of a column of seconds
ROWS_BETWEEN_HEADINGS = 40
SAME_READ = 1e-3  # seconds between two reads below which they are written and drawn as one
SHORTEST_WAIT = 1e-4  # seconds
LANES = {"draft": "#4878d0", "shallow": "#ee854a", "target": "#6acc64", "accept": "#797979", "waiting": "#d65f5f", "reader": "#956cb4"}
FORMATS = (".png", ".svg", ".pdf")
DRAWN = 20  # cycles in a picture, where none are named
Bar = tuple[float, float]  # begin and length, in seconds


class LiveView:
    """Takes the steps of a run as they are done, and shows each as a row, a line of a file, or both.

    Steps outside `begin_turn` and `end_turn`, those of a warm-up, are left out.

    Args:
        show: called with each row of the table; None shows nothing.
        file: gets a line per cycle, behind the lines that it holds; None writes nothing.
        streamer: of streamed weights; with a file, its `events` (reads) are recorded, and its `waits` if it keeps any.
    """

    def __init__(self, show: Callable[[str], object] | None, file: Path | None, streamer: Any = None):
        self._show, self._file, self._streamer = show, file, streamer if file is not None else None
        self._since_epoch = time.time() - time.perf_counter()
        self._label: Mapping[str, Any] | None = None
        self._told = 0.0
        self._cycle = self._rows = 0
        self._stages = stages_of(())
        if self._streamer is not None:
            self._streamer.record = True

    def begin_turn(self, label: Mapping[str, Any]) -> None:
        """The steps that follow belong to this answer: its model_id, run, question_id and turn."""
        self._label, self._cycle = label, 0
        self._told = self._told or time.perf_counter()

    def end_turn(self, generation: Generation) -> None:
        """The answer is done; what did not come step by step comes now."""
        for trace in generation.traces[self._cycle :]:
            self.step(trace)
        self._label = None

    def step(self, trace: StepTrace) -> None:
        """One step is done."""
        if self._label is None:
            return
        since, self._told = self._told, trace.started + trace.seconds.total
        reads, waits = (ended(getattr(self._streamer, name, ()), since, self._told) for name in ("events", "waits"))
        record = cycle_record({**self._label, "cycle": self._cycle}, trace, reads, waits, self._since_epoch)
        self._cycle += 1
        if self._file is not None:
            append_record(self._file, record, durable=False)
        if self._show is not None:
            self._show_row(record)

    def _show_row(self, record: Record) -> None:
        """Show a cycle, below a heading where one is due: every so many rows, and where a stage has its first second."""
        assert self._show is not None
        stages = stages_of([record], self._stages)
        if self._rows % ROWS_BETWEEN_HEADINGS == 0 or stages != self._stages:
            self._show(heading(stages))
        self._stages = stages
        self._show(cycle_row(record, stages))
        self._rows += 1


def ended(spans: Sequence[Sequence[Any]], since: float, until: float) -> list[Sequence[Any]]:
    """Of (begin, end, ...) in the order of their ends: those that ended after `since` and not after `until`."""
    late = list(itertools.takewhile(lambda span: span[1] > since, reversed(spans)))
    return [span for span in reversed(late) if span[1] <= until]


def cycle_record(
    label: Mapping[str, Any],
    trace: StepTrace,
    reads: Iterable[Sequence[Any]],
    waits: Iterable[Sequence[float]],
    since_epoch: float,
) -> Record:
    """The line of one cycle; see the head of this file. All times given are of one clock, whose zero is `since_epoch`.

    Args:
        reads: (begin, end, name, bytes) of each, in order.
        waits: (begin, end) of each; those too short to be seen are left out.
    """

    def here(moment: float) -> float:
        return round(moment - trace.started, 6)

    return {
        **label,
        "prefill": trace.prefill,
        "started": round(since_epoch + trace.started, 6),
        "seconds": {name: round(seconds, 6) for name, seconds in trace.seconds.items()},
        **{name: getattr(trace, name) for name in COUNTS},
        "spans": [[stage, here(begin), here(end)] for stage, begin, end in trace.spans],
        "waits": [[here(begin), here(end)] for begin, end in waits if end - begin >= SHORTEST_WAIT],
        "reads": [[here(begin), here(end), nbytes] for begin, end, nbytes in joined(reads)],
    }


def joined(reads: Iterable[Sequence[Any]]) -> list[tuple[float, float, int]]:
    """Reads (begin, end, name, bytes) as (begin, end, bytes), those that follow on each other put together."""
    spans: list[tuple[float, float, int]] = []
    for begin, end, _, nbytes in reads:
        if spans and begin - spans[-1][1] < SAME_READ:
            begin, _, before = spans.pop()
            nbytes += before
        spans.append((begin, end, nbytes))
    return spans


def stages_of(records: Iterable[Record], known: Sequence[str] = STAGES) -> tuple[str, ...]:
    """Stages that have a column: the known ones, then those that the records add."""
    return (*known, *dict.fromkeys(stage for record in records for stage in record["seconds"] if stage not in (*known, *HIDDEN)))


def columns(stages: Sequence[str]) -> dict[str, int]:
    """Heading -> width."""
    seconds = [f"{name} s" for name in (*stages, "wait", "total")]
    return {
        **{"question": 10, "turn": 5, "cycle": 6},
        **{name: max(COLUMN, len(name)) for name in seconds},
        **{"read MB": 10, "nodes": 6, "accepted": 9, "committed": 10},
    }


def heading(stages: Sequence[str]) -> str:
    """The first row."""
    return row(columns(stages), stages)


def row(cells: Iterable[object], stages: Sequence[str]) -> str:
    """Cells of the table side by side."""
    return " ".join(str(cell).rjust(width) for cell, width in zip(cells, columns(stages).values(), strict=True))


def cycle_row(record: Record, stages: Sequence[str]) -> str:
    """One cycle of the table; cycle 0 is the reading of the prompt."""
    seconds = [f"{record['seconds'].get(stage, 0.0):.3f}" for stage in (*stages, "stream_wait", "total")]
    counts = [record[name] for name in ("nodes", "accepted", "committed")]
    cycle = "prompt" if record["prefill"] else record["cycle"]
    return row((record["question_id"], record["turn"], cycle, *seconds, f"{record['bytes_streamed'] / 1e6:.1f}", *counts), stages)


def read_cycles(path: Path) -> list[Record]:
    """The cycles of a file, in the order in which they were made; of an answer that was begun more than once, only the last attempt's."""
    if not path.is_file():
        raise CatsError(f"there is no file {path}; give one that CATS_dynamic wrote by --trace-file.")
    needed = ("question_id", "turn", "cycle", "prefill", "started", "seconds", "spans", *COUNTS)
    cycles: dict[tuple[Any, ...], Record] = {}
    for number, record in enumerate(read_records(path), start=1):
        missing = [name for name in needed if name not in record]
        if missing:
            raise CatsError(f"line {number} of {path} has no {missing[0]!r}; give a file that CATS_dynamic wrote by --trace-file.")
        answer = (record.get("model_id"), record.get("run"), record["question_id"], record["turn"])
        if (*answer, record["cycle"]) in cycles:
            cycles = {key: kept for key, kept in cycles.items() if key[:-1] != answer or key[-1] < record["cycle"]}
        cycles[*answer, record["cycle"]] = record
    if not cycles:
        raise CatsError(f"{path} holds no cycle yet; wait for the first answer.")
    return list(cycles.values())


def parse_range(text: str) -> slice:
    """`A:B` as the cycles at positions A to B, B not included; either may be left out."""
    begin, colon, end = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (begin, end)):
        raise CatsError(f"--cycles {text!r} is no range; write A:B, positions from 0 in the file's order, B not included.")
    return slice(int(begin) if begin else None, int(end) if end else None)


def table(cycles: Sequence[Record]) -> str:
    """The cycles as rows, and below them the sums of each model_id."""
    stages = stages_of(cycles)
    lines = [heading(stages), *(cycle_row(record, stages) for record in cycles)]
    for model_id in dict.fromkeys(record.get("model_id") for record in cycles):
        lines += ["", summary_line([record for record in cycles if record.get("model_id") == model_id])]
    return "\n".join(lines) + "\n"


def summary_line(cycles: Sequence[Record]) -> str:
    """Averages over the cycles of one model_id, the reading of prompts left out."""
    counted = [record for record in cycles if not record["prefill"]]
    stages = (*stages_of(counted), "stream_wait")
    total = {stage: sum(record["seconds"].get(stage, 0.0) for record in counted) for stage in (*stages, "total")}
    tokens, streamed = (sum(record[name] for record in counted) for name in ("committed", "bytes_streamed"))
    shares = ", ".join(f"{stage.replace('_', ' ')} {100 * (ratio(total[stage], total['total']) or 0):.0f} %" for stage in stages)
    return (
        f"{cycles[0].get('model_id')}: {len(counted)} cycles, {ratio(tokens, len(counted)) or 0:.2f} tokens and "
        f"{ratio(total['total'], len(counted)) or 0:.3f} s each ({shares}), {(ratio(streamed, tokens) or 0) / 1e6:.1f} MB read per token"
    )


def lanes_of(cycles: Sequence[Record]) -> dict[str, list[Bar]]:
    """Bars of every lane that has any, in seconds since the first cycle began."""
    zero = cycles[0]["started"]
    bars: dict[str, list[Bar]] = {lane: [] for lane in LANES}
    for record in cycles:
        begin = record["started"] - zero
        spans = [tuple(span) for span in record["spans"]]
        spans += [("waiting", *wait) for wait in record.get("waits", [])] + [("reader", *read[:2]) for read in record.get("reads", [])]
        for lane, first, last in spans:
            bars.setdefault(lane, []).append((begin + first, last - first))
    return {lane: own for lane, own in bars.items() if own}


def draw_timeline(cycles: Sequence[Record], path: Path) -> None:
    """Write the picture: a lane each for the stages, waiting and the reader; a line where a cycle begins, with the tokens it committed."""
    from matplotlib.figure import Figure  # only this command needs it, and it takes a second to load

    lanes = lanes_of(cycles)
    zero = cycles[0]["started"]
    figure = Figure(figsize=(12, 1.2 + 0.4 * len(lanes)), layout="constrained")
    axes = figure.add_subplot()
    for height, (lane, bars) in enumerate(lanes.items()):
        axes.broken_barh(bars, (height - 0.4, 0.8), color=LANES.get(lane, "#444444"))
    for record in cycles:
        begin = record["started"] - zero
        axes.axvline(begin, color="#bbbbbb", linewidth=0.6, zorder=0)
        axes.text(begin, -0.55, f"+{record['committed']}", fontsize=7, va="bottom")
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.set_ylim(len(lanes) - 0.5, -1.0)
    axes.set_xlabel("seconds (a line where a cycle begins, with the tokens it commits)")
    write_atomically(path, lambda part: figure.savefig(part, format=path.suffix[1:], dpi=120))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(prog="live_view", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("file", type=Path, help="written by CATS_dynamic --trace-file")
    parser.add_argument("--timeline", type=Path, metavar="OUT", help=f"draw who was busy when into this file ({', '.join(FORMATS)})")
    parser.add_argument("--cycles", metavar="A:B", help=f"only these positions of the file (default: all, of which {DRAWN} are drawn)")
    return parser.parse_args(argv)


def check_trace_place(path: Path) -> None:
    """Raise `CatsError` where a trace file of that name could not be written."""
    writable = os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK | os.X_OK)
    if not path.parent.is_dir() or path.is_dir() or not writable:
        raise CatsError(f"--trace-file {path} cannot be written; name a file in a folder that is there and can be written.")


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, draw the picture."""
    args = parse(argv)
    if args.timeline is not None and args.timeline.suffix not in FORMATS:
        raise CatsError(f"--timeline {args.timeline} is no picture that can be drawn; let the name end in {', '.join(FORMATS)}.")
    cycles = read_cycles(args.file)
    chosen = cycles[parse_range(args.cycles)] if args.cycles is not None else cycles
    if not chosen:
        raise CatsError(f"--cycles {args.cycles} holds none of the {len(cycles)} cycles in {args.file}; positions count from 0.")
    sys.stdout.write(table(chosen))
    if args.timeline is not None:
        drawn = chosen if args.cycles is not None else chosen[:DRAWN]
        draw_timeline(drawn, args.timeline)
        sys.stdout.write(f"{len(drawn)} cycles drawn in {args.timeline}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends the command without a word
    main()
