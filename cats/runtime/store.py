"""The weights of a model under a memory plan: what is resident, what passes through the ring in every pass, and what that has cost.

Bytes and tensors, no tokens. Pieces are streamed as they are stored; what numbers they are is their kind's matter
(cats/weight.py). A pass runs inside `running`, which says under which view; within it the projections open their pieces in the
order of the plan. Streamed pieces of a CUDA device come through two places there, and products wait for them, not the host.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from cats.checkpoint import TensorPlace
from cats.errors import CatsError
from cats.planning.plan import EXACT, Demand, MemoryPlan, Piece, View, amount, charged_bytes
from cats.runtime.arena import Arena
from cats.runtime.budget import Ledger, give_back_freed_memory
from cats.runtime.direct_file import DirectFile, read_tensor_into, window_bytes
from cats.runtime.link import Link, check_rate, measure_read_rate
from cats.runtime.staging import Staging, register
from cats.runtime.streamer import Arrival, Streamed, Streamer

AT_ONCE = nullcontext()
Opener = Callable[[], AbstractContextManager[Mapping[str, torch.Tensor]]]
"""Gives the parts of a matrix that the running view needs, by name, for as long as one product takes."""


class Store:
    """See the module.

    Attributes:
        plan: the home of each piece.
        ledger: what was granted and taken.
        places: of tensors on disk, by name; those of streamed pieces at least.
        streamer: None where nothing is streamed.
        precision: of the view that runs.
        row_bytes: bytes read of rows of the embedding table.
    """

    def __init__(
        self,
        plan: MemoryPlan | None = None,
        names: Mapping[Piece, str] | None = None,
        places: Mapping[str, TensorPlace] | None = None,
        device: torch.device | None = None,
        flash_bandwidth: float | None = None,
    ):
        """Open the files of what is streamed, and reserve the ring.

        Args:
            plan: None: everything is resident.
            names: of the pieces on disk.
        """
        self.plan = plan or MemoryPlan(Demand(), None, "process", frozenset(), (), 0, 0)
        self.names, self.places = names or {}, places or {}
        self.device = device or torch.device("cpu")
        self.ledger = Ledger(self.plan)
        self.holds_sublayers = self.plan.holds_sublayers
        self.precision, self.row_bytes = EXACT.precision, 0
        self.streamer: Streamer | None = None
        self._staging: Staging | None = None
        self._files: dict[Path, DirectFile] = {}
        self._resident: dict[Piece, torch.Tensor] = {}
        self._hosted: dict[Piece, torch.Tensor] = {}
        self._running = threading.RLock()
        self._fit = {EXACT}
        self._resting: Callable[[], Callable[[], object] | None] = lambda: None
        self._sublayers: dict[tuple[int, str], list[str]] = {}
        for piece in self.plan.streamed:
            self._sublayers.setdefault(piece.sublayer, []).append(self.names[piece])
        copied = [*self.plan.streamed, *self.plan.hosted]
        if copied and self._staged():
            self._staging = Staging(self.device, max(piece.nbytes for piece in copied))
            self.ledger.charge("staging", self._staging.nbytes)
        if self.plan.streamed:
            self._open_stream(flash_bandwidth)
        elif flash_bandwidth is not None:
            raise CatsError(
                f"the flash bandwidth slows the stream of weights, and {amount(self.plan.charged)} of the memory budget hold them all; "
                "leave it out, or lower the budget."
            )

    def _staged(self) -> bool:
        """Whether products are made elsewhere than where the ring is."""
        return self.device.type == "cuda"

    def _open_stream(self, flash_bandwidth: float | None) -> None:
        order = [Streamed(self.names[piece], self.places[self.names[piece]]) for piece in self.plan.streamed]
        if flash_bandwidth is not None:
            check_rate(flash_bandwidth, measure_read_rate(order[0].place.path))
        self.streamer = Streamer(order, self.plan.ring_bytes, Link(flash_bandwidth))
        self.ledger.charge("ring", self.plan.ring_bytes)
        if self._staged():
            register(self.streamer.arena)

    @property
    def bytes_taken(self) -> int:
        """Bytes that passes have taken from flash: windows of streamed pieces, and rows of the embedding table."""
        return self.row_bytes + (self.streamer.bytes_taken if self.streamer else 0)

    @property
    def wait_seconds(self) -> float:
        """Time that passes have waited for streamed pieces."""
        return self.streamer.wait_seconds if self.streamer else 0.0

    @property
    def stream_seconds(self) -> float:
        """What the streamed pieces of one pass take at the rate that was seen so far; 0 where nothing was streamed."""
        link = self.streamer.link if self.streamer else None
        return link.busy_seconds * self.plan.streamed_bytes / link.bytes if link is not None and link.bytes else 0.0

    @property
    def one_answer(self) -> bool:
        """Whether caches and activations are granted for one answer at a time."""
        return self.plan.budget_bytes is not None and self.plan.covers == "process"

    def admit(self, positions: int, nodes: int) -> None:
        """Raise `CatsError` where an answer of so many positions, with trees of so many nodes, would break the memory budget."""
        demand = self.plan.demand
        if not self.one_answer:
            return
        if positions > demand.positions:
            raise CatsError(
                f"prompt and answer may take {positions} positions and the memory plan holds {demand.positions}; "
                f"give --budget-positions {positions}, or a shorter answer."
            )
        if nodes > demand.nodes:
            raise CatsError(
                f"this method grows trees of up to {nodes} nodes and the memory plan holds {demand.nodes}; give it a smaller tree, "
                f"or load the model with nodes={nodes}."
            )

    def rest(self, give_up: Callable[[], object]) -> None:
        """An answer's caches stay for its next one; under a budget for the whole process `give_up`, a method, is called where another
        answer needs their memory. Its object is not kept alive."""
        if self.one_answer:
            self._resting = weakref.WeakMethod(give_up)

    def make_room(self) -> None:
        """Let caches that rest be given up, before an answer has caches of its own."""
        give_up = self._resting()
        if give_up is not None:
            give_up()

    def answer_ended(self) -> None:
        """Under a budget for the whole process, let what the answer held go back to the system."""
        if self.one_answer:
            give_back_freed_memory()

    def report(self) -> list[str]:
        """Lines of a table that shows where the memory goes."""
        lines = self.ledger.lines()
        return lines if self.streamer is None else [*lines, f"flash: {self.streamer.link.label}"]

    # Filling

    def hold(self, piece: Piece, tensor: torch.Tensor, dtype: torch.dtype, copy: bool) -> torch.Tensor:
        """Make a piece resident, as `place` does."""
        self._resident[piece] = self.place(tensor, dtype, self.plan.grant(piece), copy)
        return self._resident[piece]

    def host(self, piece: Piece, tensor: torch.Tensor) -> None:
        """Keep a piece in page-locked host memory, as stored, to be copied to the device in every pass."""
        self.ledger.charge(self.plan.grant(piece), charged_bytes(tensor.nbytes, self.plan.covers))
        self._hosted[piece] = tensor.pin_memory()

    def place(self, tensor: torch.Tensor, dtype: torch.dtype, grant: str, copy: bool) -> torch.Tensor:
        """The tensor on the compute device in `dtype`, charged to `grant`; itself where it is that already, unless `copy` says no."""
        nbytes = tensor.numel() * dtype.itemsize
        exact = copy or bool(self.plan.device_charges)
        self.ledger.charge(grant, nbytes if exact else charged_bytes(nbytes, self.plan.covers))
        return tensor.to(self.device, dtype, copy=copy)

    def read(self, name: str) -> torch.Tensor:
        """A tensor from the disk, as stored, past the page cache."""
        place = self.places[name]
        return read_tensor_into(self.file(place.path), place, Arena(window_bytes(place)), 0, name)

    def file(self, path: Path) -> DirectFile:
        """The open file; one descriptor each."""
        if path not in self._files:
            self._files[path] = DirectFile(path)
        return self._files[path]

    # Passes

    def check(self, view: View) -> None:
        """Raise `CatsError` where a view other than EXACT cannot run: it would draft with weights that are not resident."""
        homes = (*self.plan.pinned, *self.plan.streamed, *self.plan.hosted)
        known = {precision for piece in homes for precision in piece.precisions | piece.stands_for}
        if view.precision not in known | {EXACT.precision}:
            raise CatsError(
                f"the weights have no {view.precision} form to draft with; known are {', '.join(sorted(known))}. Nested checkpoints have a "
                "coarse form (python -m cats.cli.nest), and --coarse int8 makes one of plain weights."
            )
        missing = next((piece for piece in (*self.plan.streamed, *self.plan.hosted) if view.needs(piece)), None)
        if missing is not None:
            raise CatsError(
                f"a draft would need {missing.matrix} of layer {missing.layer}, which is streamed; only weights that are in memory draft: "
                "give a larger memory budget, or use another method."
            )

    @contextmanager
    def running(self, view: View) -> Iterator[None]:
        """One pass over the weights, at a time, under `view`."""
        if view not in self._fit:
            self.check(view)
            self._fit.add(view)
        with self._running:
            before, self.precision = self.precision, view.precision
            try:
                yield
            finally:
                self.precision = before

    def keeping(self, layer: int, sublayer: str) -> AbstractContextManager[None]:
        """Inside the block the weights of an attention ("self_attn") or MLP ("mlp") come once and stay, for several groups of rows."""
        names = self._sublayers.get((layer, sublayer))
        return AT_ONCE if self.streamer is None or not names else self.streamer.keeping(names)

    def opener(self, pieces: Sequence[Piece]) -> Opener:
        """What gives the parts of one matrix; its resident pieces are in memory by now."""
        resident: dict[str, dict[str, torch.Tensor]] = {}
        streamed: dict[str, list[Piece]] = {}
        for precision in {precision for piece in pieces for precision in piece.precisions}:
            stand_in = [piece for piece in pieces if precision in piece.stands_for and piece in self._resident]
            needed = [piece for piece in pieces if precision in piece.precisions]
            needed = stand_in if stand_in and not any(piece in self._resident for piece in needed) else needed
            resident[precision] = {piece.part: self._resident[piece] for piece in needed if piece in self._resident}
            streamed[precision] = [piece for piece in needed if piece not in self._resident]

        @contextmanager
        def opened() -> Iterator[Mapping[str, torch.Tensor]]:
            here, coming = resident[self.precision], streamed[self.precision]
            if not coming:
                yield here
                return
            if len(coming) == 1:
                with self._arriving(coming[0]) as weight:
                    yield here | {coming[0].part: weight}
                return
            with ExitStack() as stack:
                names = [self.names[piece] for piece in coming if piece not in self._hosted]
                if len(names) > 1 and not self._stream.keeps:
                    stack.enter_context(self._stream.keeping(names))
                yield here | {piece.part: stack.enter_context(self._arriving(piece)) for piece in coming}

        return opened

    @property
    def _stream(self) -> Streamer:
        if self.streamer is None:
            raise RuntimeError("nothing is streamed")
        return self.streamer

    def _arriving(self, piece: Piece) -> AbstractContextManager[torch.Tensor]:
        """A piece that is not resident, on the compute device, while it is being used."""
        return self._stream.tensor(self.names[piece]) if self._staging is None else self._copied(piece, self._staging)

    def busy_until(self, used: Arrival) -> bool:
        """Keep the place of the piece opened last, if it is one of the ring, until its use is over, also when its block has ended; False
        where it is elsewhere by now, and the block must last as long."""
        if self.streamer is not None and self._staging is None:
            self.streamer.busy_until(used)
        return self._staging is None

    @contextmanager
    def _copied(self, piece: Piece, staging: Staging) -> Iterator[torch.Tensor]:
        hosted = self._hosted.get(piece)
        with self._stream.tensor(self.names[piece]) if hosted is None else nullcontext(hosted) as weight, staging.copied(weight) as copied:
            copy, arrived = copied
            if hosted is None:
                self._stream.busy_until(arrived)
            yield copy

    def close(self) -> None:
        """End the reader and close the files."""
        if self.streamer is not None:
            self.streamer.close()
        for file in self._files.values():
            file.close()
