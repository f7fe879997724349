"""Loading a base model: one way for every budget. Without one, the plan is that everything is resident.

Reads the configuration, looks where the tensors lie, plans, builds the model on the meta device and fills it, piece by piece.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from cats.adapter import AdapterModel
from cats.checkpoint import UNUSED_ENTRIES, TensorForm, TensorPlace, check_tensors, each_tensor, locate_tensors, tensor_forms
from cats.config import MemoryOptions
from cats.dtypes import compute_dtype, narrowest, weight_dtype
from cats.earlyexit import EarlyExitLlamaForCausalLM, read_config
from cats.embedding import Embedding, EmbeddingRows
from cats.errors import CatsError
from cats.families import family_of, usable_context
from cats.kv_cache import head_dim
from cats.linear import WorkSpace, replace_projections, work_bytes
from cats.planning.plan import COARSE, EXACT, Demand, MemoryPlan, ModelSizes, Piece, plan_memory
from cats.runtime.store import Store
from cats.weight import Weight, has_coarse, weight_of

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Form = TensorForm | TensorPlace


@dataclass(frozen=True)
class Checkpoint:
    """A base model on disk, looked at but not read.

    Attributes:
        forms: of the tensors that the model takes, by name; with tied embeddings the head stands for the table.
        pieces: of the layers, in the order of the exact pass, with their names on disk (those that are made have names too).
        shapes: [R, K] of the layers' matrices, by their path.
        weight: the kind of the layers' matrices.
        dtype, compute: of weights and of arithmetic, see cats/dtypes.py.
    """

    directory: Path
    config: PretrainedConfig
    forms: Mapping[str, Form]
    pieces: Mapping[Piece, str]
    shapes: Mapping[str, torch.Size]
    weight: Weight
    dtype: torch.dtype
    compute: torch.dtype

    @property
    def tied(self) -> bool:
        """Whether head and embedding table are one tensor."""
        return bool(self.config.tie_word_embeddings)

    def resting(self, name: str) -> torch.dtype:
        """The dtype in which the head or the table is resident."""
        return narrowest(self.forms[name].dtype, self.dtype) if self.weight.sparing else self.dtype


def load_base(
    directory: str | Path,
    dtype: str = "auto",
    compute: str = "auto",
    device: str | torch.device = "cpu",
    memory: MemoryOptions | None = None,
    adapters: Sequence[AdapterModel] = (),
    interpreter: int = 0,
) -> EarlyExitLlamaForCausalLM:
    """Load a checkpoint, strictly; raises `CatsError` before anything large is read where it is damaged or cannot fit.

    Args:
        dtype, compute: weight dtype and compute dtype, by name or "auto".
        memory: None: everything is resident, half precision upcast where `dtype` says so.
        adapters: those that will be attached; the layers below the latest of their exits stay resident, since drafting and shallow
            verification run on them.
        interpreter: bytes that the process needs by itself.
    """
    device = torch.device(device)
    config = read_config(directory)
    for adapter in adapters:
        if (adapter.exit_layer or 0) >= config.num_hidden_layers:
            last = config.num_hidden_layers - 1
            raise CatsError(f"an adapter reads exit {adapter.exit_layer}; exits of this base model are 1 to {last}.")
    causal_lm = without_weights(config)
    coarse = memory.coarse if memory else None
    checkpoint = look_at(Path(directory), config, causal_lm, (dtype, compute), device, memory is not None, coarse)
    asked, table = memory or MemoryOptions(), memory is None or device.type == "cuda"
    demand = demand_of(asked, checkpoint, adapters, interpreter, table)
    check_device(asked, device)
    plan = plan_memory(sizes_of_checkpoint(checkpoint, adapters), demand, asked.budget_bytes, asked.covers, asked.device_bytes)
    places = {name: form for name, form in checkpoint.forms.items() if isinstance(form, TensorPlace)}
    store = Store(plan, checkpoint.pieces, places, device, asked.flash_bandwidth)
    return filled(causal_lm, checkpoint, store, directly=memory is not None, table=table)


def load_first_layers(checkpoint: Checkpoint, count: int, device: torch.device, coarse: str | None) -> EarlyExitLlamaForCausalLM:
    """The first `count` layers with the head, as a model: everything resident, as a run under a budget holds it, coarse forms too."""
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    causal_lm = without_weights(config)
    dtypes = (str(checkpoint.dtype).removeprefix("torch."), str(checkpoint.compute).removeprefix("torch."))
    first = look_at(checkpoint.directory, config, causal_lm, dtypes, device, True, coarse, cut=True)
    table = device.type == "cuda"
    asked = MemoryOptions(views=(COARSE,) if has_coarse(config, coarse) else (), coarse=coarse)
    plan = plan_memory(sizes_of_checkpoint(first, ()), demand_of(asked, first, (), 0, table), None)
    places = {name: form for name, form in first.forms.items() if isinstance(form, TensorPlace)}
    return filled(causal_lm, first, Store(plan, first.pieces, places, device), directly=True, table=table)


def filled(causal_lm: Any, checkpoint: Checkpoint, store: Store, directly: bool, table: bool) -> EarlyExitLlamaForCausalLM:
    """The model with its weights where the store's plan has them; see `fill`."""
    work = WorkSpace(store.ledger.holder("work space"))
    replace_projections(causal_lm, work)
    fill(causal_lm, checkpoint, store, directly, table)
    base = EarlyExitLlamaForCausalLM(causal_lm, checkpoint.config, checkpoint.compute, store, work, checkpoint.dtype).eval()
    base.compile()
    return base


