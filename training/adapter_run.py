"""Settings of one adapter-training run, their contradictions, and the learning-rate schedule. Arithmetic only, no model."""

import math
from dataclasses import asdict, dataclass, fields

from cats.errors import CatsError

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "muon")
INITS = ("fitted", "fitted-prior", "fresh", "base", "base-fitted")
# Settings that may change between a killed run and its continuation, because they do not decide the updates.
FREE = ("hours", "save_minutes", "validation_rows", "report_steps", "drafts")


@dataclass(frozen=True)
class AdapterRun:
    """Everything that decides the weights a run ends with, given model and data.

    Attributes:
        exits: exit layers, one adapter each.
        rows: rows of one process in one forward; one optimizer step takes rows * accumulate * processes rows.
        length: tokens of a row at most.
        topk: target tokens in the loss; 0 is the whole vocabulary (full KL).
        samples: tokens drawn for the loss's normaliser beside all target tokens of the batch; 0 sums over the whole vocabulary.
        epochs, steps, hours: the run ends at whichever comes first; 0 means no bound. Steps are optimizer steps.
        warmup: optimizer steps of linear warm-up.
        report_steps: optimizer steps between two validations, the first before any step; 0 validates after each epoch and at the end.
        clip: largest gradient norm of one adapter; 0 switches clipping off.
    """

    exits: tuple[int, ...]
    rows: int = 16
    length: int = 256
    accumulate: int = 1
    topk: int = 20
    epochs: int = 0
    steps: int = 0
    hours: float = 0.0
    optimizer: str = "adamw"
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.0
    warmup: int = 20
    schedule: str = "linear"
    clip: float = 1.0
    precision: str = "fp32"
    init: str = "fitted"
    samples: int = 2048
    packed: bool = True
    every_token: bool = False
    seed: int = 0
    drafts: int = 5
    validation_rows: int = 64
    report_steps: int = 0
    save_minutes: float = 3.0

    def __post_init__(self) -> None:
        if not self.exits or len(set(self.exits)) != len(self.exits) or min(self.exits) < 1:
            raise CatsError(f"exit layers {list(self.exits)} must be distinct and at least 1; give for example --exit-layers 3 15.")
        for name in ("rows", "accumulate", "drafts", "validation_rows"):
            if getattr(self, name) < 1:
                raise CatsError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if self.length < 2:
            raise CatsError(f"--length must be at least 2, not {self.length}: the first token of a row is never predicted.")
        for name in ("topk", "samples", "epochs", "steps", "report_steps", "hours", "warmup", "clip", "lr", "muon_lr", "weight_decay"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise CatsError(f"--{name.replace('_', '-')} must be a number of at least 0, not {getattr(self, name)}.")
        if not (self.epochs or self.steps or self.hours):
            raise CatsError("the run has no end; give --epochs, --steps or --hours.")
        for name, known in (("precision", PRECISIONS), ("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise CatsError(f"--{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")

    @property
    def read_exits(self) -> tuple[int, ...]:
        """Exits whose states are read."""
        return self.exits

    def last_step(self, steps_per_epoch: int) -> float:
        """Optimizer steps after which the run ends; infinity where only hours bound it."""
        bounds = [self.epochs * steps_per_epoch, self.steps]
        return min((bound for bound in bounds if bound), default=math.inf)

    def reports_after(self, step: int, steps_per_epoch: int) -> bool:
        """Whether adapters are validated after optimizer step `step`, were it not the last."""
        return step % steps_per_epoch == 0 or bool(self.report_steps and step % self.report_steps == 0)

    def progress(self, step: int, seconds: float, steps_per_epoch: int) -> float:
        """0 at the start, 1 at the end: by steps or by hours, whichever is further."""
        by_hours = seconds / 3600 / self.hours if self.hours else 0.0
        return min(1.0, max(step / self.last_step(steps_per_epoch), by_hours))

    def lr_scale(self, step: int, progress: float) -> float:
        """Factor on the peak learning rate at optimizer step `step`: linear warm-up times the decay by progress."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "linear":
            return warm * (1.0 - progress)
        if self.schedule == "cosine":
            return warm * 0.5 * (1.0 + math.cos(math.pi * progress))
        return warm

    def differences(self, other: dict) -> list[str]:
        """Names of the settings in which a stored run (`asdict`) differs from this one, those without influence left out."""
        mine = asdict(self) | {"exits": list(self.exits)}
        return [field.name for field in fields(self) if field.name not in FREE and mine[field.name] != other.get(field.name)]
