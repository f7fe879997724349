"""What this machine takes for the parts of a cycle, measured on a model's own first layers, and kept in the user's cache directory.

A few layers of the checkpoint are resident, as in a run under a budget, and driven through the engine's own steps: passes of several
widths through one layer and through all of them (their difference is a layer, the rest of the shorter one what a pass takes beside its
layers), the layers' coarse form where the weights have one, an adapter with the head, the head alone, and whole steps of plain decoding
(what is left of them is the engine's own). The reader streams the checkpoint's matrices by itself. All of it is a matter of seconds.

A profile holds for one processor, number of threads, pair of dtypes, storage, shape of the model and kind of its weights, and version of
this measurement, and for nothing else. The flash's rate alone would hold for another model on the same storage too, but costs no second
to measure again.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from cats import engine
from cats.adapter import AdapterModel
from cats.cats_model import MultiAdapterCATSModel
from cats.checkpoint import TensorPlace
from cats.config import GenerationConfig
from cats.kernels import why_not
from cats.loading import EMBEDDING, HEAD, Checkpoint, load_first_layers
from cats.methods.autoregressive import Autoregressive, AutoregressiveConfig
from cats.planning.plan import COARSE
from cats.planning.profile import MachineProfile, Table, load_machine, save_machine, seconds_for
from cats.runtime.link import Link
from cats.runtime.streamer import Streamed, Streamer, ring_for
from cats.smollm2 import Report, cache_directory
from cats.state import Cycle, DecodeState

ROWS = (1, 2, 6, 11, 20, 40)
COARSE_ROWS = (1, 8, 32)
CONTEXT = 128
"""Positions in the caches while passes are timed."""
ROUNDS = 5
FEWEST_ROUNDS = 3
ROUNDS_SECONDS = 1.0
"""When a slow machine has been timed enough at one number of rows; the first round is left out."""
BEYOND_CACHE = 192_000_000
"""Bytes of layers and head that few processors' caches hold."""
FEWEST_LAYERS = 3
READ_SECONDS = 0.75
READ_AHEAD_SECONDS = 0.5
"""How long the reader may fill the ring, at most, before it is timed how long taking from it lasts."""
RING_BUFFERS = 4
BEST_TOKENS = 10


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        places: where the checkpoint's tensors lie.
        adapter: directory and exit of the adapter that is timed, and its bytes; None where there is none.
        room: bytes of weights that may be resident while measuring; None sets no limit.
        coarse: a copy to draft with that is made when the checkpoint is loaded (`MemoryOptions.coarse`).
    """

    checkpoint: Checkpoint
    places: Mapping[str, TensorPlace]
    device: torch.device
    adapter: tuple[Path, int] | None
    adapter_bytes: int
    room: int | None
    coarse: str | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What a profile holds for."""
        checkpoint, config = self.checkpoint, self.checkpoint.config
        layer = {name: list(place.shape) for name, place in self.places.items() if name.startswith("model.layers.0.")}
        stored = sorted({str(place.dtype) for place in self.places.values()})
        return {
            "processor": processor() if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "threads": torch.get_num_threads(),
            "dtypes": [*stored, str(checkpoint.dtype), str(checkpoint.compute)],
            "storage": storage_of(next(iter(self.places.values())).path),
            "model": {"layers": config.num_hidden_layers, "vocab": config.vocab_size, "layer": layer},
            "coarse": self.coarse,
            "adapter_bytes": self.adapter_bytes,
            "versions": [torch.__version__, platform.python_version(), why_not() or "compiled"],
        }

    @property
    def layers(self) -> int:
        """Layers to hold: enough to lie beyond the processor's cache, where there is room."""
        checkpoint = self.checkpoint
        layer = sum(piece.resident_bytes for piece in checkpoint.pieces if piece.layer == 0)
        outside = [name for name in (HEAD, EMBEDDING) if name in self.places]
        head = sum(checkpoint.resting(name).itemsize * math.prod(self.places[name].shape) for name in outside)
        room = BEYOND_CACHE if self.room is None else min(BEYOND_CACHE, self.room)
        return min(max((room - head) // layer, FEWEST_LAYERS), checkpoint.config.num_hidden_layers)

    @property
    def has_coarse(self) -> bool:
        """Whether the layers have a coarse form."""
        return any(COARSE.needs(piece) for piece in self.checkpoint.pieces)

    @property
    def streamed(self) -> list[Streamed]:
        """The layers' parts that no coarse form needs, in the order of their places: what a run that drafts with one streams."""
        names = [name for piece, name in self.checkpoint.pieces.items() if not COARSE.needs(piece)]
        order = [Streamed(name, self.places[name]) for name in names]
        return sorted(order, key=lambda streamed: (str(streamed.place.path), streamed.place.offset))


def machine_profile(subject: Subject, report: Report, again: bool = False) -> tuple[MachineProfile, bool]:
    """The profile in the cache, or else one that is measured now and kept there where that is possible; and whether it was measured now.

    Args:
        report: called while measuring, see `cats.smollm2.Report`.
        again: measure even where there is one.
    """
    key = subject.key
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_directory() / "machines" / f"{name}.json"
    known = None if again else load_machine(path, key)
    if known is not None:
        return known, False
    profile = measure(subject, report)
    with suppress(OSError):  # the next run measures again
        save_machine(profile, path)
    return profile, True


@torch.inference_mode()
def measure(subject: Subject, report: Report = lambda what, share: None) -> MachineProfile:
    """Everything, one after the other."""
    report("measuring the flash", 0.0)
    flash, take = reader_seconds(subject.streamed)
    report("measuring: loading layers", 0.1)
    model = first_layers(subject)
    try:
        tables, step = layer_seconds(subject, model, report)
    finally:
        model.close()
    report("loading", 1.0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return MachineProfile(subject.key, now, flash, take, step, **tables)


def layer_seconds(subject: Subject, model: MultiAdapterCATSModel, report: Report) -> tuple[dict[str, Table], float]:
    """The tables of a profile, and what a step takes outside all passes."""
    prompt = [token % model.base.config.vocab_size for token in range(min(CONTEXT, model.base.context // 2))]
    names = ("draft",) if subject.adapter else ()
    widest = min(ROWS[-1], model.base.context - len(prompt) - 2)
    rows = [count for count in ROWS if count <= widest]
    state = DecodeState(model, prompt, names, len(prompt) + widest, widest)
    state.read_prompt()
    state.tokens.append(0)
    timed = {}
    for place, count in enumerate(rows):
        report(f"measuring passes of {count} rows", 0.2 + 0.6 * place / len(rows))
        timed[count] = round_seconds(state, count)
    tables = tables_of(timed, model.base.layer_count)
    if not subject.adapter:
        tables["exit_seconds"] = ()
    if subject.has_coarse:
        report("measuring the coarse form", 0.8)
        tables["coarse_layer_seconds"] = coarse_seconds(state, [count for count in COARSE_ROWS if count <= widest], tables)
    report("measuring steps", 0.9)
    return tables, plain_step_seconds(model, prompt, tables)


def first_layers(subject: Subject) -> MultiAdapterCATSModel:
    """The model's first layers, resident as a budget would have them, with one adapter at exit 1."""
    checkpoint = subject.checkpoint
    model = MultiAdapterCATSModel(load_first_layers(checkpoint, subject.layers, subject.device, subject.coarse))
    if subject.adapter is not None:
        name = str(checkpoint.dtype).removeprefix("torch.")
        adapter = AdapterModel.from_pretrained(*subject.adapter, name, subject.device, sparing=True)
        adapter.exit_layer = 1
        model.add_adapter("draft", adapter)
    return model


def round_seconds(state: DecodeState, rows: int) -> tuple[float, ...]:
    """Medians of: one layer, adapter with head and best tokens, the other layers, norm and head."""
    device, layers = state.base.device, state.base.layer_count

    def timed_round() -> list[float]:
        cycle, nodes = chain_of(state, rows)
        times = [clock(device)]
        cycle.advance(nodes, 1)
        times.append(clock(device))
        if state.adapters:
            scores_TV = torch.log_softmax(cycle.adapter_logits("draft", nodes).float(), dim=-1)
            scores_TV.topk(min(BEST_TOKENS, scores_TV.shape[1]), dim=-1).indices.tolist()
        times.append(clock(device))
        cycle.advance(nodes, layers)
        times.append(clock(device))
        cycle.target_logits(nodes)
        times.append(clock(device))
        return [after - before for before, after in itertools.pairwise(times)]

    return medians(timed_round, device)


def coarse_seconds(state: DecodeState, counts: Sequence[int], tables: Mapping[str, Table]) -> Table:
    """Seconds of a layer's coarse form by rows: a pass through all of them, less what a pass takes beside its layers."""
    device, layers = state.base.device, state.base.layer_count
    table = []
    for rows in counts:

        def timed_round(rows: int = rows) -> list[float]:
            cycle, nodes = chain_of(state, rows)
            begin = clock(device)
            cycle.advance(nodes, layers, COARSE)
            return [clock(device) - begin]

        whole = medians(timed_round, device)[0]
        table.append((rows, max(whole - seconds_for(tables["pass_seconds"], rows), 0.0) / layers))
    return tuple(table)


def chain_of(state: DecodeState, rows: int) -> tuple[Cycle, list[int]]:
    """A step in the making, with a chain of so many nodes."""
    cycle, nodes = Cycle(state, depth_limit=state.base.context), [0]
    while len(nodes) < rows:
        nodes.append(cycle.tree.add(nodes[-1], len(nodes) % state.base.config.vocab_size, "trunk"))
    return cycle, nodes


def medians(timed_round: Callable[[], list[float]], device: torch.device) -> tuple[float, ...]:
    """Of each of the figures of several rounds, the first of which is left out."""
    rounds: list[list[float]] = []
    begin = clock(device)
    while len(rounds) <= ROUNDS and (len(rounds) < FEWEST_ROUNDS or clock(device) - begin < ROUNDS_SECONDS):
        rounds.append(timed_round())
    return tuple(statistics.median(column) for column in zip(*rounds[1:], strict=True))


def tables_of(timed: Mapping[int, tuple[float, ...]], layers: int) -> dict[str, Table]:
    """Seconds by rows of a layer, of a pass beside its layers, of the head and of an exit, from `round_seconds` of `layers` layers."""
    layer, around = {}, {}
    for rows, (first, _, others, _) in timed.items():
        layer[rows] = max((others - first) / (layers - 2), 0.0) if layers > 2 else (first + others) / layers
        around[rows] = max(first - layer[rows], 0.0)
    return {
        "layer_seconds": tuple(layer.items()),
        "pass_seconds": tuple(around.items()),
        "exit_seconds": tuple((rows, seconds[1]) for rows, seconds in timed.items()),
        "head_seconds": tuple((rows, seconds[3]) for rows, seconds in timed.items()),
    }


def plain_step_seconds(model: MultiAdapterCATSModel, prompt: list[int], tables: Mapping[str, Table]) -> float:
    """What a step of plain decoding takes beyond its pass, its layers and the head."""
    config = GenerationConfig(max_new_tokens=2 * ROUNDS, eos_token_ids=())
    steps = engine.stream(model, prompt, Autoregressive(AutoregressiveConfig()), config)
    whole = statistics.median([step.trace.seconds.total for step in steps][2:])
    known = seconds_for(tables["pass_seconds"], 1) + model.base.layer_count * seconds_for(tables["layer_seconds"], 1)
    return max(whole - known - seconds_for(tables["head_seconds"], 1), 0.0)


def reader_seconds(order: Sequence[Streamed]) -> tuple[float, float]:
    """Bytes per second of the reader over these matrices, and seconds of taking one that has arrived."""
    streamer = Streamer(order, ring_for(order, RING_BUFFERS), Link())
    try:
        begin, done, taken = time.perf_counter(), 0, 0
        while (seconds := time.perf_counter() - begin) < READ_SECONDS:
            done += taking(streamer, order[taken % len(order)])[0]
            taken += 1
        takes = []
        for _ in range(ROUNDS):
            time.sleep(min(2 * streamer.ring_bytes * seconds / done, READ_AHEAD_SECONDS))
            takes += [taking(streamer, order[(taken + place) % len(order)])[1] for place in range(2)]
            taken += 2
        return done / seconds, statistics.median(takes)
    finally:
        streamer.close()


def taking(streamer: Streamer, streamed: Streamed) -> tuple[int, float]:
    """Bytes of a matrix, and seconds until it was taken and left again."""
    begin = time.perf_counter()
    with streamer.tensor(streamed.name) as weight:
        nbytes = weight.nbytes
    return nbytes, time.perf_counter() - begin


def clock(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def processor() -> str:
    """Its name and number of cores, as far as the system tells."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {psutil.cpu_count()} cores"


def storage_of(path: Path) -> str:
    """Device and file system that a file lies on, as far as the system tells."""
    number = path.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
            left, _, right = line.partition(" - ")
            if left.split()[2] == wanted:
                return " ".join(right.split()[:2])
    return wanted
