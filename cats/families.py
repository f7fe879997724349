"""The model families that the engine runs: one row each, with the properties that it relies on and why they hold.

A row describes a decoder layer of transformers' own (its matrices in the order of use, its small tensors) and what bounds the
positions at which plain causal attention is exact. What no row covers is refused in one sentence. How to add a row: docs/models.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cats.errors import CatsError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
"""Rope kinds whose angles within the context depend on the position alone, so that they can be looked up in a table."""
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What the engine relies on in the layers of one `model_type`.

    Attributes:
        why: what sets the family apart, and where that is dealt with.
        matrices: of a layer, in the order in which a pass uses them; weights are planned and streamed in this order.
        always_biased: matrices with a bias whatever the configuration says.
        bias_switches: field of the configuration -> the matrices that have a bias where it is true.
        head_norms: norms over the width of one head, which the block of an adapter does not have.
        window: which layers a `sliding_window` bounds: "none" (the field is not read), "all", or those that `layer_types` "names".
    """

    why: str
    matrices: tuple[str, ...] = ATTENTION + GATED_MLP
    always_biased: tuple[str, ...] = ()
    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    window: str = "none"

    def biased(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """The matrices of a layer that have a bias under this configuration, in the order of use."""
        switched = {matrix for name, matrices in self.bias_switches.items() if fields.get(name) for matrix in matrices}
        return tuple(matrix for matrix in self.matrices if matrix in self.always_biased or matrix in switched)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama 2 and 3, Vicuna, and what shares their layout: biases only on request; llama3 rope is one of the kinds of the table; "
        "the 1B and 3B models of Llama 3.2 tie head and embedding, which loading does for every family.",
        bias_switches={"attention_bias": ATTENTION, "mlp_bias": GATED_MLP},
    ),
    "mistral": Family(
        "No bias at all. A sliding window, where the configuration has one, holds in every layer.",
        window="all",
    ),
    "qwen2": Family(
        "Qwen 2 and 2.5: queries, keys and values always have a bias, the output never. Layers may slide, by `layer_types`.",
        always_biased=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        window="names",
    ),
    "qwen3": Family(
        "Queries and keys are normalised head by head before the rope; the head's width is a field of its own. Layers may slide.",
        bias_switches={"attention_bias": ATTENTION},
        head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        window="names",
    ),
}


def family_of(model_type: object, what: str) -> Family:
    """The row of a `model_type`; raises `CatsError` about the checkpoint `what` where there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CatsError(f"{what} is a checkpoint of type {model_type!r}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def check_rope(config: Any) -> None:
    """Raise `CatsError` where the rope of a configuration is of a kind that no table of positions can hold."""
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind == "longrope":
        raise CatsError("rope type 'longrope' depends on the length of the text and is not supported; use a checkpoint with fixed rope.")
    if kind not in ROPE_KINDS:
        raise CatsError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}.")


def check_layers(config: Any, what: str) -> None:
    """Raise `CatsError` where `layer_types` asks for attention that is neither full nor a sliding window of known size."""
    if family_of(config.model_type, what).window != "names":
        return
    kinds = config.layer_types
    strange = sorted(set(kinds) - {FULL, SLIDING})
    if strange:
        raise CatsError(f"{what} has layers of type {strange[0]!r}; supported are {FULL} and {SLIDING}.")
    if len(kinds) != config.num_hidden_layers:
        raise CatsError(
            f"{what} names the types of {len(kinds)} layers and has {config.num_hidden_layers}; mend layer_types in its config.json."
        )
    if SLIDING in kinds and config.sliding_window is None:
        raise CatsError(
            f"{what} has layers of type {SLIDING} and no window for them; set use_sliding_window and sliding_window in config.json, "
            f"or make every layer {FULL}."
        )


def usable_context(config: Any) -> int:
    """Positions in which plain causal attention is what the model was made for: the context, or a sliding window if shorter."""
    context: int = config.max_position_embeddings
    family = family_of(config.model_type, "the base model")
    slides = family.window == "all" or (family.window == "names" and SLIDING in config.layer_types)
    window = config.sliding_window if slides else None
    return context if window is None else min(context, window)
