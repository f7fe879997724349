"""The training loop: several parts (adapters, or Medusa's heads) at once on the same batches, resumable, over any number of processes.

Losses are summed over positions and divided once, by the positions of the whole optimizer step (all micro-batches, all
processes), so accumulation and processes change nothing but the order of sums. Training two parts together gives the
weights that training each alone would give.
"""

import math
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from training.adapter_run import AdapterRun
from training.adapter_update import AdapterUpdate
from training.dataset import Batch, RowSource, batch_order, row_order

VALIDATED_AT_ONCE = 4  # rows whose logits over the whole vocabulary are in memory together


class Trainer(ABC):
    """One run over a `RowSource`.

    Args:
        parts: number (the exit layer of an adapter) -> float32 module, on the accelerator's device.
        validation: rows for the reports.
        outdir: holds `checkpoint.pt`; an existing one is continued when it belongs to the same settings and data.
        data: what identifies the data (a hash), compared on resuming.
    """

    unit: ClassVar[str]
    """What a part is called beside its number."""

    def __init__(
        self,
        run: AdapterRun,
        parts: Mapping[int, nn.Module],
        source: RowSource,
        validation: RowSource,
        accelerator: Accelerator,
        outdir: Path,
        data: str = "",
    ):
        self.run, self.parts, self.source, self.validation = run, parts, source, validation
        self.accelerator, self.path = accelerator, outdir / "checkpoint.pt"
        self.updates = {number: AdapterUpdate(part, run, accelerator, f"{self.unit} {number}") for number, part in parts.items()}
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.rows_per_step = run.rows * run.accumulate * accelerator.num_processes
        self.steps_per_epoch = -(-len(source) // self.rows_per_step)
        self.identity = {"rows_per_step": self.rows_per_step, "source_rows": len(source), "data": data, "block": self.kind}
        if self.path.exists():
            self.load()

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the parts are made of; a checkpoint of another kind is refused."""

    @abstractmethod
    def backward(self, rows: np.ndarray, sums: dict[int, torch.Tensor]) -> int:
        """Add the gradients of the summed loss of one micro-batch, part by part (so memory does not grow with them).

        Args:
            sums: part -> where its loss is added.

        Returns:
            positions that counted.
        """

    @abstractmethod
    def figures(self, batches: Iterable[Batch]) -> dict[int, dict[str, float]]:
        """What a report says of every part, measured over the given batches."""

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        return self.run.progress(self.step, self.seconds, self.steps_per_epoch)

    def train(
        self,
        on_step: Callable[[dict[str, Any]], None] = lambda entry: None,
        on_report: Callable[[dict[str, Any]], None] = lambda report: None,
        stop_epoch: int = 0,
    ) -> None:
        """Train to the end of the run, or of epoch `stop_epoch` where one is given.

        After each epoch, each `run.report_steps` and at the end, a report is made and a checkpoint written. The main process
        gets every step's entry and every report.
        """
        main, saved_at = self.accelerator.is_main_process, time.monotonic()
        last = min(self.run.last_step(self.steps_per_epoch), stop_epoch * self.steps_per_epoch or math.inf)
        total = None if last == math.inf else int(last)
        if self.step == 0 and self.run.report_steps:
            self.report(on_report)
        with live_bar(total=total, initial=self.step, unit="step", mininterval=5, disable=not main) as bar:
            while self.progress < 1.0 and self.step < last:
                entry = self.optimizer_step()
                bar.update()
                losses = {f"{self.unit}{number}": f"{value:.3f}" for number, value in entry["loss"].items()}
                bar.set_postfix(losses | {"progress": f"{self.progress:.2f}"}, refresh=False)
                if main:
                    on_step(entry)
                due = self.run.reports_after(self.step, self.steps_per_epoch) or self.progress >= 1.0
                if due:
                    self.report(on_report)
                if self.agreed(due or time.monotonic() - saved_at > 60 * self.run.save_minutes):
                    self.save()
                    saved_at = time.monotonic()

    def optimizer_step(self) -> dict[str, Any]:
        """One update of every part from the next rows; returns (and logs) what it did.

        That is the step, the learning rate, mean losses, gradient norms, and how many tokens were seen and how many of them counted.
        """
        started, scale = time.monotonic(), self.run.lr_scale(self.step, self.progress)
        sums = {number: torch.zeros((), device=self.accelerator.device) for number in self.parts}
        mine = list(self.micro_batches())
        seen = [sum(self.backward(rows, sums) for rows in mine), sum(int(self.source.lengths[rows].sum()) for rows in mine)]
        totals = self.across_processes([*seen, *(float(value) for value in sums.values())])
        norms = {str(number): update.step(totals[0], scale) for number, update in self.updates.items()}
        self.step += 1
        self.seconds += self.across_processes([time.monotonic() - started])[0] / self.accelerator.num_processes
        losses = {str(number): total / max(1.0, totals[0]) for number, total in zip(sums, totals[2:], strict=True)}
        seen_by_all = {"positions": int(totals[0]), "tokens": int(totals[1])}
        self.log.append({"step": self.step, "lr": scale * self.run.lr, "loss": losses, "gradient_norm": norms} | seen_by_all)
        return self.log[-1]

    def micro_batches(self) -> Iterator[np.ndarray]:
        """This process's rows of the current optimizer step, `run.rows` at a time."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = batch_order(self.source.lengths, self.rows_per_step, epoch, self.run.seed)
        rows = order[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        for start in range(0, len(mine), self.run.rows):
            yield mine[start : start + self.run.rows]

    def across_processes(self, values: list[float]) -> list[float]:
        """Sums of the given numbers over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()

    def agreed(self, mine: bool) -> bool:
        """The same answer on every process: true where any process says so."""
        return self.across_processes([float(mine)])[0] > 0

    def report(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        """Validation figures of every part (see `figures`), measured by every process alike, reported by the main one."""
        count = min(len(self.validation), self.run.validation_rows)
        chosen = row_order(len(self.validation), 0, self.run.seed)[:count]
        size, shown = min(self.run.rows, VALIDATED_AT_ONCE), self.accelerator.is_main_process
        starts = live_bar(range(0, count, size), desc="validate", unit="batch", leave=False, disable=not shown)
        batches = (self.validation.batch(chosen[start : start + size]) for start in starts)
        by_part = {str(number): values for number, values in self.figures(batches).items()}
        epoch, hours = self.step / self.steps_per_epoch, self.seconds / 3600
        seen = {name: sum(entry[name] for entry in self.log) for name in ("positions", "tokens")}
        self.reports.append({"step": self.step, "epoch": epoch, "hours": hours} | seen | {"validation": by_part})
        if self.accelerator.is_main_process:
            on_report(self.reports[-1])

    def save(self) -> None:
        """Write everything that the next update depends on, atomically, from the main process."""
        if self.accelerator.is_main_process:
            state = {
                "run": asdict(self.run) | {"exits": list(self.run.exits)},
                "identity": self.identity,
                "updates": {number: update.state() for number, update in self.updates.items()},
                "counters": {"step": self.step, "seconds": self.seconds, "log": self.log, "reports": self.reports},
            }
            write_atomically(self.path, lambda part: torch.save(state, part))
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Continue from `checkpoint.pt`; other settings, other data or a damaged file raise `CatsError`."""
        try:
            state = torch.load(self.path, map_location=self.accelerator.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CatsError(f"the checkpoint {self.path} is damaged; delete it to start again, or use another --outdir.") from error
        different = self.run.differences(state["run"])
        different += [name for name, value in self.identity.items() if state["identity"].get(name) != value]
        if different:
            raise CatsError(f"{self.path} belongs to a run with another {', '.join(different)}; use the same settings or another --outdir.")
        for number, update in self.updates.items():
            update.load(state["updates"][number])
        counters = state["counters"]
        self.step, self.seconds = counters["step"], counters["seconds"]
        self.log, self.reports = counters["log"], counters["reports"]
