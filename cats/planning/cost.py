"""What a cycle costs in seconds, and a token in bytes.

A cycle is a front (drafting, shallow verification) and a target pass. The processor does them one after the other, while
one reader fills the ring. Three things bound a cycle of `S` streamed bytes at the flash's rate `F`:

    the processor    quiet + busy
    the reader       S / F
    the ring         quiet + (S - ahead) / F

`busy` is the part of the target pass between its first and its last streamed matrix. `quiet` is all else (front, head, matrices
pinned before the first and behind the last streamed one): nothing leaves the ring then, so the reader gets `ahead` by at most what
the ring holds. A cycle takes the longest of the three; what it takes beyond the processor is stream wait. Pinned matrices are spread
evenly over the pass (plan.py), so within `busy` reading and computing overlap. Against a simulation of the ring, matrix by matrix
(tests/test_planning.py), this is within 2 %, and within 5 % where stream and processor are exactly balanced. A ring of fewer than three
of the largest matrices overlaps only in part: the share of `SERIAL` is an average over such simulations, single cases lie up to 20 % off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cats.errors import CatsError
from cats.families import ATTENTION, GATED_MLP, family_of
from cats.planning.plan import MemoryPlan, ModelSizes, window
from cats.planning.profile import DeviceProfile, chain_nodes, held_between

SERIAL = ((1.0, 0.6), (2.0, 0.15), (3.0, 0.0))
"""(size of the ring in largest matrices, share of the lesser of reading and computing that is not hidden)."""


@dataclass(frozen=True)
class Work:
    """Processor seconds of one cycle with everything resident: `layers` is the target pass without its head."""

    draft: float
    shallow: float
    layers: float
    lm_head: float


@dataclass(frozen=True)
class CycleSeconds:
    """Predicted seconds of one cycle; `stream_wait` lies within `target`."""

    draft: float
    shallow: float
    target: float
    stream_wait: float

    @property
    def total(self) -> float:
        """Of the cycle."""
        return self.draft + self.shallow + self.target


def plain_work(sizes: ModelSizes, device: DeviceProfile) -> Work:
    """One token of plain decoding."""
    return Work(0.0, 0.0, sizes.layers * device.layer(1, sizes.layer_bytes), device.lm_head(1, sizes.lm_head_bytes))


def cascade_work(sizes: ModelSizes, device: DeviceProfile, exits: tuple[int, int], settings: Mapping[str, float]) -> Work:
    """One cycle of CATS (cats/methods/cascade.py).

    Args:
        exits: draft and shallow exit.
        settings: steps, tree_topk, total_tokens, branch_rounds, sv_passes as in `CascadeConfig`, none missing.
    """
    draft_exit, shallow_exit = exits
    steps, topk, rounds = int(settings["steps"]), int(settings["tree_topk"]), int(settings["sv_passes"])
    nodes = tree_nodes(settings)

    def layer(count: int) -> float:
        return device.layer(count, sizes.layer_bytes) if count else 0.0

    def exit_head(count: int) -> float:
        return layer(count) * sizes.adapter_bytes / sizes.layer_bytes + device.lm_head(count, sizes.lm_head_bytes)

    draft = rounds * steps * (draft_exit * layer(1) + exit_head(1))
    checks = rounds * (draft_exit * layer(1) + (shallow_exit - draft_exit) * layer(steps + 1) + exit_head(steps + 1))
    entering = max(nodes - rounds * (steps + 1), 0)
    continued = (int(settings["branch_rounds"]) - 1) * (draft_exit * layer(topk) + exit_head(topk)) + exit_head(topk) if topk > 1 else 0.0
    layers = (sizes.layers - shallow_exit) * layer(nodes)
    return Work(draft, checks + shallow_exit * layer(entering) + continued, layers, device.lm_head(nodes, sizes.lm_head_bytes))


def tree_nodes(settings: Mapping[str, float]) -> int:
    """Nodes that the target verifies, as far as the settings tell (corrections are estimated, see `chain_nodes`)."""
    steps, topk, rounds, given = (int(settings[name]) for name in ("steps", "tree_topk", "sv_passes", "total_tokens"))
    chain = rounds * chain_nodes(steps)
    corrections = chain - rounds * (steps + 1)
    return max(chain, given if given != -1 else rounds * steps * topk + 1 + corrections)


def node_slots(settings: Mapping[str, float]) -> int:
    """Nodes for which caches need room: the method's own bound (`Cascade.max_nodes`)."""
    steps, topk, rounds, given = (int(settings[name]) for name in ("steps", "tree_topk", "sv_passes", "total_tokens"))
    return rounds * 2 * (steps + 1) + max(given, rounds * steps * topk + 1)


