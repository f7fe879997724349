"""Views of a model that leave out a share of its attentions and MLPs: which ones, from a file of layer sets or by turns.

The sets of several shares nest: what a sparser view runs lies inside what a denser one runs. So it can draft on behind what that one has
computed (`View.follows`), and in a memory plan it adds nothing. The first and the last layer are always run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cats.errors import CatsError
from cats.planning.plan import View

SHIPPED = Path(__file__).resolve().parent.parent.parent / "data" / "smollm2-135m" / "layer_sets.json"
"""Of the default model; an installation from a wheel has none."""
SPREAD = 0.6180339887498949
"""Multiples of the golden ratio fill an interval evenly, wherever they stop."""
NEAR_ENDS = 2
"""Layers from the first or the last one, which models can spare least."""
Sublayer = tuple[int, str]
"""A layer and "attention" or "mlp"."""


def skippable(layers: int) -> list[Sublayer]:
    """The sublayers that a view may leave out: all but those of the first and the last layer."""
    return [(layer, part) for layer in range(1, layers - 1) for part in ("attention", "mlp")]


def skipped_count(sparsity: float, layers: int) -> int:
    """How many sublayers a view of this sparsity leaves out."""
    return min(round(sparsity * 2 * layers), len(skippable(layers)))


def by_turns(layers: int) -> list[Sublayer]:
    """The skippable sublayers in the order in which they go where nobody has searched: every other layer's first, spread evenly, those near
    the ends last."""

    def place(sublayer: Sublayer) -> tuple[bool, bool, bool, float]:
        layer, part = sublayer
        return min(layer, layers - 1 - layer) <= NEAR_ENDS, layer % 2 == 0, part == "mlp", layer // 2 * SPREAD % 1

    return sorted(skippable(layers), key=place)


def view_without(skipped: Sequence[Sublayer]) -> View:
    """The exact weights without these sublayers."""
    attention, mlp = (frozenset(layer for layer, part in skipped if part == which) for which in ("attention", "mlp"))
    return View(attention=attention, mlp=mlp)


@dataclass(frozen=True)
class Sparse(View):
    """The exact weights without a share of the sublayers; which ones follows from the model, which need not be loaded yet.

    Attributes:
        sparsity: share of all sublayers that it leaves out.
        sets: a file of layer sets (training/search_layer_sets.py); None: the default model's own, for any other model sublayers by turns.
    """

    sparsity: float = 0.0
    sets: Path | None = None

    @property
    def label(self) -> str:
        """See `View`."""
        return f"weights without {self.sparsity:.0%} of the sublayers"

    def in_model(self, layers: int, width: int) -> View:
        """See `View`; a file that is damaged, of another model or without this sparsity raises `CatsError`."""
        if self.sets is None and (not SHIPPED.is_file() or not fits(read_sets(SHIPPED), layers, width)):
            return view_without(by_turns(layers)[: skipped_count(self.sparsity, layers)])
        path = self.sets or SHIPPED
        content = read_sets(path)
        if not fits(content, layers, width):
            has = f"{content['layers']} layers of width {content['hidden_size']}"
            raise CatsError(f"the layer sets in {path} are of a model with {has}, this one has {layers} of {width}; search its own.")
        chosen = content["sets"].get(f"{self.sparsity:g}")
        if chosen is None:
            known = ", ".join(content["sets"])
            raise CatsError(f"{path} has layer sets of sparsity {known}, none of {self.sparsity:g}; search it, or leave --layer-sets out.")
        return view_of(chosen)


def fits(content: Mapping[str, Any], layers: int, width: int) -> bool:
    """Whether layer sets are of a model of this shape."""
    return (content["layers"], content["hidden_size"]) == (layers, width)


def read_sets(path: Path) -> dict[str, Any]:
    """A file of layer sets, checked; raises `CatsError`."""
    advice = "search it again by python -m training.search_layer_sets."
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sets = [(float(share), view_of(one), content["layers"]) for share, one in content["sets"].items()]
        int(content["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CatsError(f"cannot read layer sets from {path}: {error!r}; {advice}") from error
    before = View()
    for share, view, layers in sorted(sets, key=lambda entry: entry[0]):
        inner = set(range(1, layers - 1))
        if not view.attention | view.mlp <= inner:
            raise CatsError(f"the layer set of sparsity {share:g} in {path} leaves out a first, last or missing layer; {advice}")
        if not (before.attention <= view.attention and before.mlp <= view.mlp):
            raise CatsError(f"the layer sets in {path} do not nest: sparsity {share:g} runs what a lower one leaves out; {advice}")
        before = view
    return content


def view_of(chosen: Mapping[str, list[int]]) -> View:
    """The view of an entry of the file."""
    return View(attention=frozenset(map(int, chosen["attention"])), mlp=frozenset(map(int, chosen["mlp"])))
