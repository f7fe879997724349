"""What this machine takes for the parts of a cycle, measured on a model's own first layers, and kept in the user's cache directory.

A few layers of the checkpoint are held, as a run under a budget holds them, and driven through the engine's own steps: passes of several
widths through one layer and through all of them (their difference is a layer, the rest of the shorter one what a pass takes beside its
layers), an adapter with the head, the head alone, and whole steps of plain decoding (what is left of them is the engine's own). The
reader streams the checkpoint's matrices by itself. All of it is a matter of seconds.

A profile holds for one processor, number of threads, pair of dtypes, storage, shape of the model and version of this measurement, and for
nothing else. The flash's rate alone would hold for another model on the same storage too, but costs no second to measure again.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from cats import engine
from cats.adapter import AdapterModel
from cats.cats_model import MultiAdapterCATSModel
from cats.checkpoint import TensorPlace, load_strictly, tensor_forms
from cats.config import GenerationConfig
from cats.dtypes import narrowest
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.embedding import Embedding
from cats.kernels import why_not
from cats.linear import WorkSpace, replace_projections
from cats.methods.autoregressive import Autoregressive, AutoregressiveConfig
from cats.planning.profile import MachineProfile, Table, load_machine, save_machine, seconds_for
from cats.runtime.link import Link
from cats.runtime.streamer import Streamed, Streamer, ring_for
from cats.smollm2 import Report, cache_directory
from cats.state import Cycle, DecodeState

ROWS = (1, 2, 6, 11, 20, 40)
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
        directory: of the checkpoint; `places` says where its tensors lie.
        held, compute: the pair of dtypes (cats/dtypes.py).
        adapter: directory and exit of the adapter that is timed, and its bytes; None where there is none.
        room: bytes of weights that may be held while measuring; None sets no limit.
    """

    directory: Path
    config: PretrainedConfig
    places: Mapping[str, TensorPlace]
    held: torch.dtype
    compute: torch.dtype
    device: torch.device
    adapter: tuple[Path, int] | None
    adapter_bytes: int
    room: int | None

    @property
    def key(self) -> dict[str, Any]:
        """What a profile holds for."""
        layer = {name: list(place.shape) for name, place in self.places.items() if name.startswith("model.layers.0.")}
        stored = sorted({str(place.dtype) for place in self.places.values()})
        return {
            "processor": processor() if self.device.type == "cpu" else torch.cuda.get_device_name(self.device),
            "threads": torch.get_num_threads(),
            "dtypes": [*stored, str(self.held), str(self.compute)],
            "storage": storage_of(next(iter(self.places.values())).path),
            "model": {"layers": self.config.num_hidden_layers, "vocab": self.config.vocab_size, "layer": layer},
            "adapter_bytes": self.adapter_bytes,
            "versions": [torch.__version__, platform.python_version(), why_not() or "compiled"],
        }

    @property
    def layers(self) -> int:
        """Layers to hold: enough to lie beyond the processor's cache, where there is room."""
        nbytes = {name: narrowest(place.dtype, self.held).itemsize * math.prod(place.shape) for name, place in self.places.items()}
        layer = sum(size for name, size in nbytes.items() if name.startswith("model.layers.0."))
        head = sum(size for name, size in nbytes.items() if not name.startswith("model.layers."))
        room = BEYOND_CACHE if self.room is None else min(BEYOND_CACHE, self.room)
        return min(max((room - head) // layer, FEWEST_LAYERS), self.config.num_hidden_layers)


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
    flash, take = reader_seconds(subject.places)
    report("measuring: loading layers", 0.1)
    model = first_layers(subject)
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
    report("measuring steps", 0.9)
    tables = tables_of(timed, model.base.layer_count)
    step = plain_step_seconds(model, prompt, tables)
    report("loading", 1.0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return MachineProfile(subject.key, now, flash, take, step, **(tables if subject.adapter else {**tables, "exit_seconds": ()}))


def first_layers(subject: Subject) -> MultiAdapterCATSModel:
    """The model's first layers, resident as a budget would have them, with one adapter at exit 1."""
    config = copy.deepcopy(subject.config)
    config.num_hidden_layers = subject.layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: subject.layers]
    with torch.device("meta"):
        causal_lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    work = WorkSpace()
    replace_projections(causal_lm, work)
    wanted = causal_lm.state_dict().keys()
    forms = {name: form for name, form in tensor_forms(subject.directory).items() if name in wanted}
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        resting = narrowest(tensor.dtype, subject.held) if tensor.dim() > 1 else subject.compute
        return tensor.to(device=subject.device, dtype=resting, copy=True)

    load_strictly(causal_lm, subject.directory, forms, f"the checkpoint in {subject.directory}", place, tied)
    causal_lm.model.embed_tokens = Embedding(causal_lm.model.embed_tokens.weight, subject.compute)
    base = EarlyExitLlamaForCausalLM(causal_lm, config, subject.compute, work=work, held_dtype=subject.held).eval()
    base.compile()
    model = MultiAdapterCATSModel(base)
    if subject.adapter is not None:
        name = str(subject.held).removeprefix("torch.")
        adapter = AdapterModel.from_pretrained(*subject.adapter, name, subject.device, sparing=True)
        adapter.exit_layer = 1
        model.add_adapter("draft", adapter)
    return model


def round_seconds(state: DecodeState, rows: int) -> tuple[float, ...]:
    """Medians of: one layer, adapter with head and best tokens, the other layers, norm and head."""
    device, layers = state.base.device, state.base.layer_count
    found: list[list[float]] = []
    begin = clock(device)
    while len(found) <= ROUNDS and (len(found) < FEWEST_ROUNDS or clock(device) - begin < ROUNDS_SECONDS):
        cycle = Cycle(state, depth_limit=state.base.context)
        nodes = [0]
        while len(nodes) < rows:
            nodes.append(cycle.tree.add(nodes[-1], len(nodes) % state.base.config.vocab_size, "trunk"))
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
        found.append([after - before for before, after in itertools.pairwise(times)])
    return tuple(statistics.median(column) for column in zip(*found[1:], strict=True))


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


def reader_seconds(places: Mapping[str, TensorPlace]) -> tuple[float, float]:
    """Bytes per second of the reader over the layers' matrices, and seconds of taking one that has arrived."""
    order = [Streamed(name, place) for name, place in places.items() if name.startswith("model.layers.") and len(place.shape) == 2]
    order.sort(key=lambda streamed: (str(streamed.place.path), streamed.place.offset))
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
