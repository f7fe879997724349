"""What one run is: frozen, checked once, here and nowhere else. Contradictions raise `CatsError` in plain words."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from cats.errors import CatsError
from cats.planning.plan import View

if TYPE_CHECKING:
    from cats.planning.cost import Passes, Work


COARSE_COPIES = ("int8",)
"""Coarse copies of plain weights, by name."""


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


@dataclass(frozen=True)
class MethodConfig:
    """Settings of one method, declared in the method's own file; see `cats.methods.base.Method`.

    A field's metadata hold its "help" and, where there are any, its limits: "lowest" and "highest", both allowed values.

    Attributes:
        name: of the method, which sets it.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise `CatsError` for a value beyond its limits; a class that checks more calls this first."""
        for item in fields(self):
            value = getattr(self, item.name)
            for one in value if isinstance(value, tuple) else () if value is None else (value,):
                check_limits(item.name.replace("_", "-"), one, item.metadata.get("lowest"), item.metadata.get("highest"))

    @property
    def draft_passes(self) -> int:
        """Passes through the layers below the draft exit in a cycle, at most."""
        return 0

    def label(self, exits: tuple[int, ...]) -> str:
        """The method and its settings in a few words; `exits` are those of its adapters, as far as they are known."""
        return self.name.replace("_", " ")

    def work(self, passes: "Passes", exits: tuple[int, ...], layers: int, nodes: float) -> "Work | None":
        """Processor seconds of a cycle that verifies `nodes` in a model of so many layers; None: the planner leaves the method out."""
        return None

    @property
    def priced(self) -> bool:
        """Whether `work` is known."""
        return type(self).work is not MethodConfig.work


def check_limits(setting: str, value: Any, lowest: Any, highest: Any) -> None:
    """Raise `CatsError` unless `value` lies within the limits, None being none."""
    if lowest is not None and highest is not None:
        require(lowest <= value <= highest, f"{setting} is {value}; it must lie between {lowest} and {highest}.")
    require(lowest is None or value >= lowest, f"{setting} is {value}; it must be at least {lowest}.")
    require(highest is None or value <= highest, f"{setting} is {value}; it must be at most {highest}.")


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
        method_bytes: of what the methods to be run keep resident with the model (`cats.methods.base.Needs`).
        coarse: a coarse copy of the layers' matrices that is made when they are loaded, and that `View(precision="coarse")` drafts with:
            "int8", eight bits a weight and one scale a row. None: none; nested checkpoints bring their own.
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
    method_bytes: int = 0
    coarse: str | None = None

    def __post_init__(self) -> None:
        require(self.coarse in (None, *COARSE_COPIES), f"coarse is {self.coarse!r}; it must be {' or '.join(COARSE_COPIES)}.")
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
