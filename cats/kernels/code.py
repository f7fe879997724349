"""Everything that is compiled: products, attention, norms, and whole layers made of them, in float32 on a CPU.

The order of summation of an output element is fixed by its length alone: LANES partial sums, element i into partial sum i modulo LANES,
then the partial sums in one order. It does not depend on the rows beside it, on the tile that computed it, on the thread, or on where
the weights lie. Attention sums over a row's *path*, slot by slot in the order of positions. So the logits of a tree node are bit for bit
those that plain decoding computes for the same tokens. No fast-math: it is a licence to reorder.

The inner loops are written as LLVM vectors of LANES numbers (`emit_*`, which numba's `intrinsic` puts into compiled Python), since a
compiler left to vectorise a reduction decides the order by itself. Weights are upcast to float32 in registers, which is exact.

One file, because numba's cache notices changes of a function's own file only. Addresses and strides are in bytes.
"""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BF16, F16, F32, CODES_BF16, CODES_F16, INT8, NESTED = 0, 1, 2, 3, 4, 5, 6
"""Kinds of weights: numbers; codes of eight bits that stand for numbers (cats/nested/format.py); integers, with a scale for each row;
codes with their low bits."""
ITEM_BYTES = (2, 2, 4, 1, 1, 1)
LARGEST_CODE = 127
LOWEST = -3.0e38
CHUNK, DECODED = 64, 16
"""Weight rows that a thread takes at a time, and how many of them it decodes at a time."""


def host_features() -> dict[str, bool]:
    """What LLVM knows of this processor."""
    try:
        return dict(llvmlite.binding.get_host_cpu_features())
    except RuntimeError:
        return {}


def lanes_and_tile() -> tuple[int, int]:
    """Numbers in a vector, and how many rows of x a tile of four weight rows takes at most, so that its sums fill the registers.

    (0, 0) where a fused multiply-add of vectors is not one instruction.
    """
    features = host_features()
    if features.get("avx512f"):
        return 16, 6
    if features.get("avx2") and features.get("fma"):
        return 8, 3
    if platform.machine().lower() in ("aarch64", "arm64"):
        return 4, 5
    return 0, 0


LANES, TILE = lanes_and_tile()
STEP = (LANES, LANES, LANES, 2 * LANES, 2 * LANES, LANES)
"""Weights of a kind that are upcast together."""
WEIGHT_ROWS, CACHE_LINE = 4, 64
"""Weight rows of a tile; bytes that come from memory together."""

Value = Any
FLOAT, LONG, WORD, SHORT, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
STORED = (SHORT, ir.HalfType(), FLOAT, BYTE, BYTE, BYTE)


def vector(of: Value, count: int = LANES) -> Value:
    """The type of `count` numbers."""
    return ir.VectorType(of, count)


def number(value: int) -> Value:
    """A 64-bit constant."""
    return ir.Constant(LONG, value)


def floats(value: float) -> Value:
    """A vector constant."""
    return ir.Constant(vector(FLOAT), [float(np.float32(value))] * LANES)


def words(value: int, of: Value = WORD, count: int = LANES) -> Value:
    """A vector constant of integers."""
    return ir.Constant(vector(of, count), [value] * count)


def pointer(b: Value, address: Value, to: Value) -> Value:
    """An address as a pointer."""
    return b.inttoptr(address, to.as_pointer())


def load_vector(b: Value, address: Value, of: Value = FLOAT, count: int = LANES) -> Value:
    """`count` numbers at an address of any alignment."""
    return b.load(pointer(b, address, vector(of, count)), align=1)


def load_tail(b: Value, address: Value, nbytes: Value, of: Value = FLOAT, count: int = LANES) -> Value:
    """The numbers in the first `nbytes` at an address, zeros behind them."""
    place = cgutils.alloca_once(b, vector(of, count))
    b.store(ir.Constant(vector(of, count), None), place)
    cgutils.raw_memcpy(b, b.bitcast(place, BYTE.as_pointer()), pointer(b, address, BYTE), nbytes, 1)
    return b.load(place)


def upcast(b: Value, raw: Value, kind: int, offset: Value) -> list[Value]:
    """Stored weights, STEP of a kind, as vectors of float32, exactly.

    Codes become the half-precision numbers that they stand for alone, code 0 the least of them, 2^-15 of the largest: to tell it from the
    others would cost more than it is worth in a draft. They are taken in 16-bit lanes, twice as many at a time.

    Args:
        offset: of codes, a 16-bit number: 8 times the matrix' base.
    """
    if kind == BF16:
        return [b.bitcast(b.shl(b.zext(raw, vector(WORD)), words(16)), vector(FLOAT))]
    if kind == F32:
        return [raw]
    if kind == F16:
        return [b.fpext(raw, vector(FLOAT))]
    if kind == INT8:
        return [b.sitofp(raw, vector(FLOAT))]
    dropped, several = (4 if kind == CODES_BF16 else 7), 2 * LANES
    lift = splat(b, b.shl(offset, ir.Constant(SHORT, dropped)), several)
    placed = b.shl(b.sext(raw, vector(SHORT, several)), words(dropped, SHORT, several))
    halves = b.add(b.and_(placed, words(LARGEST_CODE << dropped | 1 << 15, SHORT, several)), lift)
    if kind == CODES_F16:
        return parts(b, b.fpext(b.bitcast(halves, vector(ir.HalfType(), several)), vector(FLOAT, several)))
    zeros = ir.Constant(halves.type, None)
    places = [[place for i in range(first, first + LANES) for place in (several, i)] for first in (0, LANES)]
    return [b.bitcast(b.shuffle_vector(halves, zeros, ir.Constant(vector(WORD, several), chosen)), vector(FLOAT)) for chosen in places]


def parts(b: Value, numbers: Value) -> list[Value]:
    """Several vectors that were loaded as one."""
    nothing = ir.Constant(numbers.type, ir.Undefined)
    places = [range(first, first + LANES) for first in range(0, numbers.type.count, LANES)]
    return [b.shuffle_vector(numbers, nothing, ir.Constant(vector(WORD), list(chosen))) for chosen in places]


