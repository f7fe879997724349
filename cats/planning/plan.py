"""Which weights stay in memory and which are streamed, for a budget: arithmetic over sizes, no torch and no files.

A run holds a fixed part (interpreter, head, norms, adapters, caches, activations), the matrices of the layers
`[0, front)` that drafting and shallow verification run on, and a ring through which everything else is streamed. What
the budget leaves beyond that pins further matrices. They are spread evenly over the target pass, so that at any moment
of it there is something to compute and something to read. A cyclic scan defeats any cache that evicts, so the set is fixed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cats.errors import BudgetError, CatsError

PAGE = 4096
HUGE_PAGE = 2 << 20
COVERS = ("process", "weights")
PREFILL_ROWS = 512
SAMPLING_BYTES = 32
"""What choosing a token takes per logit, at most: sampling with top-p sorts probabilities in float32, with indices of 8 bytes."""
EXACT_PRECISION, COARSE_PRECISION = "exact", "coarse"
ALL, BEHIND, HOSTED, LIBRARIES = "all layers", "pinned behind the front", "weights in host memory", "interpreter and libraries"
ALWAYS = "small parts of streamed weights"
BY_METHODS = "method resources"
STAGING_PLACES = 2
"""On a device, for pieces that are copied there in every pass."""


@dataclass(frozen=True)
class Piece:
    """A stretch of bytes that is in one place as a whole: a matrix of a layer, or a part of one.

    Attributes:
        nbytes: as stored, which is what a stream moves.
        resident_bytes: in memory, where the piece is resident; less than `nbytes` where it is rounded when it is loaded.
        part: which part of its matrix: "exact" is all of it, as it was published.
        precisions: of the views that need it; `EXACT_PRECISION` is the exact pass's.
        always: whether it is resident under every plan.
        stands_for: precisions that it serves too where it is resident: pieces of its matrix that serve no other are then left out.
    """

    layer: int
    matrix: str
    nbytes: int
    resident_bytes: int
    part: str = "exact"
    precisions: frozenset[str] = frozenset({EXACT_PRECISION})
    always: bool = False
    stands_for: frozenset[str] = frozenset()

    @property
    def sublayer(self) -> tuple[int, str]:
        """The attention or the MLP that it belongs to: what groups of rows pass through together."""
        return self.layer, self.matrix.partition(".")[0]


@dataclass(frozen=True)
class View:
    """Which form of the model a pass runs.

    `EXACT`, the whole model as published, alone decides tokens; every other view drafts.

    Attributes:
        precision: which pieces of the weights it multiplies by.
        attention, mlp: layers whose attention, or MLP, it leaves out (CAS-Spec, the paper's layer sparsity).
    """

    precision: str = EXACT_PRECISION
    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    def needs(self, piece: Piece) -> bool:
        """Whether a pass through all layers multiplies by `piece`."""
        layer, sublayer = piece.sublayer
        return self.precision in piece.precisions and layer not in (self.attention if sublayer == "self_attn" else self.mlp)

    def follows(self, above: "View") -> bool:
        """Whether a pass of this view may look at keys and values that a pass of `above` wrote.

        The exact pass sees its own alone; a draft those of any view that runs every attention which it runs itself.
        """
        return self == above or (self != EXACT and above.attention <= self.attention)

    def layers_run(self, start: int, stop: int) -> int:
        """How many of the layers [start, stop) it runs, in whole or in part."""
        return stop - start - len([layer for layer in self.attention & self.mlp if start <= layer < stop])

    def in_model(self, layers: int, width: int) -> "View":
        """This view of a model of so many layers and so wide states; a view that depends on them says more (cats/planning/sparsity.py)."""
        return self

    @property
    def label(self) -> str:
        """In a few words."""
        skipped = len(self.attention) + len(self.mlp)
        form = "" if self.precision == EXACT_PRECISION else f"a {self.precision} form of the "
        return f"{form}weights" + (f" without {skipped} sublayers" if skipped else "")


EXACT = View()
COARSE = View(precision=COARSE_PRECISION)
"""The whole model, of weights that are stored or resident in a coarse form as well."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model in bytes as stored, and the widths that its caches and activations follow.

    Attributes:
        matrices: name and bytes of every matrix of one decoder layer, in the order in which a layer uses them.
        other_layer_bytes: norms and biases of one layer, always resident; the model's last norm is charged as much.
        adapter_bytes: one exit adapter, as resident; where they differ in size, their mean, rounded up.
        kv_width: kv_heads * head_dim.
        work_bytes: work space of the projections (cats/linear.py).
        rotary_numbers: positions of the context by head_dim: the cosines of a rotary table.
        stored: every piece of the layers, in the order of the exact pass; where none is given, layers are equal and `matrices` whole.
        table_bytes: the embedding table, where it is another tensor than the head.
    """

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    kv_width: int
    matrices: tuple[tuple[str, int], ...]
    other_layer_bytes: int
    lm_head_bytes: int
    adapter_bytes: int
    work_bytes: int = 0
    rotary_numbers: int = 0
    stored: tuple[Piece, ...] = ()
    table_bytes: int = 0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Every piece of the layers, in the order of the exact pass."""
        return self.stored or tuple(Piece(layer, name, size, size) for layer in range(self.layers) for name, size in self.matrices)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the matrices of one decoder layer."""
        return sum(nbytes for _, nbytes in self.matrices)


@dataclass(frozen=True)
class Demand:
    """What a run asks of memory, whatever the budget.

    Attributes:
        front: layers [0, front) must be resident: the shallow exit of CATS, the draft exit of Kangaroo, 0 for plain decoding.
        adapters: number of exit adapters.
        positions: prompt and answer together, at most.
        nodes: tree nodes, root included, at most.
        ring_buffers: size of the ring in largest matrices.
        pinning: False is the paper's way: nothing beyond the front stays.
        compute_itemsize: bytes of one number in caches and activations.
        interpreter_bytes: the process before any weight is loaded.
        views: that the method drafts with; what they need is resident.
        table: whether the embedding table is resident; else rows of it are read when their tokens occur.
        method_bytes: of what methods keep resident with the model for its whole life.
    """

    front: int = 0
    adapters: int = 0
    positions: int = 2048
    nodes: int = 1
    ring_buffers: int = 3
    pinning: bool = True
    compute_itemsize: int = 4
    interpreter_bytes: int = 0
    views: tuple[View, ...] = ()
    table: bool = False
    method_bytes: int = 0

    def keeps(self, piece: Piece) -> bool:
        """Whether `piece` must be resident: drafting multiplies by it, or it always is."""
        front = (piece.layer < self.front or piece.always) and EXACT.needs(piece)
        return front or any(view.needs(piece) for view in self.views)


@dataclass(frozen=True)
class MemoryPlan:
    """A division of the weights that fits.

    Attributes:
        demand: what was asked.
        budget_bytes: None: no limit, everything resident.
        covers: "process", or "weights": the paper's way, which leaves out interpreter, caches and activations.
        pinned: resident pieces, those that drafting needs included.
        streamed: pieces read once per target pass, in the order of use.
        ring_bytes: 0 where nothing is streamed.
        charges: what each part of memory was charged with; sums to at most the budget.
        sizes: of the model.
        hosted: pieces resident in host memory and copied to a device with memory of its own in every pass.
        device_charges: what each part of that device's memory was charged with; none where there is one memory for everything.
    """

    demand: Demand
    budget_bytes: int | None
    covers: str
    pinned: frozenset[Piece]
    streamed: tuple[Piece, ...]
    ring_bytes: int
    streamed_bytes: int
    charges: tuple[tuple[str, int], ...] = field(default=())
    sizes: ModelSizes | None = None
    hosted: frozenset[Piece] = frozenset()
    device_charges: tuple[tuple[str, int], ...] = ()

    @property
    def charged(self) -> int:
        """Bytes charged in all."""
        return sum(nbytes for _, nbytes in self.charges)

    def activations(self, positions: int, nodes: int) -> int:
        """What the passes of an answer hold beside weights and caches, at most."""
        return 0 if self.sizes is None else activation_bytes(self.sizes, replace(self.demand, positions=positions, nodes=nodes))

    def grant(self, piece: Piece) -> str:
        """What a resident piece is charged to."""
        if piece in self.hosted:
            return HOSTED
        if not self.streamed and not self.hosted:
            return ALL
        return front_name(self.demand) if self.demand.keeps(piece) else BEHIND

    @property
    def holds_sublayers(self) -> bool:
        """Whether the ring holds at once what any attention or MLP streams, so that many groups of rows can share one stream."""
        sizes: dict[tuple[int, str], int] = {}
        for piece in self.streamed:
            sizes[piece.sublayer] = sizes.get(piece.sublayer, 0) + window(piece.nbytes)
        return max(sizes.values(), default=0) <= self.ring_bytes

    def streams(self, groups: int) -> int:
        """How often a pass over so many groups of rows reads what is streamed."""
        return 1 if self.holds_sublayers else groups


def plan_memory(
    sizes: ModelSizes, demand: Demand, budget_bytes: int | None, covers: str = "process", device_bytes: int | None = None
) -> MemoryPlan:
    """The plan that keeps the most within `budget_bytes` (None: everything); raises `BudgetError` where the demand does not fit.

    Args:
        device_bytes: what may be taken of a device's own memory, beside which `budget_bytes` counts the host's; None: one memory for all.
    """
    if covers not in COVERS:
        raise CatsError(f"a budget covers {' or '.join(COVERS)}, not {covers!r}.")
    if device_bytes is not None:
        return plan_two_memories(sizes, demand, budget_bytes, covers, device_bytes)
    fixed = fixed_charges(sizes, demand, covers)
    used = [piece for piece in sizes.pieces if demand.keeps(piece) or EXACT.needs(piece)]
    limit = float("inf") if budget_bytes is None else budget_bytes
    for whole in (used, without_spared(used, used)):
        total = resident_bytes(whole, covers)
        if demand.pinning and sum(nbytes for _, nbytes in fixed) + total <= limit:
            return MemoryPlan(demand, budget_bytes, covers, frozenset(whole), (), 0, 0, (*fixed, (ALL, total)), sizes)
    kept = [piece for piece in used if demand.keeps(piece)]
    front = without_spared(kept, kept)
    behind = [piece for piece in used if not demand.keeps(piece)]
    ring = ring_bytes(behind, demand)
    needed = [*fixed, (front_name(demand), resident_bytes(front, covers)), ("ring", arena(ring, covers))]
    left = limit - sum(nbytes for _, nbytes in needed)
    if left < 0:
        raise BudgetError(refusal(sizes, demand, int(limit), covers, needed))
    gains = {piece: sum(charged_bytes(other.resident_bytes, covers) for other in spared_by(piece, front)) for piece in behind}
    unit = arena(1, covers)
    slack = unit if unit > 1 and any(gains.values()) else 0  # bytes that move from one rounded sum to another
    room = max(0, int(left) // unit * unit - slack) if demand.pinning else 0
    extra = spread([(piece, charged_bytes(piece.resident_bytes, covers) - gains[piece]) for piece in behind], room)
    front = without_spared(front, extra)
    needed[-2] = (front_name(demand), resident_bytes(front, covers))
    streamed = tuple(piece for piece in behind if piece not in extra)
    charges = tuple((name, nbytes) for name, nbytes in (*needed, (BEHIND, resident_bytes(extra, covers))) if nbytes)
    streamed_bytes = sum(piece.nbytes for piece in streamed)
    return MemoryPlan(demand, budget_bytes, covers, frozenset(front) | extra, streamed, ring, streamed_bytes, charges, sizes)


def plan_two_memories(sizes: ModelSizes, demand: Demand, budget_bytes: int | None, covers: str, device_bytes: int) -> MemoryPlan:
    """Host and device as two accounts: what computing needs is on the device, and as many pieces as it holds.

    The others are copied there in every pass: from host memory what that holds, through the ring what it does not.
    """
    used = [piece for piece in sizes.pieces if demand.keeps(piece) or EXACT.needs(piece)]
    front, behind = [piece for piece in used if demand.keeps(piece)], [piece for piece in used if not demand.keeps(piece)]
    fixed = fixed_charges(sizes, demand, "process")
    host = [(name, nbytes) for name, nbytes in fixed if name == LIBRARIES and covers == "process"]
    needed = [(name, nbytes) for name, nbytes in fixed if name != LIBRARIES]
    needed.append((front_name(demand), sum(piece.resident_bytes for piece in front)))
    if demand.pinning and sum(nbytes for _, nbytes in needed) + sum(piece.resident_bytes for piece in behind) <= device_bytes:
        everything = (*needed[:-1], (ALL, sum(piece.resident_bytes for piece in used)))
        return MemoryPlan(demand, budget_bytes, covers, frozenset(used), (), 0, 0, tuple(host), sizes, frozenset(), everything)
    needed.append(("staging", STAGING_PLACES * max(piece.nbytes for piece in behind)))
    left = device_bytes - sum(nbytes for _, nbytes in needed)
    if left < 0:
        raise BudgetError(refusal(sizes, demand, device_bytes, covers, needed, "the device's memory needs"))
    extra = spread([(piece, piece.resident_bytes) for piece in behind], left if demand.pinning else 0)
    others = [piece for piece in behind if piece not in extra]
    limit = (float("inf") if budget_bytes is None else budget_bytes) - sum(nbytes for _, nbytes in host)
    ring, hosted = 0, frozenset(others)
    if not demand.pinning or sum(charged_bytes(piece.nbytes, covers) for piece in others) > limit:
        ring = ring_bytes(others, demand)
        if arena(ring, covers) > limit:
            raise BudgetError(refusal(sizes, demand, budget_bytes or 0, covers, [*host, ("ring", arena(ring, covers))]))
        room = int(limit) - arena(ring, covers) if demand.pinning else 0
        hosted = spread([(piece, charged_bytes(piece.nbytes, covers)) for piece in others], room)
    streamed = tuple(piece for piece in others if piece not in hosted)
    charges = (*host, (HOSTED, sum(charged_bytes(piece.nbytes, covers) for piece in hosted)), ("ring", arena(ring, covers)))
    device = (*needed, (BEHIND, sum(piece.resident_bytes for piece in extra)))
    moved = sum(piece.nbytes for piece in streamed)
    return MemoryPlan(demand, budget_bytes, covers, frozenset(front) | extra, streamed, ring, moved, charges, sizes, hosted, device)


def without_spared(pieces: Iterable[Piece], resident: Iterable[Piece]) -> list[Piece]:
    """The pieces but those that resident ones of the same matrix stand for."""
    served: dict[tuple[int, str], frozenset[str]] = {}
    for piece in resident:
        place = piece.layer, piece.matrix
        served[place] = served.get(place, frozenset()) | piece.stands_for
    return [piece for piece in pieces if not piece.precisions <= served.get((piece.layer, piece.matrix), frozenset())]


def spared_by(piece: Piece, pieces: Iterable[Piece]) -> list[Piece]:
    """Those that it stands for where it is resident."""
    if not piece.stands_for:
        return []
    place = piece.layer, piece.matrix
    return [other for other in pieces if (other.layer, other.matrix) == place and other.precisions <= piece.stands_for]


def front_name(demand: Demand) -> str:
    """What the ledger calls the pieces that drafting needs."""
    if not demand.front and not demand.views:
        return ALWAYS
    return f"layers [0, {demand.front})" + (" and draft views" if demand.views else "")


def resident_bytes(pieces: Iterable[Piece], covers: str) -> int:
    """What these pieces are charged while they are resident."""
    return arena(sum(charged_bytes(piece.resident_bytes, covers) for piece in pieces), covers)


def fixed_charges(sizes: ModelSizes, demand: Demand, covers: str) -> list[tuple[str, int]]:
    """What every plan holds, whatever is streamed."""
    weights = [
        ("lm_head", charged_bytes(sizes.lm_head_bytes, covers)),
        ("embedding table", charged_bytes(sizes.table_bytes, covers) if demand.table else 0),
        ("norms and biases", (sizes.layers + 1) * sizes.other_layer_bytes),
        ("adapters", demand.adapters * sizes.adapter_bytes),
        (BY_METHODS, demand.method_bytes),
    ]
    working = [
        (LIBRARIES, demand.interpreter_bytes),
        ("work space", sizes.work_bytes),
        ("rotary tables", rotary_bytes(sizes, demand)),
        ("KV caches", kv_bytes(sizes, demand)),
        ("activations", activation_bytes(sizes, demand)),
    ]
    return [(name, nbytes) for name, nbytes in weights + (working if covers == "process" else []) if nbytes]


def kv_bytes(sizes: ModelSizes, demand: Demand) -> int:
    """Keys and values of the base's layers and of every adapter, for all positions and nodes."""
    slots = demand.positions + demand.nodes
    return 2 * sizes.kv_width * slots * demand.compute_itemsize * (sizes.layers + demand.adapters)


def rotary_bytes(sizes: ModelSizes, demand: Demand) -> int:
    """Cosines and sines of every position, for the base and for every adapter, and what making one table takes in float32."""
    return sizes.rotary_numbers * (2 * demand.compute_itemsize * (1 + demand.adapters) + 5 * 4)


def activation_bytes(sizes: ModelSizes, demand: Demand) -> int:
    """What passes hold beside weights and caches, at most: reading the prompt in groups of rows, or a step over all nodes.

    A group holds states and queries (up to ten widths), three intermediates of the MLP, and a mask over the cache, made from a truth
    value per entry; grouped heads repeat the keys and values of the whole cache. Of a prompt all states stay, while they are embedded
    twice. A step holds the logits of its nodes, thrice, and what sampling takes; reading the prompt those of one row.
    """
    itemsize, slots = demand.compute_itemsize, demand.positions + demand.nodes
    per_row = itemsize * (10 * sizes.hidden + 3 * sizes.intermediate + slots) + slots
    repeated = 2 * slots * sizes.hidden * itemsize if sizes.kv_width < sizes.hidden else 0
    per_logits = sizes.vocab * (3 * itemsize + SAMPLING_BYTES)
    prompt = 2 * demand.positions * sizes.hidden * itemsize + min(PREFILL_ROWS, demand.positions) * per_row + per_logits
    step = demand.nodes * (per_row + per_logits + (1 + demand.adapters) * sizes.hidden * itemsize)
    return repeated + max(prompt, step)


def ring_bytes(pieces: Iterable[Piece], demand: Demand) -> int:
    """Bytes of the ring: so many of the windows of the matrix that takes most of it."""
    sizes: dict[tuple[int, str], int] = {}
    for piece in pieces:
        sizes[piece.layer, piece.matrix] = sizes.get((piece.layer, piece.matrix), 0) + window(piece.nbytes)
    return demand.ring_buffers * max(sizes.values(), default=0)


def window(nbytes: int) -> int:
    """Bytes of the page-aligned stretch of a file around a tensor that may begin anywhere in a page."""
    return -(-nbytes // PAGE) * PAGE + PAGE


def charged_bytes(nbytes: int, covers: str) -> int:
    """What a resident tensor is charged: its window in memory, or (budget of weights) its own bytes."""
    return window(nbytes) if covers == "process" and nbytes else nbytes


def arena(nbytes: int, covers: str) -> int:
    """What a preallocated block is charged: whole huge pages, or (budget of weights) its own bytes."""
    return -(-nbytes // HUGE_PAGE) * HUGE_PAGE if covers == "process" else nbytes


def spread(pieces: list[tuple[Piece, int]], room: int) -> frozenset[Piece]:
    """Choose pieces of at most `room` bytes in all, evenly along the list; then fill what is left with whatever fits."""
    total = sum(nbytes for _, nbytes in pieces)
    chosen: set[Piece] = set()
    quota = left = min(room, total)
    share, credit = (quota / total if total else 0.0), 0.0
    for piece, nbytes in pieces:
        credit += nbytes * share
        if credit >= nbytes / 2 and nbytes <= left:
            chosen.add(piece)
            credit -= nbytes
            left -= nbytes
    for piece, nbytes in sorted(pieces, key=lambda entry: -entry[1]):
        if piece not in chosen and nbytes <= left:
            chosen.add(piece)
            left -= nbytes
    return frozenset(chosen)


def refusal(
    sizes: ModelSizes, demand: Demand, budget_bytes: int, covers: str, needed: list[tuple[str, int]], what: str | None = None
) -> str:
    """The sentence of a budget that is too small."""
    parts = ", ".join(f"{name} {amount(nbytes)}" for name, nbytes in sorted(needed, key=lambda entry: -entry[1]) if nbytes)
    what = what or ("the whole process needs" if covers == "process" else "the weights need")
    needs = amount(sum(nbytes for _, nbytes in needed)) + (f" with layers [0, {demand.front}) resident" if demand.front else "")
    advice = "raise --memory-budget"
    if demand.front:
        advice += f", or use an earlier exit (each layer holds {amount(sizes.layer_bytes)})"
    if len(demand.views) > 1:
        advice += f", or draft with fewer views ({', '.join(view_needs(sizes, demand, covers))})"
    if demand.ring_buffers > 1:
        advice += ", or lower --ring-buffers"
    if covers == "process" and demand.positions > PREFILL_ROWS:
        advice += ", or lower --budget-positions"
    return f"{what} at least {needs}; the budget is {amount(budget_bytes)} ({parts}); {advice}."


def view_needs(sizes: ModelSizes, demand: Demand, covers: str) -> list[str]:
    """What each of the demand's views alone would take in all, those that take the least first."""
    totals = []
    for view in demand.views:
        alone = replace(demand, views=(view,))
        used = [piece for piece in sizes.pieces if alone.keeps(piece) or EXACT.needs(piece)]
        kept = [piece for piece in used if alone.keeps(piece)]
        front = without_spared(kept, kept)
        ring = ring_bytes([piece for piece in used if not alone.keeps(piece)], alone)
        fixed = sum(nbytes for _, nbytes in fixed_charges(sizes, alone, covers))
        totals.append((fixed + resident_bytes(front, covers) + arena(ring, covers), view.label))
    return [f"{label}: {amount(nbytes)}" for nbytes, label in sorted(totals)]


def amount(nbytes: int) -> str:
    """Bytes as a reader wants them: GB (1e9), or smaller units where that says more."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3f}".removesuffix(".000") + f" {unit}"
    return f"{nbytes} bytes"


def parse_amount(text: str, what: str) -> int:
    """Bytes of "8GB", "1.5 GB", "500MB", "2GiB", "4096"; raises `CatsError` naming `what`."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    cleaned = text.strip().upper().removesuffix("/S").strip()
    digits = cleaned.rstrip("KMGIB ")
    unit = cleaned[len(digits) :].strip()
    try:
        value = float(digits) * units[unit]
    except (ValueError, KeyError) as error:
        raise CatsError(f"{what} {text!r} is no amount of bytes; write it like 8GB, 500MB or 2GiB.") from error
    if not 0 < value < 2**60:
        raise CatsError(f"{what} {text!r} must be above 0 and no more than an exabyte.")
    return round(value)