def without_weights(config: PretrainedConfig) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def checkpoint_of(directory: Path, dtypes: tuple[str, str], device: torch.device, coarse: str | None = None) -> Checkpoint:
    """A checkpoint as a load under a budget sees it."""
    config = read_config(directory)
    return look_at(directory, config, without_weights(config), dtypes, device, True, coarse)


def check_device(asked: MemoryOptions, device: torch.device) -> None:
    """Raise `CatsError` where memory is asked for that the device has not."""
    if asked.device_bytes is not None and device.type != "cuda":
        raise CatsError(f"device_bytes limits a CUDA device's own memory, and the device is {device}; give budget_bytes alone.")


def look_at(
    directory: Path,
    config: PretrainedConfig,
    causal_lm: Any,
    dtypes: tuple[str, str],
    device: torch.device,
    sparing: bool,
    coarse: str | None = None,
    cut: bool = False,
) -> Checkpoint:
    """The checkpoint, its tensors checked against those that the model takes; `cut`: of the configuration's layers alone."""
    forms: dict[str, Form] = dict(locate_tensors(directory) if sparing else tensor_forms(directory))
    if cut:
        forms = {name: form for name, form in forms.items() if layer_of(name) < config.num_hidden_layers}
    dtype = weight_dtype(dtypes[0], config, forms)
    weight = weight_of(config, directory, dtype, sparing, coarse)
    if config.tie_word_embeddings and EMBEDDING in forms:
        forms[HEAD] = forms[EMBEDDING]
    wanted = {name: tensor.shape for name, tensor in causal_lm.state_dict().items()}
    pieces: dict[Piece, str] = {}
    matrices: dict[str, torch.Size] = {}
    for layer in range(config.num_hidden_layers):
        for matrix in family_of(config.model_type, str(directory)).matrices:
            path = f"model.layers.{layer}.{matrix}"
            shape = matrices[path] = wanted.pop(f"{path}.weight")
            for part in weight.parts:
                name = weight.stored_as(part, path)
                form = forms.get(name, TensorForm(torch.uint8, ()))
                part_shape = weight.shape(part, shape, form.shape)
                if part in weight.made:
                    form = TensorForm(weight.made[part], part_shape)
                else:
                    wanted[name] = part_shape
                pieces[piece_of(layer, matrix, part, form, weight)] = name
    shapes = {name: form.shape for name, form in forms.items()}
    names = check_tensors(wanted, shapes, f"the checkpoint in {directory}", (*UNUSED_ENTRIES, *weight.unused))
    compute = compute_dtype(dtypes[1], dtype, device)
    return Checkpoint(directory, config, {name: forms[name] for name in names}, pieces, matrices, weight, dtype, compute)