def vector_function(b: Value, name: str, arguments: int) -> Callable[..., Value]:
    """One of LLVM's own functions of vectors."""
    kind = ir.FunctionType(vector(FLOAT), [vector(FLOAT)] * arguments)
    function = cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{LANES}f32")
    return lambda *values: b.call(function, values)


def prefetch(b: Value, address: Value) -> None:
    """Begin to bring what lies at an address into the second-level cache (the first is too small for it); harmless where nothing is."""
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), WORD, WORD, WORD])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(function, [pointer(b, address, BYTE), *(ir.Constant(WORD, value) for value in (0, 2, 1))])


def splat(b: Value, scalar: Value, count: int = LANES) -> Value:
    """A scalar in every lane."""
    nothing = ir.Constant(vector(scalar.type, count), ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, scalar, ir.Constant(WORD, 0)), nothing, ir.Constant(vector(WORD, count), [0] * count))


def folded(b: Value, lanes: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes combined to a scalar, halves first, always in the same order."""
    count = LANES
    while count > 1:
        half, nothing = count // 2, ir.Constant(vector(FLOAT, count), ir.Undefined)
        low, high = (
            b.shuffle_vector(lanes, nothing, ir.Constant(vector(WORD, half), list(range(start, start + half)))) for start in (0, half)
        )
        lanes, count = combine(low, high), half
    return b.extract_element(lanes, ir.Constant(WORD, 0))


@contextmanager
def counting(b: Value, start: Value, stop: Value, step: int) -> Iterator[Value]:
    """The body of `for i in range(start, stop, step)`."""
    with cgutils.for_range_slice(b, start, stop, number(step), LONG) as (i, _):
        yield i


def whole(b: Value, count: Value, size: int) -> Value:
    """The largest multiple of `size` that is at most `count`."""
    return b.mul(b.sdiv(count, number(size)), number(size))


class Span(NamedTuple):
    """A matrix in memory: address of its first row and bytes between rows."""

    address: Value
    stride: Value

    def row(self, b: Value, index: Value | int) -> Value:
        """Address of a row."""
        return b.add(self.address, b.mul(self.stride, number(index) if isinstance(index, int) else index))

    def below(self, b: Value, index: Value) -> "Span":
        """The rows from `index` on."""
        return Span(self.row(b, index), self.stride)


def folded_together(b: Value, lanes: Sequence[Value]) -> Value:
    """The sums over the lanes of 1, 2, 4 or 8 vectors, as one vector of as many; each is bit for bit what `folded` makes."""
    vectors, items, width = list(lanes), 1, LANES

    def halves(low: bool) -> list[int]:
        """Places of one half of every item in a pair of vectors, or in a single one."""
        starts = range(0, items * width * min(len(vectors), 2), width)
        return [start + (0 if low else width // 2) + place for start in starts for place in range(width // 2)]

    while width > 1:
        low, high = (ir.Constant(vector(WORD, items * width * min(len(vectors), 2) // 2), halves(which)) for which in (True, False))
        nothing = ir.Constant(vectors[0].type, ir.Undefined)
        pairs = [(one, nothing) for one in vectors] if len(vectors) == 1 else list(zip(vectors[::2], vectors[1::2], strict=True))
        items *= min(len(vectors), 2)
        vectors = [b.fadd(b.shuffle_vector(*pair, low), b.shuffle_vector(*pair, high)) for pair in pairs]
        width //= 2
    return vectors[0]


def emit_tile(b: Value, shape: tuple[int, int, int], weights: Span, x: Span, y: Span, length: Value, offset: Value) -> None:
    """`y[t, r] = sum over i of weights[r, i] * x[t, i]` for the few rows of a `shape` of (kind, weight rows, rows of x).

    A single row of x meets the weight rows one after the other, since memory is fastest read in one sweep. Several rows of x meet them
    together, and meanwhile the weight rows of the next tile are brought nearer in one sweep.
    """
    kind, rows, columns = shape
    fma, zero, item, step = vector_function(b, "fma", 3), floats(0.0), ITEM_BYTES[kind], STEP[kind]
    sums = [[cgutils.alloca_once(b, vector(FLOAT)) for _ in range(columns)] for _ in range(rows)]
    for place in (place for row in sums for place in row):
        b.store(zero, place)
    w_at, x_at = [weights.row(b, r) for r in range(rows)], [x.row(b, t) for t in range(columns)]
    full = whole(b, length, step)
    rest = b.sub(length, full)
    w_from, w_bytes, x_from, x_bytes = (b.mul(count, number(size)) for size in (item, 4) for count in (full, rest))

    def add(chosen: range, weight_at: Callable[[Value], Value], x: Sequence[Value]) -> None:
        x_vectors = [parts(b, numbers) for numbers in x]
        for r in chosen:
            weights = upcast(b, weight_at(w_at[r]), kind, offset)
            for t in range(columns):
                for weight, numbers in zip(weights, x_vectors[t], strict=True):
                    b.store(fma(weight, numbers, b.load(sums[r][t])), sums[r][t])

    sweep = columns == 1 and kind <= F32
    for chosen in (range(r, r + 1) for r in range(rows)) if sweep else (range(rows),):
        with counting(b, number(0), full, step) as i:
            w_offset, x_offset = b.mul(i, number(item)), b.mul(i, number(4))
            ahead = b.add(weights.row(b, rows), b.mul(w_offset, number(rows)))
            for line in range(0, 0 if sweep else rows * step * item, CACHE_LINE):
                prefetch(b, b.add(ahead, number(line)))
            numbers = [load_vector(b, b.add(at, x_offset), FLOAT, step) for at in x_at]
            add(chosen, lambda at, offset=w_offset: load_vector(b, b.add(at, offset), STORED[kind], step), numbers)  # type: ignore[misc]
    with b.if_then(b.icmp_signed(">", rest, number(0)), likely=False):
        tails = [load_tail(b, b.add(at, x_from), x_bytes, FLOAT, step) for at in x_at]
        add(range(rows), lambda at: load_tail(b, b.add(at, w_from), w_bytes, STORED[kind], step), tails)
    for t in range(columns):
        together = folded_together(b, [b.load(sums[r][t]) for r in range(rows)])
        b.store(together, pointer(b, y.row(b, t), vector(FLOAT, rows)), align=4)


def emit_product(b: Value, kind: int, weights: Span, x: Span, y: Span, length: Value, rows: Value, columns: Value, offset: Value) -> None:
    """`y[t, r]` for all rows of the weights and of x (here: columns), in tiles, of as equal a width as can be."""
    if kind <= F32:  # memory is what these wait for
        emit_tiles(b, kind, weights, x, y, length, rows, columns, offset)
        return
    with b.if_else(b.icmp_signed("==", columns, number(1))) as (single, several):
        with single:
            emit_single(b, kind, weights, x, y, length, rows, offset)
        with several:
            emit_tiles(b, kind, weights, x, y, length, rows, columns, offset)


def emit_single(b: Value, kind: int, weights: Span, x: Span, y: Span, length: Value, rows: Value, offset: Value) -> None:
    """`emit_product` for a single row of x: more weight rows at a time, since what a tile takes beside its sums is most of a short one."""
    done = number(0)
    for size in (2 * WEIGHT_ROWS, 1):
        end = b.add(done, whole(b, b.sub(rows, done), size))
        with counting(b, done, end, size) as r:
            emit_tile(b, (kind, size, 1), weights.below(b, r), x, Span(b.add(y.address, b.mul(r, number(4))), y.stride), length, offset)
        done = end


def emit_tiles(b: Value, kind: int, weights: Span, x: Span, y: Span, length: Value, rows: Value, columns: Value, offset: Value) -> None:
    """`emit_product` for several rows of x."""
    by_four, groups = whole(b, rows, WEIGHT_ROWS), b.sdiv(b.add(columns, number(TILE - 1)), number(TILE))
    narrow, wider = b.sdiv(columns, groups), b.srem(columns, groups)
    for first, last, size in ((number(0), by_four, WEIGHT_ROWS), (by_four, rows, 1)):
        with counting(b, first, last, size) as r:
            from_row, done = weights.below(b, r), number(0)
            for tile in range(TILE, 0, -1):
                is_narrow, is_wide = (b.icmp_signed("==", width, number(tile)) for width in (narrow, b.add(narrow, number(1))))
                tiles = b.select(is_wide, wider, b.select(is_narrow, b.sub(groups, wider), number(0)))
                end = b.add(done, b.mul(tiles, number(tile)))
                with counting(b, done, end, tile) as t:
                    target = Span(b.add(y.row(b, t), b.mul(r, number(4))), y.stride)
                    emit_tile(b, (kind, size, tile), from_row, x.below(b, t), target, length, offset)
                done = end


def product_function(module: Value, kind: int) -> Value:
    """`emit_product` as a function of the module that is called, not inlined: compiling it takes longer than all the rest."""
    function = cgutils.get_or_insert_function(module, ir.FunctionType(ir.VoidType(), [LONG] * 10), f"cats_product_{kind}")
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        b = ir.IRBuilder(function.append_basic_block("entry"))
        w, w_stride, x, x_stride, y, y_stride, length, rows, count, offset = function.args
        emit_product(b, kind, Span(w, w_stride), Span(x, x_stride), Span(y, y_stride), length, rows, count, b.trunc(offset, SHORT))
        b.ret_void()
    return function


@intrinsic
def multiply(
    typing: Any,
    kind: Any,
    w: Any,
    w_stride: Any,
    x: Any,
    x_stride: Any,
    y: Any,
    y_stride: Any,
    length: Any,
    rows: Any,
    count: Any,
    offset: Any,
) -> Any:
    """`y[t, r] = sum over i < length of w[r, i] * x[t, i]` for `rows` weight rows of a kind and `count` rows of x; `offset`: of codes."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        for stored in range(len(STORED)):
            with b.if_then(b.icmp_signed("==", arguments[0], number(stored))):
                b.call(product_function(b.module, stored), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


@intrinsic
def decode_row(typing: Any, codes: Any, low: Any, out: Any, length: Any, offset: Any) -> Any:
    """Numbers in bfloat16 of `length` codes and their low bits, four each, in blocks of 64 (cats/nested/format.py); exceptions left out."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        codes, low, out, length, offset = arguments
        lift = splat(b, b.trunc(offset, SHORT))

        def at(i: Value, load: Callable[[Value], Value]) -> Value:
            place = b.srem(i, number(64))
            nibbles = b.add(b.mul(b.sdiv(i, number(64)), number(32)), b.srem(place, number(32)))
            shift = splat(b, b.trunc(b.mul(b.sdiv(place, number(32)), number(4)), SHORT))
            packed = b.zext(load_vector(b, b.add(low, nibbles), BYTE), vector(SHORT))
            code = b.zext(load(b.add(codes, i)), vector(SHORT))
            values = b.and_(code, words(LARGEST_CODE, SHORT))
            lifted = b.select(b.icmp_unsigned("==", values, words(0, SHORT)), words(0, SHORT), b.add(values, lift))
            magnitude = b.or_(b.shl(lifted, words(4, SHORT)), b.and_(b.lshr(packed, shift), words(15, SHORT)))
            return b.or_(b.sub(magnitude, words(8, SHORT)), b.shl(b.and_(code, words(128, SHORT)), words(8, SHORT)))

        full = whole(b, length, LANES)
        rest = b.sub(length, full)
        with counting(b, number(0), full, LANES) as i:
            numbers = at(i, lambda address: load_vector(b, address, BYTE))
            b.store(numbers, pointer(b, b.add(out, b.mul(i, number(2))), vector(SHORT)), align=1)
        with b.if_then(b.icmp_signed(">", rest, number(0)), likely=False):
            place = cgutils.alloca_once(b, vector(SHORT))
            b.store(at(full, lambda address: load_tail(b, address, rest, BYTE)), place)
            target = pointer(b, b.add(out, b.mul(full, number(2))), BYTE)
            cgutils.raw_memcpy(b, target, b.bitcast(place, BYTE.as_pointer()), b.mul(rest, number(2)), 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def put_exception(typing: Any, out: Any, columns: Any, bits: Any, entry: Any) -> Any:
    """Entry number `entry` of a matrix' exceptions into its row."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        out, columns, bits, entry = arguments
        column, number_ = (b.load(pointer(b, b.add(at, b.mul(entry, number(4))), WORD)) for at in (columns, bits))
        place = b.add(out, b.mul(b.zext(column, LONG), number(2)))
        b.store(b.trunc(number_, SHORT), pointer(b, place, SHORT))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def load_int(typing: Any, address: Any, index: Any) -> Any:
    """A 32-bit integer of an array."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        return b.sext(b.load(pointer(b, b.add(arguments[0], b.mul(arguments[1], number(4))), WORD)), LONG)

    return types.int64(types.int64, types.int64), codegen


def emit_exp(b: Value, x: Value) -> Value:
    """exp in every lane, to 2 units in the last place (Cephes' polynomial); 0 below -87, and at most exp(88)."""
    fma, floor = vector_function(b, "fma", 3), vector_function(b, "floor", 1)
    vanishes = b.fcmp_ordered("<", x, floats(-87.0))
    x = b.select(vanishes, floats(0.0), x)
    x = b.select(b.fcmp_ordered(">", x, floats(88.0)), floats(88.0), x)
    power = floor(fma(x, floats(1.44269504088896341), floats(0.5)))
    rest = fma(power, floats(2.12194440e-4), fma(power, floats(-0.693359375), x))
    sum_ = floats(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        sum_ = fma(sum_, rest, floats(coefficient))
    sum_ = fma(b.fmul(rest, rest), sum_, b.fadd(rest, floats(1.0)))
    exponent = b.add(b.fptosi(power, vector(WORD)), ir.Constant(vector(WORD), [127] * LANES))
    scale = b.bitcast(b.shl(exponent, ir.Constant(vector(WORD), [23] * LANES)), vector(FLOAT))
    return b.select(vanishes, floats(0.0), b.fmul(sum_, scale))


@intrinsic
def to_exponentials(typing: Any, address: Any, count: Any, top: Any) -> Any:
    """`x[i] = exp(x[i] - top)` for `count` numbers, a multiple of LANES; returns their sum."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        address, count, top = arguments
        total, highest = cgutils.alloca_once(b, vector(FLOAT)), splat(b, top)
        b.store(floats(0.0), total)
        with counting(b, number(0), count, LANES) as i:
            at = b.add(address, b.mul(i, number(4)))
            raised = emit_exp(b, b.fsub(load_vector(b, at), highest))
            b.store(raised, pointer(b, at, vector(FLOAT)), align=1)
            b.store(b.fadd(b.load(total), raised), total)
        return folded(b, b.load(total), b.fadd)

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def highest_of(typing: Any, address: Any, count: Any) -> Any:
    """The largest of `count` numbers, a multiple of LANES."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        def larger(one: Value, other: Value) -> Value:
            return b.select(b.fcmp_ordered(">", one, other), one, other)

        best = cgutils.alloca_once(b, vector(FLOAT))
        b.store(floats(LOWEST), best)
        with counting(b, number(0), arguments[1], LANES) as i:
            b.store(larger(load_vector(b, b.add(arguments[0], b.mul(i, number(4)))), b.load(best)), best)
        return folded(b, b.load(best), larger)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def gate(typing: Any, gates: Any, ups: Any, count: Any) -> Any:
    """`gates[i] = gates[i] * sigmoid(gates[i]) * ups[i]` for `count` numbers, a multiple of LANES."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        gates, ups, count = arguments
        with counting(b, number(0), count, LANES) as i:
            offset = b.mul(i, number(4))
            at = b.add(gates, offset)
            value = load_vector(b, at)
            activated = b.fdiv(value, b.fadd(floats(1.0), emit_exp(b, b.fsub(floats(0.0), value))))
            b.store(b.fmul(activated, load_vector(b, b.add(ups, offset))), pointer(b, at, vector(FLOAT)), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def emit_mix(b: Value, vectors: int, last: Value | None, chances: Value, values: Span, out: Value, count: Value) -> None:
    """`out[:] += sum over slots of chances[slot] * values[slot, :]`, slot after slot, for `vectors` * LANES columns.

    Args:
        last: bytes of a single, shorter vector; None: all are whole.
    """
    fma = vector_function(b, "fma", 3)

    def load(address: Value, place: int) -> Value:
        at = b.add(address, number(4 * LANES * place))
        return load_vector(b, at) if last is None else load_tail(b, at, last)

    sums = [cgutils.alloca_once(b, vector(FLOAT)) for _ in range(vectors)]
    for place, total in enumerate(sums):
        b.store(load(out, place), total)
    with counting(b, number(0), count, 1) as slot:
        chance = splat(b, b.load(pointer(b, b.add(chances, b.mul(slot, number(4))), FLOAT)))
        row = values.row(b, slot)
        for place, total in enumerate(sums):
            b.store(fma(chance, load(row, place), b.load(total)), total)
    for place, total in enumerate(sums):
        at = b.add(out, number(4 * LANES * place))
        if last is None:
            b.store(b.load(total), pointer(b, at, vector(FLOAT)), align=1)
        else:
            cgutils.raw_memcpy(b, pointer(b, at, BYTE), b.bitcast(total, BYTE.as_pointer()), last, 1)


@intrinsic
def mix(typing: Any, chances: Any, values: Any, stride: Any, out: Any, width: Any, count: Any) -> Any:
    """`out[:] += sum over `count` slots of chances[slot] * values[slot, :]`, for `width` columns."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        chances, values, stride, out, width, count = arguments
        done = number(0)
        for vectors in (4, 1):
            end = b.add(done, whole(b, b.sub(width, done), vectors * LANES))
            with counting(b, done, end, vectors * LANES) as column:
                offset = b.mul(column, number(4))
                emit_mix(b, vectors, None, chances, Span(b.add(values, offset), stride), b.add(out, offset), count)
            done = end
        rest = b.mul(b.sub(width, done), number(4))
        with b.if_then(b.icmp_signed(">", rest, number(0)), likely=False):
            offset = b.mul(done, number(4))
            emit_mix(b, 1, rest, chances, Span(b.add(values, offset), stride), b.add(out, offset), count)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


def emit_into(b: Value, arguments: Sequence[Value], combine: Callable[[Value, Value], Value]) -> None:
    """`out[i] = combine(out[i], x[i])` for `count` numbers."""
    out, x, count = arguments
    full = whole(b, count, LANES)
    with counting(b, number(0), full, LANES) as i:
        at = b.add(out, b.mul(i, number(4)))
        b.store(combine(load_vector(b, at), load_vector(b, b.add(x, b.mul(i, number(4))))), pointer(b, at, vector(FLOAT)), align=1)
    with counting(b, full, count, 1) as i:
        place, other = (pointer(b, b.add(address, b.mul(i, number(4))), FLOAT) for address in (out, x))
        b.store(combine(b.load(place), b.load(other)), place)


@intrinsic
def add_into(typing: Any, out: Any, x: Any, count: Any) -> Any:
    """`out[i] += x[i]` for `count` numbers."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        emit_into(b, arguments, b.fadd)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def scale_by(typing: Any, out: Any, x: Any, count: Any) -> Any:
    """`out[i] *= x[i]` for `count` numbers."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        emit_into(b, arguments, b.fmul)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def rotate(typing: Any, head: Any, cos: Any, sin: Any, half: Any, scale: Any) -> Any:
    """The rotary embedding of one head of 2 * `half` numbers, in place, then times `scale`."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        head, cos, sin, half, scale = arguments

        def turn(place: Value, load: Callable[[Value], Value], store: Callable[[Value, Value], None], factor: Value) -> None:
            near, far = b.mul(place, number(4)), b.mul(b.add(place, half), number(4))
            low, high = load(b.add(head, near)), load(b.add(head, far))
            first = b.fsub(b.fmul(low, load(b.add(cos, near))), b.fmul(high, load(b.add(sin, near))))
            second = b.fadd(b.fmul(high, load(b.add(cos, far))), b.fmul(low, load(b.add(sin, far))))
            store(b.fmul(first, factor), b.add(head, near))
            store(b.fmul(second, factor), b.add(head, far))

        full = whole(b, half, LANES)
        with counting(b, number(0), full, LANES) as i:
            turn(i, partial(load_vector, b), lambda value, at: b.store(value, pointer(b, at, vector(FLOAT)), align=1), splat(b, scale))
        with counting(b, full, half, 1) as i:
            turn(i, lambda at: b.load(pointer(b, at, FLOAT)), lambda value, at: b.store(value, pointer(b, at, FLOAT)), scale)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def multiply_by(typing: Any, x: Any, count: Any, factor: Any) -> Any:
    """`x[i] *= factor` for `count` numbers."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        with counting(b, number(0), arguments[1], 1) as i:
            place = pointer(b, b.add(arguments[0], b.mul(i, number(4))), FLOAT)
            b.store(b.fmul(b.load(place), arguments[2]), place)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def fill(typing: Any, x: Any, count: Any, value: Any) -> Any:
    """`x[i] = value` for `count` numbers."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        with counting(b, number(0), arguments[1], 1) as i:
            b.store(arguments[2], pointer(b, b.add(arguments[0], b.mul(i, number(4))), FLOAT))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def copy(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """`target[i] = source[i]` for `count` numbers."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        target, source = (pointer(b, address, BYTE) for address in arguments[:2])
        cgutils.raw_memcpy(b, target, source, b.mul(arguments[2], number(4)), 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add_atomically(typing: Any, address: Any, value: Any) -> Any:
    """Add to a 64-bit number that threads share; returns what it was before."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        return b.atomic_rmw("add", pointer(b, arguments[0], LONG), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def load_atomically(typing: Any, address: Any) -> Any:
    """A 64-bit number that threads share."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        return b.load_atomic(pointer(b, arguments[0], LONG), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_atomically(typing: Any, address: Any, value: Any) -> Any:
    """Set a 64-bit number that threads share."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        b.store_atomic(arguments[1], pointer(b, arguments[0], LONG), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


yield_processor = types.ExternalFunction("sched_yield", types.int32())
sleep_microseconds = types.ExternalFunction("usleep", types.int32(types.uint32))
SPINS = 2000
"""Looks at what another thread has to do before a thread offers its processor to others."""
NAP = 20
"""Microseconds between looks at a matrix that is still to come."""


@intrinsic
def normalise(typing: Any, x: Any, weight: Any, out: Any, count: Any, epsilon: Any) -> Any:
    """`out[i] = x[i] / sqrt(mean of squares + epsilon) * weight[i]` for `count` numbers; `out` may be `x`."""

    def codegen(context: Any, b: Value, signature: Any, arguments: Sequence[Value]) -> Value:
        x, weight, out, count, epsilon = arguments
        fma, total = vector_function(b, "fma", 3), cgutils.alloca_once(b, vector(FLOAT))
        full = whole(b, count, LANES)
        from_, nbytes = (b.mul(part, number(4)) for part in (full, b.sub(count, full)))
        shorter = b.icmp_signed(">", nbytes, number(0))
        b.store(floats(0.0), total)
        with counting(b, number(0), full, LANES) as i:
            numbers = load_vector(b, b.add(x, b.mul(i, number(4))))
            b.store(fma(numbers, numbers, b.load(total)), total)
        with b.if_then(shorter, likely=False):
            numbers = load_tail(b, b.add(x, from_), nbytes)
            b.store(fma(numbers, numbers, b.load(total)), total)
        mean = b.fdiv(folded(b, b.load(total), b.fadd), b.sitofp(count, FLOAT))
        root = cgutils.get_or_insert_function(b.module, ir.FunctionType(FLOAT, [FLOAT]), "llvm.sqrt.f32")
        scale = splat(b, b.fdiv(ir.Constant(FLOAT, 1.0), b.call(root, [b.fadd(mean, epsilon)])))
        with counting(b, number(0), full, LANES) as i:
            offset = b.mul(i, number(4))
            scaled = b.fmul(load_vector(b, b.add(x, offset)), scale)
            b.store(b.fmul(scaled, load_vector(b, b.add(weight, offset))), pointer(b, b.add(out, offset), vector(FLOAT)), align=1)
        with b.if_then(shorter, likely=False):
            place = cgutils.alloca_once(b, vector(FLOAT))
            scaled = b.fmul(load_tail(b, b.add(x, from_), nbytes), scale)
            b.store(b.fmul(scaled, load_tail(b, b.add(weight, from_), nbytes)), place)
            cgutils.raw_memcpy(b, pointer(b, b.add(out, from_), BYTE), b.bitcast(place, BYTE.as_pointer()), nbytes, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.float32), codegen


class Sizes(NamedTuple):
    """Shapes of a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    epsilon: np.float32


AWAITED, ABANDONED = 1, 2
"""Words of a matrix that is still to come, and of one that will not."""


class Weights(NamedTuple):
    """By layer: words of the matrices, and addresses of the biases, [L, 7] in the order of use (q, k, v, o, gate, up, down), addresses of
    the norms [L, 4] (before attention, before the MLP, of queries, of keys). A matrix's word is 8 times its address plus its kind. 0 where
    there is none. Biases and norms are float32. `done` [L, 7] counts how often a thread was through with a matrix."""

    matrices: np.ndarray
    biases: np.ndarray
    norms: np.ndarray
    done: np.ndarray


class Group(NamedTuple):
    """T rows of one sequence.

    Attributes:
        hidden_TD: their states, replaced in place.
        cos_TE, sin_TE: of their positions.
        slots_T: where their keys and values go in the cache.
        seen_T: row t sees the slots [0, seen_T[t]) and then, in this order,
        others: the slots others[ends[t] : ends[t + 1]].
        cache: [L, 2, kv_heads, capacity, head_dim].
    """

    hidden_TD: np.ndarray
    cos_TE: np.ndarray
    sin_TE: np.ndarray
    slots_T: np.ndarray
    seen_T: np.ndarray
    others: np.ndarray
    ends: np.ndarray
    cache: np.ndarray


CODES, OFFSET, LOW, LOW_STRIDE, STARTS, COLUMNS, BITS, SCALES, DESCRIBED = 0, 1, 2, 3, 4, 5, 6, 7, 8
"""Where a description of a matrix of codes has their address, 8 times their base, the address of their low bits, the bytes of these from
row to row, addresses of where each row's exceptions begin, of their columns and of their bits, and of integers' scales. The word of such
a matrix has the address of its description."""


class Space(NamedTuple):
    """Work space: normed rows [T, D], queries, keys and values [T, ..], attended rows [T, ..], gates and ups [T, inner padded to whole
    vectors], and for every thread the scores of the heads that share keys [threads, heads, slots padded], and decoded weights."""

    normed: np.ndarray
    projected: np.ndarray
    attended: np.ndarray
    gates: np.ndarray
    ups: np.ndarray
    scores: np.ndarray
    decoded: np.ndarray


class Crew(NamedTuple):
    """This thread's number among `size`, and what they share: a barrier, and counters of work taken, zero at the beginning."""

    me: int
    size: int
    barrier: int
    counters: int


compiled = njit(nogil=True, cache=True, error_model="numpy")
inlined = njit(nogil=True, error_model="numpy", inline="always")


@compiled
def meet(crew: Crew) -> None:
    """Wait until all threads have come here."""
    if crew.size == 1:
        return
    goal = (add_atomically(crew.barrier, 1) // crew.size + 1) * crew.size
    spins = 0
    while load_atomically(crew.barrier) < goal:
        spins += 1
        if spins > SPINS:
            yield_processor()


@compiled
def arrived(place: int) -> int:
    """The word of a matrix, once it is there."""
    spins, word = 0, load_atomically(place)
    while word == AWAITED:
        spins += 1
        if spins > SPINS:
            sleep_microseconds(NAP)
        word = load_atomically(place)
    return word


@compiled
def publish(place: int, word: int) -> None:
    """Set the word of a matrix that threads wait for."""
    store_atomically(place, word)


@compiled
def take(crew: Crew, counter: int) -> int:
    """The next piece of work that no thread has taken."""
    return add_atomically(crew.counters + 8 * counter, 1)


@compiled
def multiply_nested(
    parts: int, scratch: int, start: int, size: int, x: int, x_stride: int, y: int, y_stride: int, length: int, count: int
) -> None:
    """`multiply` for the weight rows [start, start + size) of a nested matrix, a few of them decoded at a time; y is that of the first."""
    codes, low, low_stride = load_atomically(parts + 8 * CODES), load_atomically(parts + 8 * LOW), load_atomically(parts + 8 * LOW_STRIDE)
    starts, columns, bits = load_atomically(parts + 8 * STARTS), load_atomically(parts + 8 * COLUMNS), load_atomically(parts + 8 * BITS)
    offset = load_atomically(parts + 8 * OFFSET)
    for first in range(start, start + size, DECODED):
        rows = min(DECODED, start + size - first)
        for row in range(rows):
            out, place = scratch + 2 * length * row, first + row
            decode_row(codes + place * length, low + place * low_stride, out, length, offset)
            for entry in range(load_int(starts, place), load_int(starts, place + 1)):
                put_exception(out, columns, bits, entry)
        multiply(BF16, scratch, 2 * length, x, x_stride, y + 4 * (first - start), y_stride, length, rows, count, 0)


@inlined
def product(
    crew: Crew,
    counter: int,
    kind: int,
    weight: int,
    bias: int,
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    length: int,
    rows: int,
    count: int,
    scratch: int,
) -> None:
    """This thread's share of `y[t, r] = sum over i < length of W[r, i] x[t, i] + b[r]` for `rows` weight rows and `count` rows of x."""
    numbers, offset, scales = weight, 0, 0
    if CODES_BF16 <= kind <= INT8:
        numbers, offset = load_atomically(weight + 8 * CODES), load_atomically(weight + 8 * OFFSET)
        scales = load_atomically(weight + 8 * SCALES)
    w_stride = length * (4 if kind == F32 else 2 if kind <= F16 else 1)
    while True:
        start = take(crew, counter) * CHUNK
        if start >= rows:
            break
        size = min(rows - start, CHUNK)
        if kind == NESTED:
            multiply_nested(weight, scratch, start, size, x, x_stride, y + 4 * start, y_stride, length, count)
        else:
            multiply(kind, numbers + start * w_stride, w_stride, x, x_stride, y + 4 * start, y_stride, length, size, count, offset)
        for row in range(count if kind == INT8 else 0):
            scale_by(y + 4 * start + row * y_stride, scales + 4 * start, size)
        if bias:
            for row in range(count):
                add_into(y + 4 * start + row * y_stride, bias + 4 * start, size)


@compiled
def place_heads(crew: Crew, sizes: Sizes, layer: int, weights: Weights, group: Group, space: Space) -> None:
    """Norm and rotate queries and keys; scale queries; put keys and values into the cache."""
    width, scale, one = sizes.head_dim, np.float32(1.0 / math.sqrt(sizes.head_dim)), np.float32(1.0)
    rotated, cache, strides = sizes.heads + sizes.kv_heads, group.cache.ctypes.data, group.cache.strides
    for unit in range(crew.me, len(group.slots_T) * rotated, crew.size):
        row, head = unit // rotated, unit % rotated
        address = space.projected.ctypes.data + row * space.projected.strides[0] + 4 * width * head
        norm = weights.norms[layer, 2 if head < sizes.heads else 3]
        if norm:
            normalise(address, norm, address, width, sizes.epsilon)
        cos, sin = group.cos_TE.ctypes.data + row * group.cos_TE.strides[0], group.sin_TE.ctypes.data + row * group.sin_TE.strides[0]
        rotate(address, cos, sin, width // 2, scale if head < sizes.heads else one)
        if head >= sizes.heads:
            place = cache + layer * strides[0] + (head - sizes.heads) * strides[2] + group.slots_T[row] * strides[3]
            copy(place, address, width)
            copy(place + strides[1], address + 4 * width * sizes.kv_heads, width)


@compiled
def attend(
    q: int, heads: int, width: int, k: int, v: int, stride: int, seen: int, others: np.ndarray, scores: int, room: int, out: int
) -> None:
    """Attention of one row.

    Args:
        q: address of `heads` scaled queries of `width` numbers that share keys and values.
        k, v: addresses of the keys and values of slot 0; `stride` bytes between slots.
        seen, others: the slots [0, seen), then these, in this order.
        scores: address of work space, `room` bytes for each head.
        out: address of the result, laid out as the queries.
    """
    count, between = seen + len(others), 4 * width
    padded = (count + LANES - 1) // LANES * LANES
    multiply(F32, k, stride, q, between, scores, room, width, seen, heads, 0)
    for place in range(len(others)):
        multiply(F32, k + others[place] * stride, stride, q, between, scores + 4 * (seen + place), room, width, 1, heads, 0)
    for head in range(heads):
        row, target = scores + head * room, out + head * between
        fill(row + 4 * count, padded - count, np.float32(LOWEST))
        fill(target, width, np.float32(0.0))
        total = to_exponentials(row, padded, highest_of(row, padded))
        mix(row, v, stride, target, width, seen)
        for place in range(len(others)):
            mix(row + 4 * (seen + place), v + others[place] * stride, stride, target, width, 1)
        multiply_by(target, width, np.float32(1.0) / total)


@inlined
def attend_rows(crew: Crew, counter: int, sizes: Sizes, layer: int, group: Group, space: Space) -> None:
    """This thread's share of the attention of all rows: heads that share keys together, or each alone where that shares work better."""
    rows, shared, strides = len(group.slots_T), sizes.heads // sizes.kv_heads, group.cache.strides
    together = shared if rows * sizes.kv_heads >= 4 * crew.size or crew.size == 1 else 1
    units = sizes.heads // together
    scores = space.scores.ctypes.data + crew.me * space.scores.strides[0]
    while True:
        unit = take(crew, counter)
        if unit >= rows * units:
            break
        row, first = unit // units, unit % units * together
        q = space.projected.ctypes.data + row * space.projected.strides[0] + 4 * sizes.head_dim * first
        out = space.attended.ctypes.data + row * space.attended.strides[0] + 4 * sizes.head_dim * first
        k = group.cache.ctypes.data + layer * strides[0] + first // shared * strides[2]
        others = group.others[group.ends[row] : group.ends[row + 1]]
        seen, room = group.seen_T[row], space.scores.strides[1]
        attend(q, together, sizes.head_dim, k, k + strides[1], strides[3], seen, others, scores, room, out)


@compiled
def norm_rows(crew: Crew, norm: int, epsilon: np.float32, x: np.ndarray, out: np.ndarray) -> None:
    """This thread's rows of `x`, normed into `out`."""
    for row in range(crew.me, len(x), crew.size):
        normalise(x.ctypes.data + row * x.strides[0], norm, out.ctypes.data + row * out.strides[0], x.shape[1], epsilon)


@compiled
def add_rows(crew: Crew, x: np.ndarray, out: np.ndarray) -> None:
    """This thread's rows of `x`, added to `out`."""
    for row in range(crew.me, len(x), crew.size):
        add_into(out.ctypes.data + row * out.strides[0], x.ctypes.data + row * x.strides[0], x.shape[1])


@compiled
def gate_rows(crew: Crew, gates: np.ndarray, ups: np.ndarray) -> None:
    """This thread's stretch of every row, through SwiGLU; rows are padded to whole vectors."""
    vectors = gates.strides[0] // (4 * LANES)
    first, last = vectors * crew.me // crew.size * LANES, vectors * (crew.me + 1) // crew.size * LANES
    if last > first:
        for row in range(len(gates)):
            gate(gates.ctypes.data + row * gates.strides[0] + 4 * first, ups.ctypes.data + row * ups.strides[0] + 4 * first, last - first)


QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, MATRICES = 0, 1, 2, 3, 4, 5, 6, 7
COUNTERS = MATRICES + 1


@compiled
def before_product(crew: Crew, sizes: Sizes, layer: int, matrix: int, weights: Weights, group: Group, space: Space) -> None:
    """What a layer does between the last product and that of `matrix`, attention left out."""
    if matrix in (QUERY, GATE):
        norm_rows(crew, weights.norms[layer, 0 if matrix == QUERY else 1], sizes.epsilon, group.hidden_TD, space.normed)
        meet(crew)


@compiled
def after_product(crew: Crew, sizes: Sizes, layer: int, matrix: int, weights: Weights, group: Group, space: Space) -> None:
    """What a layer does with the product of `matrix`."""
    if matrix in (QUERY, KEY, GATE):
        return
    meet(crew)
    if matrix == VALUE:
        place_heads(crew, sizes, layer, weights, group, space)
    elif matrix == UP:
        gate_rows(crew, space.gates, space.ups)
    else:
        add_rows(crew, space.normed, group.hidden_TD)
    meet(crew)


@inlined
def run_matrix(crew: Crew, counter: int, sizes: Sizes, layer: int, matrix: int, weights: Weights, group: Group, space: Space) -> bool:
    """A layer's product with one matrix, and what comes before and after it; False where the matrix will not come."""
    before_product(crew, sizes, layer, matrix, weights, group, space)
    if matrix == OUTPUT:
        attend_rows(crew, counter + 1, sizes, layer, group, space)
        meet(crew)
    normed, normed_stride = space.normed.ctypes.data, space.normed.strides[0]
    width = group.hidden_TD.shape[1]
    x, x_stride, length, y, y_stride, rows = normed, normed_stride, width, normed, normed_stride, width
    if matrix <= VALUE:
        rows = sizes.head_dim * (sizes.heads if matrix == QUERY else sizes.kv_heads)
        first = 0 if matrix == QUERY else sizes.head_dim * (sizes.heads + (matrix - KEY) * sizes.kv_heads)
        y, y_stride = space.projected.ctypes.data + 4 * first, space.projected.strides[0]
    elif matrix == OUTPUT:
        x, x_stride, length = space.attended.ctypes.data, space.attended.strides[0], sizes.heads * sizes.head_dim
    elif matrix == DOWN:
        x, x_stride, length = space.gates.ctypes.data, space.gates.strides[0], sizes.inner
    else:
        target = space.gates if matrix == GATE else space.ups
        y, y_stride, rows = target.ctypes.data, target.strides[0], sizes.inner
    place, bias, count = 8 * (layer * MATRICES + matrix), weights.biases[layer, matrix], len(group.hidden_TD)
    word, scratch = arrived(weights.matrices.ctypes.data + place), space.decoded.ctypes.data + crew.me * space.decoded.strides[0]
    if word == ABANDONED:
        return False
    product(crew, counter, word & 7, word >> 3, bias, x, x_stride, y, y_stride, length, rows, count, scratch)
    add_atomically(weights.done.ctypes.data + place, 1)
    after_product(crew, sizes, layer, matrix, weights, group, space)
    return True


@compiled
def run_layers(
    crew: Crew,
    start: int,
    stop: int,
    first: int,
    last: int,
    runs: np.ndarray,
    sizes: Sizes,
    weights: Weights,
    group: Group,
    space: Space,
) -> None:
    """Layers [start, stop), of each of them the matrices [first, last) and what goes with them.

    Args:
        runs: bytes [layers, 2]; 0 where a layer's attention, or its MLP, is left out.
    """
    for layer in range(start, stop):
        for matrix in range(first, last):
            if not runs[layer, 1 if matrix > OUTPUT else 0]:
                continue
            counter = (layer - start) * COUNTERS + matrix + (1 if matrix > OUTPUT else 0)
            if not run_matrix(crew, counter, sizes, layer, matrix, weights, group, space):
                return


@compiled
def run_product(crew: Crew, word: int, bias: int, x: np.ndarray, y: np.ndarray, scratch: np.ndarray) -> None:
    """`y = x W^T + b` with the matrix that a word names; `scratch` [threads, ..] is for decoded weights."""
    y_address, stride, room = y.ctypes.data, y.strides[0], scratch.ctypes.data + crew.me * scratch.strides[0]
    x_address, x_stride, length = x.ctypes.data, x.strides[0], x.shape[1]
    product(crew, 0, word & 7, word >> 3, bias, x_address, x_stride, y_address, stride, length, y.shape[1], len(x), room)


@compiled
def run_norm(crew: Crew, norm: int, epsilon: np.float32, x: np.ndarray, out: np.ndarray) -> None:
    """RMS norm of every row."""
    norm_rows(crew, norm, epsilon, x, out)
