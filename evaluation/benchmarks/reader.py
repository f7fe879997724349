"""How much of the disk's rate the streaming reader reaches, with a consumer that only takes the tensors.

    python -m evaluation.benchmarks.reader --model-path DIR [--ring-buffers K] [--repeats 5] --output FILE

In turns, in one process: a pass of the streamer over every matrix of the decoder layers, and a plain sequential read of the
same files (past the page cache, 16 MiB at a time, into huge pages). Bytes are those asked from the device; each side starts
on an idle disk. The ratio is the median of the pairs' quotients, so that noise that lasts longer than a pair cancels.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats.checkpoint import TensorPlace, locate_tensors
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from cats.runtime.arena import Arena
from cats.runtime.direct_file import REQUEST_BYTES, DirectFile
from cats.runtime.link import Link
from cats.runtime.streamer import Streamed, Streamer, ring_for
from evaluation.timing import environment

EXECUTION_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUIET_SECONDS = 0.1


def matrices(places: dict[str, TensorPlace]) -> list[Streamed]:
    """The matrices of the decoder layers, in the order of use."""
    ordered = []
    for name, place in places.items():
        match = re.search(r"(?:^|\.)layers\.(\d+)\..*?(\w+)\.weight$", name)
        if match and match[2] in EXECUTION_ORDER:
            ordered.append((int(match[1]), EXECUTION_ORDER.index(match[2]), Streamed(name, place)))
    if not ordered:
        raise CatsError("the checkpoint has no matrices of decoder layers; give the directory of a Llama model in safetensors.")
    return [streamed for _, _, streamed in sorted(ordered, key=lambda item: item[:2])]


def streamed_rate(streamer: Streamer) -> float:
    """Bytes per second of one pass that begins with a full ring on an idle disk; what the ring held is not counted."""
    become_quiet(streamer)
    before, begin = streamer.bytes_read, time.perf_counter()
    for streamed in streamer.order:
        with streamer.tensor(streamed.name):
            pass
    rate = (streamer.bytes_read - before) / (time.perf_counter() - begin)
    become_quiet(streamer)
    return rate


def become_quiet(streamer: Streamer) -> None:
    """Wait until the ring is full and the reader rests."""
    before = -1
    while before != streamer.bytes_read:
        before = streamer.bytes_read
        time.sleep(QUIET_SECONDS)


def raw_rate(files: Sequence[DirectFile], arena: Arena) -> float:
    """Bytes per second of a sequential read of whole files."""
    nbytes, begin = 0, time.perf_counter()
    for file in files:
        size = file.path.stat().st_size
        for offset in range(0, size, REQUEST_BYTES):
            length = min(REQUEST_BYTES, size - offset)
            file.read_into(arena.view, offset, length)
            nbytes += length
    return nbytes / (time.perf_counter() - begin)


def measure(streamer: Streamer, repeats: int) -> dict[str, Any]:
    """Rates of both, after one untimed turn of each; the order changes from pair to pair."""
    files = [DirectFile(path) for path in dict.fromkeys(streamed.place.path for streamed in streamer.order)]
    arena = Arena(REQUEST_BYTES)
    streamed, raw = [streamed_rate(streamer)], [raw_rate(files, arena)]
    for turn in live_bar(range(repeats), desc="pairs"):
        if turn % 2 == 0:
            streamed.append(streamed_rate(streamer))
            raw.append(raw_rate(files, arena))
        else:
            raw.append(raw_rate(files, arena))
            streamed.append(streamed_rate(streamer))
    quotients = [ours / theirs for ours, theirs in zip(streamed[1:], raw[1:], strict=True)]
    return {
        "streamed_bytes_per_s": streamed[1:],
        "raw_bytes_per_s": raw[1:],
        "streamed_median": statistics.median(streamed[1:]),
        "raw_median": statistics.median(raw[1:]),
        "ratio": statistics.median(quotients),
    }


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint directory with safetensors")
    parser.add_argument("--ring-buffers", type=int, default=2, help="ring of this many times the largest matrix (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="write the result here")
    arguments = parser.parse_args(argv)
    if min(arguments.ring_buffers, arguments.repeats) < 1:
        raise CatsError("--ring-buffers and --repeats are counts; give 1 or more.")
    order = matrices(locate_tensors(arguments.model_path))
    streamer = Streamer(order, ring_for(order, arguments.ring_buffers), Link())
    result = measure(streamer, arguments.repeats) | {
        "streamed_tensors": len(order),
        "bytes_per_pass": sum(streamed.place.nbytes for streamed in order),
        "ring_bytes": streamer.ring_bytes,
        "mode": streamer.mode,
        "link": streamer.link.label,
        "environment": environment(),
    }
    streamer.close()
    print(json.dumps(result, indent=1))
    write_atomically(arguments.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
