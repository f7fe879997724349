"""Decoder layers, products and norms of a loaded model, run by the compiled code; which models it covers."""

import math
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cats.families import ATTENTION, GATED_MLP
from cats.kernels import code
from cats.kernels.team import team
from cats.kv_cache import head_dim
from cats.nested.format import KEPT_BITS, exceptions_of
from cats.planning.plan import EXACT, View
from cats.rows import Rows
from cats.weight import Coded, Parts

if TYPE_CHECKING:
    from cats.runtime.store import Store

KINDS = {torch.bfloat16: code.BF16, torch.float16: code.F16, torch.float32: code.F32}
MATRICES = ATTENTION + GATED_MLP
NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
NOTHING = np.empty((0, 0), np.float32)
SMALL = 65536
"""Numbers that a thread norms sooner than it wakes another one."""
LOOK_SECONDS = 0.0002
"""Between looks at whether a matrix has been used."""
WHOLE, ATTENDS, TRANSFORMS = (code.QUERY, code.MATRICES), (code.QUERY, code.GATE), (code.GATE, code.MATRICES)
"""The matrices of a layer and of its sublayers, from the first to behind the last."""


class Room:
    """Work space of a model's compiled layers, those of its adapters too; one step uses it at a time (cats/turns.py).

    It is a part of the activations that a memory plan grants (`cats.planning.plan.activation_bytes`).
    """

    def __init__(self) -> None:
        self._numbers = np.empty(0, np.float32)

    def space(self, sizes: code.Sizes, width: int, rows: int, slots: int, threads: int, decoded: int = 0) -> code.Space:
        """Arrays for `rows` rows of `width` numbers that see up to `slots` slots, and `decoded` numbers for each thread's decoded weights;
        valid until the next call."""
        heads, inner = sizes.heads * sizes.head_dim, padded(sizes.inner)
        shapes: list[tuple[int, ...]] = [(rows, width), (rows, heads + 2 * sizes.kv_heads * sizes.head_dim), (rows, heads)]
        shapes += [(rows, inner), (rows, inner), (threads, sizes.heads // sizes.kv_heads, padded(slots))]
        shapes.append((threads, decoded))
        counts = [math.prod(shape) for shape in shapes]
        needed = sum(map(padded, counts))
        if self._numbers.size < needed:
            self._numbers = np.empty(0, np.float32)
            self._numbers = np.empty(needed, np.float32)
        ends = accumulate(padded(count) for count in counts)
        arrays = [
            self._numbers[end - padded(count) :][:count].reshape(shape) for end, count, shape in zip(ends, counts, shapes, strict=True)
        ]
        return code.Space(*arrays)


def padded(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // code.LANES) * code.LANES


def part(layer: nn.Module, name: str) -> Any:
    """A part of a layer by its path; None where it has none."""
    for step in name.split("."):
        layer = getattr(layer, step, None)  # type: ignore[assignment]
    return layer


def address(tensor: torch.Tensor | None) -> int:
    """Of a tensor's numbers; 0 where there are none in memory."""
    return 0 if tensor is None or tensor.is_meta else tensor.data_ptr()


def covers(layers: Sequence[nn.Module], config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether the compiled code runs such layers: float32 arithmetic on a CPU, SwiGLU."""
    if dtype != torch.float32 or getattr(config, "hidden_act", "silu") != "silu":
        return False
    return all(linear is None or multipliable(linear) for layer in layers for linear in (part(layer, name) for name in MATRICES))


def multipliable(linear: Any) -> bool:
    """Whether a projection's weight, where it is one tensor, can be multiplied by as it lies."""
    small = linear.bias is None or linear.bias.dtype == torch.float32
    weight = linear.weight
    return small and (linear.kind is not None or (weight.is_cpu and weight.is_contiguous() and weight.dtype in KINDS))


class CompiledLayers:
    """The decoder layers of a model or an adapter.

    Args:
        layers: in order; their projections are `cats.linear.Linear`.
        config: shapes and epsilon.
        room: work space, shared with other layers of the model.
        source: where weights that are not resident come from.
    """

    def __init__(self, layers: Sequence[nn.Module], config: PretrainedConfig, room: Room, source: "Store | None" = None):
        self.room, self.source, heads, kv_heads = room, source, config.num_attention_heads, config.num_key_value_heads
        self.sizes = code.Sizes(heads, kv_heads, head_dim(config), config.intermediate_size, np.float32(config.rms_norm_eps))
        self.projections = [[part(layer, name) for name in MATRICES] for layer in layers]
        words = [[0 if linear is None or linear.open is not None else word(linear.weight) for linear in row] for row in self.projections]
        biases = [[address(linear and linear.bias) for linear in row] for row in self.projections]
        norms = [[address((norm := part(layer, name)) and norm.weight) for name in NORMS] for layer in layers]
        done = np.zeros((len(words), code.MATRICES), np.int64)
        self.weights = code.Weights(np.array(words, np.int64), np.array(biases, np.int64), np.array(norms, np.int64), done)
        self._coming = [
            [(layer, matrix) for matrix, linear in enumerate(row) if linear is not None and linear.open is not None]
            for layer, row in enumerate(self.projections)
        ]
        self._settled = {EXACT.precision: (self.weights, self._coming)}
        coming = [self.projections[layer][matrix] for row in self._coming for layer, matrix in row]
        self._decoded = code.DECODED * max((linear.weight.shape[1] for linear in coming if linear.kind.decodes), default=0) // 2
        self._described: dict[tuple[str, int, int], Description] = {}
        self._runs: dict[View, np.ndarray] = {}
        self.resident = [not row for row in self._coming]

    def takes(self, rows: Rows) -> bool:
        """Whether such rows can be run."""
        return rows.sight.paths is not None and rows.cache is not None and rows.slots is not None

    def stretch(self, start: int, stop: int) -> int:
        """The end of the resident layers that begin at `start`."""
        while start < stop and self.resident[start]:
            start += 1
        return start

    def run(self, rows: Rows, start: int, stop: int, view: View = EXACT) -> None:
        """Take rows through the layers [start, stop) of a view."""
        self._call(self._group(rows), start, stop, WHOLE, view)

    def attend(self, rows: Rows, layer: int) -> None:
        """Add the attention of a layer."""
        self._call(self._group(rows), layer, layer + 1, ATTENDS)

    def transform(self, rows: Rows, layer: int) -> None:
        """Add the MLP of a layer."""
        self._call(self._group(rows), layer, layer + 1, TRANSFORMS)

    def _group(self, rows: Rows) -> code.Group:
        """The rows as the compiled code wants them; their states are a copy."""
        known = rows.compiled
        if known is not None and known.hidden_TD.ctypes.data == rows.hidden_BTD.data_ptr():
            return known
        cache, slots, sight = rows.cache, rows.slots, rows.sight
        if cache is None or slots is None or sight.paths is None:
            raise ValueError("rows without a cache or paths are not for compiled layers")
        cos, sin = (table[0].numpy() for table in rows.rope)
        places = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots.numpy()
        cache.aim(slots, rows.end)
        hidden_TD = rows.hidden_BTD[0].numpy().copy()
        rows.hidden_BTD = torch.from_numpy(hidden_TD)[None]
        rows.compiled = code.Group(hidden_TD, cos, sin, places, *sight.paths(), cache.storage[:, :, 0].numpy())
        return rows.compiled

    def _runs_of(self, view: View) -> np.ndarray:
        """Which sublayers a view runs, as the compiled code wants it."""
        if view not in self._runs:
            layers = range(len(self.projections))
            self._runs[view] = np.array([(layer not in view.attention, layer not in view.mlp) for layer in layers], np.uint8)
        return self._runs[view]

    def _call(self, group: code.Group, start: int, stop: int, matrices: tuple[int, int], view: View = EXACT) -> None:
        workers, (rows, width) = team(), group.hidden_TD.shape
        space = self.room.space(self.sizes, width, rows, group.cache.shape[3], workers.size, self._decoded)
        first, last = matrices[0], min(matrices[1], code.MATRICES if self.projections[start][code.GATE] is not None else code.GATE)
        if last <= first:
            return
        weights, unsettled = self._running()
        runs = self._runs_of(view)
        coming = [
            place
            for layer in range(start, stop)
            for place in unsettled[layer]
            if first <= place[1] < last and runs[layer, int(place[1] > code.OUTPUT)]
        ]
        for place in coming:
            weights.matrices[place] = code.AWAITED
        call = (code.run_layers, (stop - start) * code.COUNTERS, start, stop, first, last, runs, self.sizes, weights, group, space)
        if not coming:
            workers.run(*call)
            return
        with workers.flight(*call):
            self._bring(weights, coming, workers.size)

    @property
    def _precision(self) -> str:
        """That of the view that runs."""
        return EXACT.precision if self.source is None else self.source.precision

    def _running(self) -> tuple[code.Weights, list[list[tuple[int, int]]]]:
        """The weights of the precision that runs, and by layer the places of those that have no word before a pass brings them.

        Drafts run on what is resident, so all of it that needs no work has a word from the first pass on.
        """
        precision = self._precision
        if precision not in self._settled:
            words = self.weights.matrices.copy()
            for layer, row in enumerate(self.projections):
                for matrix, linear in enumerate(row):
                    if linear is not None and linear.open is not None:
                        with linear.open() as parts:
                            at = self._describe(precision, layer, matrix, linear.kind.coded(parts))
                            words[layer, matrix] = at or lying_word(linear, parts)
            unsettled = [[place for place in row if not words[place]] for row in self._coming]
            self._settled[precision] = self.weights._replace(matrices=words), unsettled
        return self._settled[precision]

    def _describe(self, precision: str, layer: int, matrix: int, coded: Coded | None) -> int:
        """The word of a matrix of codes, whose description is kept; 0 where it has none."""
        if coded is None:
            return 0
        place = (precision, layer, matrix)
        if place not in self._described:
            self._described[place] = Description(coded)
        return self._described[place].word(coded)

    def _bring(self, weights: code.Weights, coming: Sequence[tuple[int, int]], threads: int) -> None:
        """Tell the threads of a pass where the matrices are that are not resident, each as it arrives."""
        told, words, precision = 0, weights.matrices.ctypes.data, self._precision
        try:
            for layer, matrix in coming:
                used = Used(weights.done[layer, matrix : matrix + 1], threads)
                linear = self.projections[layer][matrix]
                with linear.open() as parts:
                    coded = linear.kind.coded(parts)
                    weight = None if coded is not None else numbers_of(linear, parts)
                    at = word(weight) if weight is not None else self._describe(precision, layer, matrix, coded)
                    code.publish(words + 8 * (layer * code.MATRICES + matrix), at)
                    told += 1
                    stays = weight is None or lies(weight, parts)
                    if self.source is None or not stays or not self.source.busy_until(used):
                        used.wait()
        finally:
            for layer, matrix in coming[told:]:
                code.publish(words + 8 * (layer * code.MATRICES + matrix), code.ABANDONED)


class Description:
    """A matrix of codes as the compiled code knows it (`code.CODES` and what follows); its exceptions and scales stay where they are."""

    def __init__(self, coded: Coded):
        self._staying, self._numbers = (coded.exceptions, coded.scales), np.zeros(code.DESCRIBED, np.int64)
        self._numbers[code.SCALES], self._kind = address(coded.scales), code.INT8
        if coded.layout is not None and coded.exceptions is not None:
            exceptions = exceptions_of(coded.exceptions, len(coded.codes))
            self._kind = code.CODES_BF16 if coded.layout.dtype == torch.bfloat16 else code.CODES_F16
            self._numbers[code.OFFSET] = int(exceptions.base) << KEPT_BITS
            parts = (exceptions.starts, exceptions.columns, exceptions.bits)
            self._numbers[code.STARTS : code.SCALES] = [part.data_ptr() for part in parts]

    def word(self, coded: Coded) -> int:
        """The word of the matrix, whose codes and low bits lie here in this pass; without these: of the codes alone."""
        self._numbers[code.CODES] = coded.codes.data_ptr()
        if coded.low is not None:
            self._numbers[code.LOW], self._numbers[code.LOW_STRIDE] = coded.low.data_ptr(), coded.low.stride(0)
        return int(8 * self._numbers.ctypes.data + (self._kind if coded.low is None else code.NESTED))


def lies(weight: torch.Tensor, parts: Parts) -> bool:
    """Whether a matrix is one of its parts as it lies in memory."""
    return any(part.data_ptr() == weight.data_ptr() for part in parts.values())


def lying_word(linear: Any, parts: Parts) -> int:
    """The word of a matrix whose resident parts hold its numbers as they are; 0 where they must be made first."""
    weight = numbers_of(linear, parts)
    return word(weight) if lies(weight, parts) else 0


def numbers_of(linear: Any, parts: Parts) -> torch.Tensor:
    """A matrix that comes in parts, as the compiled code takes it."""
    weight: torch.Tensor = linear.kind.rows(parts, 0, len(linear.weight)).contiguous()
    return weight if weight.dtype in KINDS else weight.float()


class Used:
    """The use of a matrix by the threads of a pass (an `Arrival` of cats/runtime/streamer.py)."""

    def __init__(self, done: np.ndarray, threads: int):
        self._done, self._goal = done, done[0] + threads

    def query(self) -> bool:
        """Whether all are through with it."""
        return bool(self._done[0] >= self._goal)

    def wait(self) -> None:
        """Until they are."""
        while not self.query():
            time.sleep(LOOK_SECONDS)


def word(weight: torch.Tensor) -> int:
    """Where a matrix lies and of what kind it is, as `code.Weights` has it."""
    return 8 * address(weight) + KINDS[weight.dtype]


def warm_up() -> None:
    """Compile, or load from the cache, everything that models need."""
    numbers = np.zeros((1, code.LANES), np.float32)
    sizes = code.Sizes(1, 1, code.LANES, code.LANES, np.float32(1))
    weights = code.Weights(*(np.zeros((1, count), np.int64) for count in (code.MATRICES, code.MATRICES, len(NORMS), code.MATRICES)))
    code.publish(weights.matrices.ctypes.data, 0)
    places, ends = np.zeros(1, np.int64), np.zeros(2, np.int64)
    cache = np.zeros((1, 2, 1, 1, code.LANES), np.float32)
    group = code.Group(numbers.copy(), numbers, numbers, places, places, places, ends, cache)
    runs = np.ones((1, 2), np.uint8)
    team().run(code.run_layers, 0, 0, 0, *WHOLE, runs, sizes, weights, group, Room().space(sizes, code.LANES, 1, 1, team().size))
    product(torch.from_numpy(numbers), torch.from_numpy(numbers), None)
    normed(torch.from_numpy(numbers), torch.ones(code.LANES), 1.0)


def product(x: torch.Tensor, weight_RK: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x W^T + b` [.., R] of float32 x [.., K] with a weight of any kind."""
    x_TK = x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()
    out = np.empty((len(x_TK), len(weight_RK)), np.float32)
    if len(x_TK):
        team().run(code.run_product, 1, word(weight_RK), address(bias), x_TK, out, NOTHING)
    return torch.from_numpy(out).view(*x.shape[:-1], len(weight_RK))


def normed(hidden: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The RMS norm of states [.., D]."""
    x_TD = hidden.reshape(-1, hidden.shape[-1]).contiguous().numpy()
    out = np.empty_like(x_TD)
    call = (code.run_norm, weight_D.data_ptr(), np.float32(epsilon), x_TD, out)
    if x_TD.size <= SMALL:
        team().alone(*call)
    else:
        team().run(call[0], 0, *call[1:])
    return torch.from_numpy(out).view(hidden.shape)


class Norm(LlamaRMSNorm):
    """An RMS norm, compiled; `norm` is one of transformers'."""

    def __init__(self, norm: Any):
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """States [.., D] -> normed states [.., D]."""
        return normed(hidden, self.weight, self.variance_epsilon)