def layer_of(name: str) -> int:
    """The layer that a tensor belongs to; -1 of those outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if name.startswith("model.layers.") else -1


def piece_of(layer: int, matrix: str, part: str, form: Form, weight: Weight) -> Piece:
    """A part of a matrix as the plan sees it."""
    count = torch.Size(form.shape).numel()
    nbytes, resident_bytes = count * form.dtype.itemsize, count * weight.resting(part, form.dtype).itemsize
    stands_for = weight.stands_for.get(part, frozenset())
    return Piece(layer, matrix, nbytes, resident_bytes, part, frozenset(weight.parts[part]), part in weight.always, stands_for)


def demand_of(memory: MemoryOptions, checkpoint: Checkpoint, adapters: Sequence[AdapterModel], interpreter: int, table: bool) -> Demand:
    """What the run asks of memory."""
    config = checkpoint.config
    views = [view.in_model(config.num_hidden_layers, config.hidden_size) for view in memory.views]
    return Demand(
        front=max((adapter.exit_layer or 0 for adapter in adapters), default=0),
        adapters=len(adapters),
        positions=min(memory.positions, usable_context(checkpoint.config)),
        nodes=memory.nodes,
        ring_buffers=memory.ring,
        pinning=memory.pinning,
        compute_itemsize=checkpoint.compute.itemsize,
        interpreter_bytes=interpreter,
        views=tuple(dict.fromkeys(views if memory.coarse is None else (*views, COARSE))),
        method_bytes=memory.method_bytes,
        table=table and not checkpoint.tied,
    )


def sizes_of_checkpoint(checkpoint: Checkpoint, adapters: Sequence[AdapterModel]) -> ModelSizes:
    """Sizes of a checkpoint, piece by piece."""
    config, forms, compute = checkpoint.config, checkpoint.forms, checkpoint.compute
    in_pieces = set(checkpoint.pieces.values())
    multiplied = [form for name, form in forms.items() if name == HEAD or name in in_pieces]
    small = [form for name, form in forms.items() if name.startswith("model.layers.0.") and name not in in_pieces]
    dtypes = {form.dtype for form in multiplied if form.dtype.is_floating_point} | {
        weight.dtype for adapter in adapters for weight in adapter.parameters()
    }
    matrices: dict[str, int] = {}
    for piece in checkpoint.pieces:
        if piece.layer == 0 and EXACT.needs(piece):
            matrices[piece.matrix] = matrices.get(piece.matrix, 0) + piece.nbytes
    largest = max(numbers(form) for form in multiplied)
    scratch = max(shape.numel() for shape in checkpoint.shapes.values()) * checkpoint.weight.scratch_bytes
    return ModelSizes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        kv_width=config.num_key_value_heads * head_dim(config),
        matrices=tuple(matrices.items()),
        other_layer_bytes=sum(numbers(form) * compute.itemsize for form in small),
        lm_head_bytes=numbers(forms[HEAD]) * checkpoint.resting(HEAD).itemsize,
        adapter_bytes=-(-sum(adapter.bytes_in(compute) for adapter in adapters) // max(1, len(adapters))),
        work_bytes=work_bytes(largest, dtypes, checkpoint.dtype, compute) + scratch,
        rotary_numbers=usable_context(config) * head_dim(config),
        stored=tuple(checkpoint.pieces),
        table_bytes=numbers(forms[EMBEDDING]) * checkpoint.resting(EMBEDDING).itemsize,
    )


def numbers(form: Form) -> int:
    """Elements of a tensor."""
    return torch.Size(form.shape).numel()


def fill(causal_lm: Any, checkpoint: Checkpoint, store: Store, directly: bool, table: bool) -> None:
    """Make resident what the plan says, tensor by tensor, and tell the rest of the projections how their parts come.

    Args:
        directly: read past the page cache; else as any program reads the checkpoint's files.
        table: whether the embedding table is resident; else its rows are read when their tokens occur.
    """
    piece_named = {name: piece for piece, name in checkpoint.pieces.items()}
    made = made_of(checkpoint, store.plan)
    elsewhere = {name for name, piece in piece_named.items() if piece not in store.plan.pinned | store.plan.hosted}
    if checkpoint.tied or not table:
        elsewhere.add(HEAD if checkpoint.tied else EMBEDDING)
    wanted = [name for name in checkpoint.forms if name not in elsewhere or name in made]
    direct = ((name, store.read(name)) for name in wanted)
    for name, tensor in direct if directly else each_tensor(checkpoint.directory, set(wanted).__contains__):
        parts = checkpoint.weight.make(tensor) if name in made else {}
        for piece in made.get(name, ()):
            store.hold(piece, parts[piece.part], parts[piece.part].dtype, copy=False)
        if name in elsewhere:
            continue
        if name in piece_named:
            fill_piece(causal_lm, checkpoint, store, name, piece_named[name], tensor, copy=not directly)
        elif name in (HEAD, EMBEDDING):
            grant = "embedding table" if name == EMBEDDING and not checkpoint.tied else "lm_head"
            assign(causal_lm, name, store.place(tensor, checkpoint.resting(name), grant, copy=not directly))
        else:
            assign(causal_lm, name, store.place(tensor.to(checkpoint.dtype), checkpoint.compute, "norms and biases", copy=True))
    set_table(causal_lm, checkpoint, store, table)
    open_projections(causal_lm, checkpoint, store)


def made_of(checkpoint: Checkpoint, plan: MemoryPlan) -> dict[str, list[Piece]]:
    """Pieces that the plan holds and no file has, by the name of the tensor that they are made of."""
    sources: dict[str, list[Piece]] = {}
    for piece in checkpoint.pieces:
        if piece.part in checkpoint.weight.made and piece in plan.pinned:
            name = checkpoint.weight.stored_as("exact", f"model.layers.{piece.layer}.{piece.matrix}")
            sources.setdefault(name, []).append(piece)
    return sources


def fill_piece(causal_lm: Any, checkpoint: Checkpoint, store: Store, name: str, piece: Piece, tensor: torch.Tensor, copy: bool) -> None:
    """Take a piece that was read as the tensor `name` to its home."""
    weight = checkpoint.weight
    weight.check(piece.part, tensor, checkpoint.shapes[f"model.layers.{piece.layer}.{piece.matrix}"], name)
    if piece in store.plan.hosted:
        store.host(piece, tensor)
        return
    resident = store.hold(piece, tensor, weight.resting(piece.part, tensor.dtype), copy)
    if weight.parts.keys() == {piece.part}:
        assign(causal_lm, name, resident)


def assign(causal_lm: Any, name: str, tensor: torch.Tensor) -> None:
    """Make the tensor the parameter of this name."""
    owner, _, parameter = name.rpartition(".")
    setattr(causal_lm.get_submodule(owner), parameter, nn.Parameter(tensor, requires_grad=False))


def set_table(causal_lm: Any, checkpoint: Checkpoint, store: Store, table: bool) -> None:
    """Give the model its embedding, which may be the head."""
    if checkpoint.tied:
        causal_lm.lm_head.weight = causal_lm.model.embed_tokens.weight
    if checkpoint.tied or table:
        causal_lm.model.embed_tokens = Embedding(causal_lm.model.embed_tokens.weight, checkpoint.compute)
    else:
        causal_lm.model.embed_tokens = EmbeddingRows(store.places[EMBEDDING], store, checkpoint.dtype, checkpoint.compute)


def open_projections(causal_lm: Any, checkpoint: Checkpoint, store: Store) -> None:
    """Give the projections whose matrix does not lie in memory as a whole what opens its parts."""
    of_matrix: dict[tuple[int, str], list[Piece]] = {}
    for piece in checkpoint.pieces:
        of_matrix.setdefault((piece.layer, piece.matrix), []).append(piece)
    for (layer, matrix), pieces in of_matrix.items():
        projection = causal_lm.get_submodule(f"model.layers.{layer}.{matrix}")
        if projection.weight.is_meta:
            projection.kind, projection.open = checkpoint.weight, store.opener(pieces)
