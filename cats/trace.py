"""What one step drafted, accepted and cost. Numbers only; averages and ratios are made elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cats.errors import ContractError
from cats.planning.plan import COARSE_PRECISION, View

ACROSS = ("compute", "stream_wait", "total")


class StageSeconds(dict[str, float]):
    """Wall-clock seconds of one step by name, as the host sees them: on a GPU a stage ends when its kernels are queued, and only
    `total` waits. What was never charged is 0.

    Stages, everything inside them counted: the engine's "target" and "accept" (judging and committing), and whatever names the
    method chose ("draft", "shallow", ...). Measured across stages, under the names in `ACROSS`: "total", the whole step; "compute",
    the part of it inside layers, adapters and lm_head (the rest is the engine's own overhead); "stream_wait", the part spent waiting
    for streamed weights to arrive.
    """

    def __missing__(self, name: str) -> float:
        return 0.0

    @property
    def total(self) -> float:
        """The whole step."""
        return self["total"]

    @property
    def stages(self) -> list[str]:
        """Names of stages, in the order in which they were first charged."""
        return [name for name in self if name not in ACROSS]


@dataclass(frozen=True)
class Confusion:
    """The shallow verifier's verdict against the target's over drafted tokens; positive means accepted."""

    tp: int = 0
    fp: int = 0
    fn: int = 0
    tn: int = 0


@dataclass(frozen=True)
class PassCost:
    """What one pass of a step cost; a pass takes rows through layers, or through one adapter, its head left out.

    Attributes:
        view: of the model that ran.
        rows: that went through together, an adapter's waiting tokens included.
        context: cache slots that they could see, their own included.
        layers: decoder layers that ran; 1 for an adapter.
        bytes_streamed: weight bytes taken from the stream; of a target pass that several answers share, those of all.
        seconds: as the host sees them, waiting for the stream included.
        adapter: that ran; None where the base did.
    """

    view: View
    rows: int
    context: int
    layers: int
    bytes_streamed: int
    seconds: float
    adapter: str | None = None


@dataclass(frozen=True)
class StepTrace:
    """One step of the engine.

    Attributes:
        prefill: the step that reads the prompt; it commits one token and counts in no average of accepted tokens.
        nodes: tree nodes that the target verified, root included.
        accepted: drafted tokens on the accepted path.
        committed: tokens kept from this step, the target's own next token included, cut at the end of the answer.
        accepted_kinds: kind of each accepted node, in order.
        shallow_accepted: trunk tokens that the shallow verifier agreed with before its first correction; None without one.
        confusion: see `Confusion`; None without a shallow verifier.
        layer_passes: executions of a decoder layer, however many rows each had.
        bytes_streamed: weight bytes that this step took from the stream; 0 where all weights are resident.
        seconds: see `StageSeconds`.
        started: when the step began, in seconds of `time.perf_counter`.
        spans: (stage, begin, end) of everything that ran in a stage, in order, by the same clock.
        passes: what each pass cost, in order; none are listed of a prompt.
        prompt_rows: tokens of the prompt that were run, kept caches holding the others; 0 but of a prefill.
    """

    prefill: bool
    nodes: int
    accepted: int
    committed: int
    accepted_kinds: tuple[str, ...] = ()
    shallow_accepted: int | None = None
    confusion: Confusion | None = None
    layer_passes: int = 0
    bytes_streamed: int = 0
    seconds: StageSeconds = field(default_factory=StageSeconds)
    started: float = 0.0
    spans: tuple[tuple[str, float, float], ...] = ()
    passes: tuple[PassCost, ...] = ()
    prompt_rows: int = 0

    @property
    def coarse_layer_passes(self) -> int:
        """Those of the layer passes that ran the layers' coarse form."""
        return sum(cost.layers for cost in self.passes if cost.view.precision == COARSE_PRECISION and cost.adapter is None)


class Stopwatch:
    """Adds up seconds under names, and keeps when each stage ran; a stage that follows on itself counts as one span."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, which may be any but those in `ACROSS`."""
        if name in ACROSS:
            raise ContractError(f"{name!r} is measured across stages and cannot name a stage; choose another name")
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.charge(name, end - begin)
            if self.spans and self.spans[-1][0] == name:
                begin = self.spans.pop()[1]
            self.spans.append((name, begin, end))

    def charge(self, name: str, seconds: float) -> None:
        """Add to `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def reading(self) -> StageSeconds:
        """Everything up to now."""
        return StageSeconds(self.seconds, total=time.perf_counter() - self.started)
