"""A base model under a memory plan: what stays is read into arenas once, the rest passes through the ring in every pass.

Weights are streamed as they are stored, and held so where the held dtype has the same values (cats/dtypes.py); what becomes of
half precision is `cats/linear.py`'s matter. The embedding table is not held: its rows are read when their tokens occur
(unless it is the head as well).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from cats.adapter import AdapterModel
from cats.checkpoint import UNUSED_ENTRIES, TensorPlace, check_tensors, locate_tensors
from cats.config import MemoryOptions
from cats.dtypes import compute_dtype, held_dtype, narrowest, rounded
from cats.earlyexit import EarlyExitLlamaForCausalLM, read_config
from cats.errors import CatsError
from cats.families import family_of, usable_context
from cats.kv_cache import head_dim
from cats.linear import Embedding, Linear, WorkSpace, replace_projections, work_bytes
from cats.planning.plan import BEHIND, Demand, MemoryPlan, ModelSizes, Piece, View, amount, front_name, held, plan_memory
from cats.runtime.arena import PAGE_BYTES, Arena
from cats.runtime.budget import Ledger
from cats.runtime.direct_file import DirectFile, read_tensor_into, tensor_in_window, window, window_bytes
from cats.runtime.link import Link, check_rate, measure_read_rate
from cats.runtime.streamer import Streamed, Streamer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROW = "a row of the embedding table"


def tensor_name(piece: Piece) -> str:
    """Name on disk."""
    return f"model.layers.{piece.layer}.{piece.matrix}.weight"


class PlannedWeights:
    """The weights of a model under a memory plan (a `WeightSource`).

    Attributes:
        plan: which matrices are held, which streamed.
        ledger: what was granted and taken.
        held_dtype: that values are rounded to, where they are stored in another one.
        streamer: None where nothing is streamed.
        row_bytes: bytes read of rows of the embedding table.
    """

    def __init__(
        self,
        places: Mapping[str, TensorPlace],
        plan: MemoryPlan,
        flash_bandwidth: float | None,
        device: torch.device,
        held_dtype: torch.dtype,
    ):
        self.plan, self.ledger, self.device, self.held_dtype = plan, Ledger(plan), device, held_dtype
        self.row_bytes = 0
        self.holds_sublayers = plan.holds_sublayers
        self._kept: dict[str, torch.Tensor] | None = None
        self._sublayers: dict[tuple[int, str], list[str]] = {}
        for piece in plan.streamed:
            self._sublayers.setdefault(piece.sublayer, []).append(tensor_name(piece))
        self.places = places
        self._files: dict[Path, DirectFile] = {}
        self.streamer: Streamer | None = None
        self._copy: Callable[[torch.Tensor], torch.Tensor] | None = None
        if not plan.streamed and flash_bandwidth is not None:
            raise CatsError(
                f"--flash-bandwidth slows the stream of weights, and {amount(plan.charged)} of the memory budget hold them all; "
                "leave it out, or lower --memory-budget."
            )
        if plan.streamed:
            if flash_bandwidth is not None:
                check_rate(flash_bandwidth, measure_read_rate(places[tensor_name(plan.streamed[0])].path))
            order = [Streamed(name, places[name]) for name in map(tensor_name, plan.streamed)]
            self.streamer = Streamer(order, plan.ring_bytes, Link(flash_bandwidth))
            self.ledger.charge("ring", plan.ring_bytes)
            if device.type == "cuda":
                self._copy = SideStreamCopy(device, self.streamer.arena)

    @property
    def bytes_taken(self) -> int:
        """Bytes that passes have taken from flash: windows of streamed matrices, and rows of the embedding table."""
        return self.row_bytes + (self.streamer.bytes_taken if self.streamer else 0)

    @property
    def wait_seconds(self) -> float:
        """Time that passes have waited for streamed matrices."""
        return self.streamer.wait_seconds if self.streamer else 0.0

    @property
    def one_answer(self) -> bool:
        """See `WeightSource`."""
        return self.plan.budget_bytes is not None and self.plan.covers == "process"

    def check(self, view: View) -> None:
        """See `WeightSource`."""
        missing = next((piece for piece in self.plan.streamed if view.needs(piece)), None)
        if missing is not None:
            raise CatsError(
                f"a draft would need {missing.matrix} of layer {missing.layer}, which is streamed; only weights that are in memory draft: "
                "raise --memory-budget, or use another method."
            )

    def admit(self, positions: int, nodes: int) -> None:
        """See `WeightSource`."""
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

    def report(self) -> list[str]:
        """See `WeightSource`."""
        lines = self.ledger.lines()
        return lines if self.streamer is None else [*lines, f"flash: {self.streamer.link.label}"]

    def held(self, name: str, grant: str) -> nn.Parameter:
        """Read a matrix that stays onto the compute device, as stored, or rounded to the held dtype; it is charged to `grant`."""
        place = self.places[name]
        resting = narrowest(place.dtype, self.held_dtype)
        self.ledger.charge(grant, held(place.nbytes // place.dtype.itemsize * resting.itemsize, self.plan.covers))
        return nn.Parameter(self._read(name).to(self.device, resting), requires_grad=False)

    def small(self, name: str, dtype: torch.dtype) -> nn.Parameter:
        """Read a norm or a bias in the dtype of the arithmetic."""
        tensor = rounded(self._read(name), self.held_dtype).to(self.device, dtype, copy=True)
        self.ledger.charge("norms and biases", tensor.nbytes)
        return nn.Parameter(tensor, requires_grad=False)

    def _read(self, name: str) -> torch.Tensor:
        place = self.places[name]
        return read_tensor_into(self.file(place.path), place, Arena(window_bytes(place)), 0, name)

    def file(self, path: Path) -> DirectFile:
        """The open file; one descriptor each."""
        if path not in self._files:
            self._files[path] = DirectFile(path)
        return self._files[path]

    @contextmanager
    def taking(self, name: str) -> Iterator[torch.Tensor]:
        """A streamed matrix on the compute device, while it is being used."""
        if self.streamer is None:
            raise RuntimeError(f"{name} is held, not streamed")
        with self.streamer.tensor(name) as weight:
            if self._copy is None:
                yield weight
            elif self._kept is None:
                yield self._copy(weight)
            else:
                if name not in self._kept:
                    self._kept[name] = self._copy(weight)
                yield self._kept[name]

    @contextmanager
    def keeping(self, layer: int, sublayer: str) -> Iterator[None]:
        """See `WeightSource`."""
        names = self._sublayers.get((layer, sublayer))
        if self.streamer is None or not names:
            yield
            return
        self._kept = {}
        try:
            with self.streamer.keeping(names):
                yield
        finally:
            self._kept = None

    def close(self) -> None:
        """End the reader and close the files."""
        if self.streamer is not None:
            self.streamer.close()
        for file in self._files.values():
            file.close()


class SideStreamCopy:
    """Copies of a registered (page-locked) host arena to a CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device, arena: Arena):
        self.device, self._stream = device, torch.cuda.Stream(device)
        address = arena.tensor(0, torch.uint8, (1,)).data_ptr()
        status = torch.cuda.cudart().cudaHostRegister(address, arena.nbytes, 0)
        if int(status) != 0:
            raise CatsError(f"CUDA could not register {arena.nbytes} bytes of host memory (error {int(status)}); lower --ring-buffers.")
        weakref.finalize(self, unregister, address, arena)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight on the device; when this returns the host's place is free again."""
        with torch.cuda.stream(self._stream):
            copy = weight.to(self.device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        copy.record_stream(torch.cuda.current_stream(self.device))
        done.synchronize()
        return copy


def unregister(address: int, arena: Arena) -> None:
    """End the registration of the arena, which must live until then: a later mapping at its address could not be registered."""
    torch.cuda.cudart().cudaHostUnregister(address)


class EmbeddingRows(nn.Module):
    """An embedding table whose rows are read from the checkpoint when they are asked for."""

    def __init__(self, place: TensorPlace, source: PlannedWeights, dtype: torch.dtype):
        super().__init__()
        self._place, self._source, self._dtype = place, source, dtype
        self._row_bytes = place.nbytes // place.shape[0]
        self._arena = Arena(self._row_bytes + 2 * PAGE_BYTES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [..] -> states [.., D] in the compute dtype."""
        tokens = ids.reshape(-1).tolist()
        self._source.file(self._place.path).check_unchanged(ROW)
        rows = {token: self._row(token) for token in dict.fromkeys(tokens)}
        return torch.stack([rows[token] for token in tokens]).to(self._source.device).view(*ids.shape, -1)

    def _row(self, token: int) -> torch.Tensor:
        table = self._place
        row = TensorPlace(table.path, table.offset + token * self._row_bytes, self._row_bytes, table.dtype, table.shape[1:])
        start, length = window(row.offset, row.nbytes)
        needed = row.offset + row.nbytes - start
        self._source.file(row.path).read_into(self._arena.view[:length], start, needed, ROW)
        self._source.row_bytes += length
        return rounded(tensor_in_window(self._arena, 0, row), self._source.held_dtype).to(self._dtype, copy=True)


def load_planned(
    directory: str | Path,
    dtypes: tuple[str, str],
    device: torch.device,
    memory: MemoryOptions,
    adapters: Sequence[AdapterModel],
    interpreter: int,
) -> EarlyExitLlamaForCausalLM:
    """Load a checkpoint under `memory`; raises `CatsError` before anything large is read where it cannot fit.

    Args:
        dtypes: held and compute dtype, by name or "auto".
        adapters: those that will be attached; the layers below the latest of their exits stay resident, since drafting and shallow
            verification run on them.
        interpreter: bytes that the process needs by itself.
    """
    config = read_config(directory)
    for adapter in adapters:
        if (adapter.exit_layer or 0) >= config.num_hidden_layers:
            raise CatsError(f"an adapter reads exit {adapter.exit_layer}; exits of the base are 1 to {config.num_hidden_layers - 1}.")
    places = locate_tensors(directory)
    if config.tie_word_embeddings and EMBEDDING in places:
        places[HEAD] = places[EMBEDDING]
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    wanted = {name: tensor.shape for name, tensor in causal_lm.state_dict().items()}
    found = {name: place.shape for name, place in places.items()}
    names = check_tensors(wanted, found, f"the checkpoint in {directory}", UNUSED_ENTRIES)
    held_in = held_dtype(dtypes[0], config, places)
    compute = compute_dtype(dtypes[1], held_in, device)
    sizes = model_sizes(config, places, adapters, held_in, compute)
    demand = Demand(
        front=max((adapter.exit_layer or 0 for adapter in adapters), default=0),
        adapters=len(adapters),
        positions=min(memory.positions, usable_context(config)),
        nodes=memory.nodes,
        ring_buffers=memory.ring,
        pinning=memory.pinning,
        compute_itemsize=compute.itemsize,
        interpreter_bytes=interpreter,
    )
    plan = plan_memory(sizes, demand, memory.budget_bytes, memory.covers)
    source = PlannedWeights(places, plan, memory.flash_bandwidth, device, held_in)
    work = WorkSpace()
    replace_projections(causal_lm, work)
    place_weights(causal_lm, names, source, compute)
    return EarlyExitLlamaForCausalLM(causal_lm, config, compute, source, work, held_in).eval()


def place_weights(causal_lm: Any, names: Iterable[str], source: PlannedWeights, compute: torch.dtype) -> None:
    """Fill a model built on the meta device: matrices held or streamed, norms and biases in the compute dtype."""
    grants = grants_of(source.plan)
    for name in names:
        module, _, parameter = name.rpartition(".")
        owner = causal_lm.get_submodule(module)
        if name in grants:
            owner.weight = source.held(name, grants[name])
        elif isinstance(owner, Linear) and parameter == "weight" and name != HEAD:
            owner.fetch, owner.held = partial(source.taking, name), source.held_dtype
        elif name not in (HEAD, EMBEDDING):
            setattr(owner, parameter, source.small(name, compute))
    causal_lm.lm_head.weight = source.held(HEAD, "lm_head")
    if source.places[EMBEDDING] == source.places[HEAD]:
        causal_lm.model.embed_tokens = Embedding(causal_lm.lm_head.weight, compute)
    else:
        causal_lm.model.embed_tokens = EmbeddingRows(source.places[EMBEDDING], source, compute)


def grants_of(plan: MemoryPlan) -> dict[str, str]:
    """Name of every held matrix of a layer -> the grant that it is charged to."""
    if not plan.streamed:
        return {tensor_name(piece): "all layers" for piece in plan.pinned}
    return {tensor_name(piece): front_name(plan.demand) if plan.demand.keeps(piece) else BEHIND for piece in plan.pinned}


def model_sizes(
    config: PretrainedConfig,
    places: Mapping[str, TensorPlace],
    adapters: Sequence[AdapterModel],
    held_in: torch.dtype,
    compute: torch.dtype,
) -> ModelSizes:
    """Sizes of a checkpoint as stored; piece by piece."""
    of_layer = {name.removeprefix("model.layers.0."): place for name, place in places.items() if name.startswith("model.layers.0.")}
    names, layers = family_of(config.model_type, "the base model").matrices, range(config.num_hidden_layers)
    stored = tuple(piece_of(layer, matrix, places, held_in) for layer in layers for matrix in names)
    matrices = tuple((matrix, max(piece.nbytes for piece in stored if piece.matrix == matrix)) for matrix in names)
    small = [place for name, place in of_layer.items() if name.removesuffix(".weight") not in names]
    multiplied = [place for name, place in places.items() if name == HEAD or name.startswith("model.layers.")]
    largest = max(place.nbytes // place.dtype.itemsize for place in multiplied)
    dtypes = {place.dtype for place in multiplied} | {weight.dtype for adapter in adapters for weight in adapter.parameters()}
    return ModelSizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        kv_width=config.num_key_value_heads * head_dim(config),
        matrices=matrices,
        other_layer_bytes=sum(place.nbytes // place.dtype.itemsize * compute.itemsize for place in small),
        lm_head_bytes=places[HEAD].nbytes,
        adapter_bytes=max((adapter.nbytes for adapter in adapters), default=0),
        widen_bytes=work_bytes(largest, dtypes, held_in, compute),
        rotary_numbers=usable_context(config) * head_dim(config),
        stored=stored,
    )


def piece_of(layer: int, matrix: str, places: Mapping[str, TensorPlace], held_in: torch.dtype) -> Piece:
    """A whole matrix as a piece."""
    place = places[f"model.layers.{layer}.{matrix}.weight"]
    return Piece(layer, matrix, place.nbytes, place.nbytes // place.dtype.itemsize * narrowest(place.dtype, held_in).itemsize)
