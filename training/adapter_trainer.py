"""The training loop: several adapters at once on the same batches, resumable, over any number of processes.

Losses are summed over positions and divided once, by the positions of the whole optimizer step (all micro-batches, all
processes), so accumulation and processes change nothing but the order of sums. Training two exits together gives the
weights that training each alone would give.
"""

import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cats.adapter import AdapterModel
from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from training.adapter_run import AdapterRun
from training.adapter_update import AdapterUpdate
from training.agreement import measure
from training.dataset import RowSource, batch_order, row_order
from training.objective import Objective


class AdapterTrainer:
    """One run over a `RowSource`.

    Args:
        adapters: exit layer -> float32 adapter, on the accelerator's device.
        validation: rows for the report after each epoch and at the end.
        outdir: holds `checkpoint.pt`; an existing one is continued when it belongs to the same settings and data.
        data: what identifies the data (a hash), compared on resuming.
    """

    def __init__(
        self,
        run: AdapterRun,
        adapters: dict[int, AdapterModel],
        objective: Objective,
        source: RowSource,
        validation: RowSource,
        accelerator: Accelerator,
        outdir: Path,
        data: str = "",
    ):
        self.run, self.adapters, self.objective, self.source, self.validation = run, adapters, objective, source, validation
        self.accelerator, self.path = accelerator, outdir / "checkpoint.pt"
        self.updates = {exit_layer: AdapterUpdate(adapter, run, accelerator) for exit_layer, adapter in adapters.items()}
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, Any]] = []
        self.reports: list[dict[str, Any]] = []
        self.rows_per_step = run.rows * run.accumulate * accelerator.num_processes
        self.steps_per_epoch = -(-len(source) // self.rows_per_step)
        self.identity = {"rows_per_step": self.rows_per_step, "source_rows": len(source), "data": data}
        if self.path.exists():
            self.load()

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

        After each epoch and at the end, a report is made and a checkpoint written. The main process gets every step's
        entry and every report.
        """
        main, saved_at = self.accelerator.is_main_process, time.monotonic()
        last = min(self.run.last_step(self.steps_per_epoch), stop_epoch * self.steps_per_epoch or math.inf)
        total = None if last == math.inf else int(last)
        with live_bar(total=total, initial=self.step, unit="step", mininterval=5, disable=not main) as bar:
            while self.progress < 1.0 and self.step < last:
                entry = self.optimizer_step()
                bar.update()
                losses = {f"exit{exit_layer}": f"{value:.3f}" for exit_layer, value in entry["loss"].items()}
                bar.set_postfix(losses | {"progress": f"{self.progress:.2f}"}, refresh=False)
                if main:
                    on_step(entry)
                ended = self.step % self.steps_per_epoch == 0 or self.progress >= 1.0
                if ended:
                    self.report(on_report)
                if self.agreed(ended or time.monotonic() - saved_at > 60 * self.run.save_minutes):
                    self.save()
                    saved_at = time.monotonic()

    def optimizer_step(self) -> dict[str, Any]:
        """One update of every adapter from the next rows; returns (and logs) step, learning rate, mean losses and gradient norms."""
        started, scale = time.monotonic(), self.run.lr_scale(self.step, self.progress)
        sums = {exit_layer: torch.zeros((), device=self.accelerator.device) for exit_layer in self.adapters}
        positions = sum(self.backward(rows, sums) for rows in self.micro_batches())
        totals = self.across_processes([positions, *(float(value) for value in sums.values())])
        norms = {str(exit_layer): update.step(totals[0], scale) for exit_layer, update in self.updates.items()}
        self.step += 1
        self.seconds += self.across_processes([time.monotonic() - started])[0] / self.accelerator.num_processes
        losses = {str(exit_layer): total / max(1.0, totals[0]) for exit_layer, total in zip(sums, totals[1:], strict=True)}
        self.log.append({"step": self.step, "lr": scale * self.run.lr, "loss": losses, "gradient_norm": norms})
        return self.log[-1]

    def micro_batches(self) -> Iterator[np.ndarray]:
        """This process's rows of the current optimizer step, `run.rows` at a time."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = batch_order(self.source.lengths, self.rows_per_step, epoch, self.run.seed)
        rows = order[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        for start in range(0, len(mine), self.run.rows):
            yield mine[start : start + self.run.rows]

    def backward(self, rows: np.ndarray, sums: dict[int, torch.Tensor]) -> int:
        """Add the gradients of the summed loss of one micro-batch, exit by exit (so memory does not grow with exits)."""
        batch = self.source.batch(rows)
        lesson = self.objective.learning_target(batch)
        for exit_layer, adapter in self.adapters.items():
            loss = self.objective.learning_loss(adapter, batch.hidden[exit_layer], lesson)
            loss.backward()
            sums[exit_layer] += loss.detach()
        return len(lesson.target.probabilities)

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
        """Validation figures of every adapter (see `Agreement.summary`), measured by every process alike, reported by the main one."""
        count = min(len(self.validation), self.run.validation_rows)
        chosen = row_order(len(self.validation), 0, self.run.seed)[:count]
        batches = (self.validation.batch(chosen[start : start + self.run.rows]) for start in range(0, count, self.run.rows))
        figures = measure(self.objective, self.adapters, batches, self.run.drafts)
        by_exit = {str(exit_layer): values for exit_layer, values in figures.items()}
        epoch, hours = self.step / self.steps_per_epoch, self.seconds / 3600
        self.reports.append({"step": self.step, "epoch": epoch, "hours": hours, "validation": by_exit})
        if self.accelerator.is_main_process:
            on_report(self.reports[-1])

    def save(self) -> None:
        """Write everything that the next update depends on, atomically, from the main process."""
        if self.accelerator.is_main_process:
            state = {
                "run": asdict(self.run) | {"exits": list(self.run.exits)},
                "identity": self.identity,
                "updates": {exit_layer: update.state() for exit_layer, update in self.updates.items()},
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
        different += [name for name, value in self.identity.items() if state["identity"][name] != value]
        if different:
            raise CatsError(f"{self.path} belongs to a run with another {', '.join(different)}; use the same settings or another --outdir.")
        for exit_layer, update in self.updates.items():
            update.load(state["updates"][exit_layer])
        counters = state["counters"]
        self.step, self.seconds = counters["step"], counters["seconds"]
        self.log, self.reports = counters["log"], counters["reports"]