def cycle_seconds(sizes: ModelSizes, plan: MemoryPlan, device: DeviceProfile, work: Work) -> CycleSeconds:
    """Seconds of a cycle under a memory plan, in the steady state (see the module)."""
    rate = device.flash_bytes_per_second
    inside = work.layers * busy_share(sizes, plan)
    computing = work.draft + work.shallow + work.layers + work.lm_head
    quiet = computing - inside
    bound = computing
    if plan.streamed:
        behind = (plan.streamed_bytes - min(read_ahead(sizes, plan), quiet * rate)) / rate
        serial = held_between(SERIAL, plan.ring_bytes / largest_window(sizes))
        bound = max(computing, quiet + max(inside, behind) + serial * min(inside, behind))
    wait = bound - computing
    return CycleSeconds(work.draft, work.shallow, work.layers + work.lm_head + wait, wait)


def busy_share(sizes: ModelSizes, plan: MemoryPlan) -> float:
    """Share of the target pass's arithmetic (in bytes of weights) between its first streamed matrix and its last, that one left out."""
    if not plan.streamed:
        return 0.0
    every = [piece for piece in sizes.pieces if piece.layer >= plan.demand.front]
    first, last = every.index(plan.streamed[0]), every.index(plan.streamed[-1])
    return sum(piece.nbytes for piece in every[first:last]) / sum(piece.nbytes for piece in every)


def read_ahead(sizes: ModelSizes, plan: MemoryPlan) -> int:
    """Bytes of the coming pass that the ring takes before the pass begins: the first streamed matrices, as many as fit whole.

    Half a matrix of the ring is counted as lost, for what is too small at the ring's end to hold the next one.
    """
    room, ahead = plan.ring_bytes, 0
    for piece in plan.streamed:
        room -= window(piece.nbytes)
        if room < 0:
            break
        ahead += piece.nbytes
    return max(min(ahead, plan.ring_bytes - largest_window(sizes) // 2), 0)


def largest_window(sizes: ModelSizes) -> int:
    """Bytes of the largest matrix's window."""
    return max(window(nbytes) for _, nbytes in sizes.matrices)


def paper_bytes_per_token(steps: int, draft_exit: int, layers: int, layer_bytes: float, accepted: float) -> float:
    """The paper's bytes per token, ((n - 1) d + L) layers by the accepted length (its table 5).

    It charges every drafting pass as if its layers were read again, whatever is resident, and leaves lm_head and adapters out.
    """
    return ((steps - 1) * draft_exit + layers) * layer_bytes / accepted


def streamed_bytes_per_token(plan: MemoryPlan, accepted: float) -> float:
    """Bytes really read from flash for a token."""
    return plan.streamed_bytes / accepted


def sizes_of(config: Mapping[str, Any], itemsize: int, device: DeviceProfile, layers: int | None = None) -> ModelSizes:
    """Sizes of a Llama-like model from its config.json alone, as `device` would hold it; its embedding table is read by rows.

    Args:
        itemsize: bytes of one stored number.
        layers: where the configuration is an adapter's (data/*_config.json), which has one layer.

    Raises:
        CatsError: it is no configuration of such a model.
    """
    wide = device.compute_itemsize
    try:
        hidden, inner, vocab, heads = (
            int(config[name]) for name in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
        )
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        count = int(config["num_hidden_layers"] if layers is None else layers)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CatsError(f"the configuration is not one of a Llama-like model ({error}); give its config.json.") from error
    if min(hidden, inner, vocab, heads, kv_heads, head_dim, count) < 1:
        raise CatsError("the configuration has a size below 1; give the config.json of a Llama-like model.")
    query_width, kv_width = heads * head_dim, kv_heads * head_dim
    family = family_of(config.get("model_type", "llama"), "the configuration")
    wide_of = dict(zip(ATTENTION + GATED_MLP, (query_width, kv_width, kv_width, query_width, inner, inner, inner), strict=True))
    matrices = tuple((name, hidden * wide_of[name] * itemsize) for name in family.matrices)
    inward = {"self_attn.o_proj": hidden, "mlp.down_proj": hidden}  # their products, and so their biases, are as wide as the states
    biases = sum(inward.get(name, wide_of[name]) for name in family.biased(config))
    head_norms = len(family.head_norms) * head_dim
    return ModelSizes(
        layers=count,
        hidden=hidden,
        intermediate=inner,
        vocab=vocab,
        kv_width=kv_width,
        matrices=matrices,
        other_layer_bytes=wide * (2 * hidden + biases + head_norms),
        lm_head_bytes=vocab * hidden * itemsize,
        adapter_bytes=sum(nbytes for _, nbytes in matrices[: len(ATTENTION)]) + 2 * hidden * wide,
        widen_bytes=device.widen_bytes,
        rotary_numbers=int(config.get("max_position_embeddings") or 0) * head_dim,
    )
