"""What one run is: frozen, checked once, here and nowhere else. Contradictions raise `CatsError` in plain words."""

from dataclasses import dataclass, field
from typing import ClassVar

from cats.errors import CatsError
from cats.planning.plan import View


def require(condition: bool, sentence: str) -> None:
    """Raise `CatsError(sentence)` unless `condition` holds."""
    if not condition:
        raise CatsError(sentence)


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when an answer ends.

    Attributes:
        max_new_tokens: exact upper bound of the answer's length; an answer also ends at the end of the context.
        temperature: 0 is greedy decoding.
        top_p, top_k: truncation of the target's distribution for sampling; 1.0 and 0 switch it off.
        typical_tau, typical_alpha: both above 0 choose typical acceptance (relaxed; Medusa uses 0.09 and 0.3).
        seed: of the sampler.
        eos_token_ids: the answer ends after any of these; None: those of the model, () none.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    typical_tau: float = 0.0
    typical_alpha: float = 0.0
    seed: int = 0
    eos_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"max-new-tokens is {self.max_new_tokens}; it must be at least 1.")
        require(self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 (greedy) or above.")
        require(0 < self.top_p <= 1, f"top-p is {self.top_p}; it must be above 0 and at most 1.")
        require(self.top_k >= 0, f"top-k is {self.top_k}; it must be 0 (off) or above.")
        tau, alpha = self.typical_tau, self.typical_alpha
        require(0 <= tau <= 1 and alpha >= 0, f"typical-tau is {tau} and typical-alpha {alpha}; tau lies in [0, 1], alpha is not negative.")
        require(
            (tau == 0) == (alpha == 0),
            f"typical-tau is {tau} and typical-alpha {alpha}; set both above 0 for typical acceptance or both to 0 for lossless decoding.",
        )
        require(tau == 0 or self.temperature > 0, "typical acceptance looks at probabilities; give a temperature above 0 with typical-tau.")
        sampled = self.temperature > 0 and tau == 0
        require(
            sampled or (self.top_p == 1 and self.top_k == 0),
            "top-p and top-k shape sampling; give a temperature above 0 without typical acceptance, or leave them out.",
        )


STEPS = {"help": "tokens drafted in a round"}
THRESHOLD = {"help": "from the second step on, drafting stops when the best probability falls below this; 0 never stops"}
TREE_TOPK = {"help": "1 is a chain; above, candidates per drafted token"}
TOTAL_TOKENS = {"help": "nodes of the tree, root included; -1 sizes it to steps * tree-topk + 1"}


@dataclass(frozen=True)
class AutoregressiveConfig:
    """Plain decoding."""

    name: ClassVar[str] = "autoregressive"


@dataclass(frozen=True)
class CascadeConfig:
    """CATS (paper section 4.2).

    The trunk holds `steps` tokens a round. `tree_topk` of k adds the draft's k - 1 next best tokens as siblings, and k continuations of
    each correction; trunk and corrections enter whatever `total_tokens` says, and -1 gives each round steps * tree_topk + 1 nodes plus
    the corrections. Each of `branch_rounds` beyond the first continues the tree_topk best branches so far, siblings among them, which is
    not in the paper.
    """

    steps: int = field(default=5, metadata=STEPS)
    threshold: float = field(default=0.0, metadata=THRESHOLD)
    tree_topk: int = field(default=1, metadata=TREE_TOPK)
    total_tokens: int = field(default=-1, metadata=TOTAL_TOKENS)
    sv_passes: int = field(default=1, metadata={"help": "rounds of drafting and shallow verification before the target pass"})
    branch_rounds: int = field(
        default=1, metadata={"help": "rounds in which the draft continues branches of the tree; the paper's is 1, the corrections alone"}
    )
    name: ClassVar[str] = "cascade"

    def __post_init__(self) -> None:
        check_drafting(self.steps, self.threshold)
        check_tree(self.tree_topk, self.total_tokens)
        require(self.sv_passes >= 1, f"sv-passes is {self.sv_passes}; it must be at least 1.")
        require(self.branch_rounds >= 1, f"branch-rounds is {self.branch_rounds}; it must be at least 1.")
        require(
            self.tree_topk > 1 or self.branch_rounds == 1,
            f"branch-rounds {self.branch_rounds} has no branches to continue in a chain; use tree-topk above 1.",
        )


@dataclass(frozen=True)
class KangarooConfig:
    """Kangaroo: one adapter, a chain that ends where the draft loses confidence."""

    steps: int = field(default=6, metadata=STEPS)
    threshold: float = field(default=0.6, metadata=THRESHOLD)
    name: ClassVar[str] = "kangaroo"

    def __post_init__(self) -> None:
        check_drafting(self.steps, self.threshold)


@dataclass(frozen=True)
class EagleSelfConfig:
    """EAGLE's drafting over the early exit: a chain of `steps`, or (tree_topk above 1) EAGLE-2's dynamic tree of depth `steps`."""

    steps: int = field(default=5, metadata=STEPS)
    tree_topk: int = field(default=1, metadata=TREE_TOPK)
    total_tokens: int = field(default=-1, metadata=TOTAL_TOKENS)
    name: ClassVar[str] = "eagle_self"

    def __post_init__(self) -> None:
        check_drafting(self.steps, 0.0)
        check_tree(self.tree_topk, self.total_tokens)

    @property
    def node_budget(self) -> int:
        """Nodes of the tree, root included."""
        return self.steps * self.tree_topk + 1 if self.total_tokens == -1 else self.total_tokens


@dataclass(frozen=True)
class PromptLookupConfig:
    """Prompt lookup: the last n-gram of up to `max_ngram` tokens, found earlier in the text, continued by `continuation` tokens."""

    max_ngram: int = field(default=3, metadata={"help": "longest n-gram looked up in the text so far"})
    continuation: int = field(default=10, metadata={"help": "tokens taken from behind the match"})
    name: ClassVar[str] = "prompt_lookup"

    def __post_init__(self) -> None:
        require(self.max_ngram >= 1, f"max-ngram is {self.max_ngram}; it must be at least 1.")
        require(self.continuation >= 1, f"continuation is {self.continuation}; it must be at least 1.")


@dataclass(frozen=True)
class MemoryOptions:
    """How much memory a model may take, and how the rest is streamed.

    Attributes:
        budget_bytes: None sets no limit: everything is resident unless `pinning` is off.
        covers: "process" counts everything the process holds; "weights", the paper's way, leaves out interpreter, caches and activations.
        flash_bandwidth: bytes per second at which a slower flash is imitated; None reads as fast as it goes.
        pinning: False is the paper's way: beyond the layers that drafting needs, nothing stays in memory.
        ring_buffers: size of the ring that weights are streamed through, in largest matrices; None leaves it to the planner, else it is 3.
        positions: prompt and answer together, at most.
        nodes: nodes of a tree, root included, at most; a planned load grants what its method grows.
        views: other forms of the model that the method drafts with; what they multiply by is resident.
        device_bytes: what may be taken of a CUDA device's own memory; `budget_bytes` then counts the host's. None: one memory for all.
    """

    budget_bytes: int | None = None
    covers: str = "process"
    flash_bandwidth: float | None = None
    pinning: bool = True
    ring_buffers: int | None = None
    positions: int = 2048
    nodes: int = 1
    views: tuple[View, ...] = ()
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        require(self.covers in ("process", "weights"), f"budget-covers is {self.covers!r}; it must be process or weights.")
        require(self.ring >= 1, f"ring-buffers is {self.ring_buffers}; it must be at least 1.")
        require(self.positions >= 1, f"budget-positions is {self.positions}; it must be at least 1.")
        limited = self.budget_bytes is not None
        require(limited or self.covers == "process", "budget-covers says what a budget counts; give memory-budget with it.")
        require(
            limited or not self.pinning or self.flash_bandwidth is None,
            "flash-bandwidth slows the stream of weights, and without memory-budget or no-pinning nothing is streamed; give one of them.",
        )

    @property
    def ring(self) -> int:
        """Size of the ring in largest matrices."""
        return 3 if self.ring_buffers is None else self.ring_buffers


MethodConfig = AutoregressiveConfig | CascadeConfig | KangarooConfig | EagleSelfConfig | PromptLookupConfig


def check_drafting(steps: int, threshold: float) -> None:
    """Checks that every drafting method shares."""
    require(steps >= 1, f"steps is {steps}; it must be at least 1.")
    require(0 <= threshold < 1, f"threshold is {threshold}; it is a probability below 1.")


def check_tree(tree_topk: int, total_tokens: int) -> None:
    """Checks that every tree shares."""
    require(1 <= tree_topk <= 1000, f"tree-topk is {tree_topk}; it must lie between 1 and 1000.")
    require(total_tokens == -1 or total_tokens >= 2, f"total-tokens is {total_tokens}; it must be -1 (automatic) or at least 2.")
    require(
        tree_topk > 1 or total_tokens == -1,
        f"total-tokens {total_tokens} has nothing to choose from in a chain; use tree-topk above 1, or total-tokens -1.",
    )
