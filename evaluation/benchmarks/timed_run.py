"""One timed run of an engine: what is asked of it, tokens one pass after the other, and what they cost.

Needs nothing but the standard library, so that an engine may run in an interpreter that has neither torch nor our model code.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cats.files import write_atomically
from evaluation.memory_run import bytes_read, peak_bytes, private_bytes, reset_peak

if TYPE_CHECKING:
    from cats.trace import StepTrace

EXTRA_CYCLES = 8
"""Cycles that a run may go on for until a replayed schedule stands at its mean."""


@dataclass(frozen=True)
class Request:
    """One run.

    Attributes:
        engine: a key of `ENGINES` in budget_engines.py or peer_engines.py.
        model: a checkpoint directory.
        adapters: draft and shallow adapter, for CATS.
        budget_bytes: of the whole process; None: no limit.
        dtype: of our weights in memory; "auto": as stored. The other engines compute in the stored one.
        compute_dtype: of our arithmetic and caches.
        tokens: how many to time, at least.
        positions: that our caches are made for; None: what the run needs.
        steps: drafted tokens of CATS or of nested.
        replayed_acceptance: accepted length of the replayed schedule; None decodes with the draft's own acceptance.
        replayed_corrections: of CATS.
        converted: a peer's own copy of the same weights: a GGUF file, AirLLM's folder of layers.
    """

    engine: str
    model: str
    adapters: tuple[str, str] | None
    budget_bytes: int | None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    tokens: int = 8
    positions: int | None = None
    prompt_tokens: int = 32
    threads: int = 1
    ring_buffers: int = 3
    steps: int = 5
    tree_topk: int = 1
    total_tokens: int = -1
    replayed_acceptance: float | None = None
    replayed_corrections: float = 1.0
    converted: str | None = None


@dataclass(frozen=True)
class Step:
    """Tokens that one pass over the model committed; the trace where the engine is ours."""

    tokens: list[int]
    trace: "StepTrace | None" = None


@dataclass(frozen=True)
class Engine:
    """A loaded model: prompt ids -> steps, the first of which is the prompt's; and what a reader should know of it."""

    steps: Callable[[Sequence[int]], Iterator[Step]]
    notes: dict[str, Any]


def timed_enough(request: Request, tokens: int, steps: int) -> bool:
    """Whether the tokens asked for are there, and a replayed schedule stands at its mean: short runs must not show its scatter."""
    if tokens < request.tokens:
        return False
    mean = request.replayed_acceptance
    late = mean is not None and steps * mean > request.tokens + EXTRA_CYCLES * mean
    return mean is None or late or abs(tokens - steps * mean) <= 0.5


def prompt_of(request: Request) -> list[int]:
    """Random ids, the same for every engine."""
    vocabulary = json.loads((Path(request.model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return random.Random(0).choices(range(3, vocabulary), k=request.prompt_tokens)


def measure(request: Request, engines: Mapping[str, Callable[[Request], Engine]]) -> dict[str, Any]:
    """Load the engine asked for, run it, and say what it cost."""
    reset_peak()
    begin = time.perf_counter()
    engine = engines[request.engine](request)
    loaded = time.perf_counter()
    load_peak = peak_bytes()
    steps = engine.steps(prompt_of(request))
    ids = [*next(steps).tokens]
    prefilled = time.perf_counter()
    ids += next(steps).tokens
    reset_peak()
    timed: list[Step] = []
    read_before, start = bytes_read(), time.perf_counter()
    tokens = 0
    while not timed_enough(request, tokens, len(timed)):
        timed.append(next(steps))
        tokens += len(timed[-1].tokens)
    seconds, read = time.perf_counter() - start, bytes_read() - read_before
    traces = [step.trace for step in timed if step.trace is not None]
    return {
        "tokens": tokens,
        "steps": len(timed),
        "accepted_length": tokens / len(timed),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "seconds_per_step": seconds / len(timed),
        "disk_bytes_per_token": read / tokens,
        "disk_bytes_per_step": read / len(timed),
        "stage_seconds_per_step": {
            stage: sum(trace.seconds[stage] for trace in traces) / len(traces)
            for stage in dict.fromkeys(stage for trace in traces for stage in trace.seconds)
        }
        if traces
        else None,
        "streamed_bytes_per_step": sum(trace.bytes_streamed for trace in traces) / len(traces) if traces else None,
        "nodes_per_step": sum(trace.nodes for trace in traces) / len(traces) if traces else 1,
        "load_seconds": loaded - begin,
        "prefill_seconds": prefilled - loaded,
        "load_peak_bytes": load_peak,
        "peak_bytes": peak_bytes(),
        "private_bytes": private_bytes(),
        "ids": ids + [token for step in timed for token in step.tokens],
        "notes": engine.notes,
    }


def answer(files: Sequence[str], engines: Mapping[str, Callable[[Request], Engine]]) -> None:
    """Run what the first of two files asks for, write the second."""
    asked, result = (Path(name) for name in files)
    fields = json.loads(asked.read_text(encoding="utf-8"))
    fields["adapters"] = tuple(fields["adapters"]) if fields["adapters"] else None
    measured = measure(Request(**fields), engines)
    write_atomically(result, lambda part: part.write_text(json.dumps(measured)))
