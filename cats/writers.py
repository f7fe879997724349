"""Who wrote each token of an answer: the part of a method that proposed it, or the whole model itself."""

from cats.config import MethodConfig
from cats.engine import Step
from cats.methods import needs_of
from cats.planning.plan import COARSE

WRITERS = {
    "draft": "proposed by the draft: an adapter, heads, or a view without some layers",
    "sibling": "another choice of the draft, beside the one it liked best",
    "correction": "put right by the shallow verifier",
    "lookup": "found earlier in the text, or in a datastore",
    "coarse": "proposed by the model's own coarse form",
    "target": "the whole model's own, after a pass",
}
"""Name -> what it means; every token but the target's own was proposed, and then accepted by the target."""


def writers_of(step: Step, method: MethodConfig) -> list[str]:
    """Names of `WRITERS`, one a token of the step."""
    needs = needs_of(method)
    drafter = "coarse" if COARSE in needs.views and not needs.adapters else "draft"
    proposed = [kind if kind in WRITERS else drafter for kind in step.trace.accepted_kinds]
    return [*proposed, "target"][: len(step.tokens)]
