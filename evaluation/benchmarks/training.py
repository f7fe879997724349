"""What adapter training costs on a base model: tokens/s on the fly and from stored states, against the base's forward alone.

    python -m evaluation.benchmarks.training --data-path answers.json.gz --exit-layers 3 10 15 20 --output training_speed.json

Cases take turns on the same rows, after one untimed round: the forward of the base's layers (which bounds training on the
fly), optimizer steps on the fly with the sampled and with the full normaliser, and steps from stored states with the base's
best tokens as targets. Medians over rounds, and medians of the quotients within a round. The sampled normaliser is also
checked against the full one: losses and gradients of the same adapters on the same rows.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cats import CatsError, smollm2
from cats.adapter import BLOCKS, AdapterModel
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.earlyexit import read_config
from evaluation.timing import environment, seconds_of
from training.adapter_run import OPTIMIZERS, AdapterRun
from training.adapter_start import FITTED, fit_norms, starting_adapters
from training.adapter_trainer import AdapterTrainer
from training.base_model import load_base
from training.chat_tokens import encode_chats, training_text
from training.conversations import read_sharegpt
from training.dataset import Batch, RowSource, TextSource, token_rows
from training.frozen_head import FrozenHead
from training.objective import Objective
from training.provenance import write_json
from training.stored_states import DESCRIPTION, StoredSource, shard_path, with_best_tokens, write_shard

FORWARD, SAMPLED, FULL, STORED = "forward", "on the fly, sampled", "on the fly, full", "stored"
CPU = torch.device("cpu")


class Benchmark:
    """One base, some rows of text, and the cases."""

    def __init__(self, arguments: argparse.Namespace, model: Path, states: Path):
        self.arguments, self.model, self.states = arguments, model, states
        self.exits = tuple(arguments.exit_layers)
        self.run = AdapterRun(self.exits, rows=arguments.rows, length=arguments.length, steps=1_000_000, optimizer=arguments.optimizer)
        base = load_base(model, None, CPU, arguments.length)
        chats = read_sharegpt(arguments.data_path)[: arguments.conversations]
        rows = token_rows(encode_chats(training_text(model, None), chats, base.context), arguments.length, True, False)
        self.text = TextSource(rows, base, self.exits)
        self.heads = FrozenHead.read(model, torch.float32, "cpu")

    def batch(self) -> Batch:
        """The rows of every case, run through the base."""
        return self.text.batch(np.arange(self.run.rows))

    def store(self) -> RowSource:
        """The same rows, stored with the base's best tokens."""
        chosen = np.arange(self.run.rows)
        batch = with_best_tokens(self.batch(), self.text.base.target_logits, self.run.topk)
        write_shard(shard_path(self.states, 0), self.text.rows, chosen, batch, torch.float16)
        write_json(self.states / DESCRIPTION, {"exits": list(self.exits), "width": self.text.base.config.hidden_size})
        return StoredSource(self.states, self.exits, self.run.length, CPU)

    def adapters(self, batch: Batch) -> dict[int, AdapterModel]:
        """Adapters at the start of a run."""
        adapters = starting_adapters(self.model, self.exits, self.run.init, [], 0, None, self.arguments.block)
        fit_norms(self.objective(self.run.samples), adapters, batch, FITTED[self.run.init])
        return adapters

    def objective(self, samples: int) -> Objective:
        """The loss with so many sampled columns; 0: all."""
        return Objective(self.heads, self.run.topk, self.run.precision, samples)

    def step_of(self, source: RowSource, samples: int, batch: Batch) -> Callable[[], object]:
        """An optimizer step that always takes the same rows of a source."""
        rows = np.arange(self.run.rows)
        one = _OneBatch(source, rows)
        folder = self.states / "none"  # no checkpoint lies there
        return AdapterTrainer(
            self.run, self.adapters(batch), self.objective(samples), one, one, Accelerator(cpu=True), folder
        ).optimizer_step

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every case in every round."""
        batch = self.batch()
        actions: dict[str, Callable[[], object]] = {
            FORWARD: self.batch,
            SAMPLED: self.step_of(self.text, self.run.samples, batch),
            FULL: self.step_of(self.text, 0, batch),
            STORED: self.step_of(self.store(), self.run.samples, batch),
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        bar = live_bar([(turn, name) for turn in range(self.arguments.rounds + 1) for name in actions], desc="cases", unit="step")
        for turn, name in bar:
            taken = seconds_of(actions[name])
            if turn:
                seconds[name].append(taken)
        return seconds

    def normaliser(self) -> dict[str, dict[str, float]]:
        """Per exit: the mean loss with the full and the sampled normaliser, and the cosine between their gradients."""
        batch, figures = self.batch(), {}
        adapters = self.adapters(batch)
        for exit_layer, adapter in live_bar(adapters.items(), desc="normaliser", unit="exit"):
            losses, gradients = [], []
            for samples in (0, self.run.samples):
                objective = self.objective(samples)
                lesson = objective.learning_target(batch)
                loss = objective.learning_loss(adapter, batch.hidden[exit_layer], lesson) / len(lesson.target.probabilities)
                gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(adapter.parameters()))]))
                losses.append(float(loss.detach()))
            cosine = float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0))
            difference = losses[1] - losses[0]
            figures[str(exit_layer)] = {"full": losses[0], "sampled": losses[1], "difference": difference, "gradient_cosine": cosine}
        return figures


class _OneBatch:
    """A source of as many rows as one step takes."""

    def __init__(self, source: RowSource, rows: np.ndarray):
        self.source, self.rows, self.exits = source, rows, source.exits

    @property
    def lengths(self) -> np.ndarray:
        return self.source.lengths[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray) -> Batch:
        return self.source.batch(self.rows[rows])


def speeds(seconds: dict[str, list[float]], tokens: int) -> dict[str, dict[str, Any]]:
    """Per case: tokens/s from the median of the rounds, and the median of its speed over another case's in the same round."""
    figures = {}
    for name, own in seconds.items():
        against = {
            other: statistics.median(theirs / mine for mine, theirs in zip(own, seconds[other], strict=True))
            for other in seconds
            if other != name
        }
        figures[name] = {"tokens_per_second": tokens / statistics.median(own), "seconds": own, "speed_over": against}
    return figures


def arguments_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="base checkpoint directory; default: the model of `python -m cats.cli.fetch`")
    parser.add_argument("--data-path", required=True, help="ShareGPT conversations")
    parser.add_argument("--conversations", type=int, default=200, help="of --data-path (default: %(default)s)")
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[3, 10, 15, 20], help="default: 3 10 15 20")
    parser.add_argument("--block", choices=BLOCKS, default=BLOCKS[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="muon", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=4, help="of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--output", type=Path, help="write the result here")
    return parser


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    arguments = arguments_parser().parse_args(argv)
    if min(arguments.rounds, arguments.conversations) < 1 or arguments.threads < 0:
        raise CatsError("--rounds and --conversations must be at least 1, and --threads at least 0.")
    model = arguments.model_path or smollm2.cached()
    if model is None:
        raise CatsError("there is no model here; give --model-path, or fetch one: `python -m cats.cli.fetch`.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(arguments, model, Path(folder))
        if len(benchmark.text) < arguments.rows:
            raise CatsError(f"{arguments.data_path} gives {len(benchmark.text)} rows of {arguments.length} tokens; lower --rows.")
        lengths = benchmark.text.lengths[: arguments.rows]
        counted = int(benchmark.text.rows.padded(np.arange(arguments.rows))[1].sum())
        settings = {"model": model.name, "layers": read_config(model).num_hidden_layers, "exits": arguments.exit_layers}
        settings |= {name: getattr(arguments, name) for name in ("block", "optimizer", "rows", "length", "rounds")}
        settings |= {"tokens_per_step": int(lengths.sum()), "answer_tokens_per_step": counted}
        settings |= {"topk": benchmark.run.topk, "samples": benchmark.run.samples}
        result = settings | {"speed": speeds(benchmark.seconds(), int(lengths.sum())), "normaliser": benchmark.normaliser()}
    result |= {"minutes": (time.monotonic() - begin) / 60, "environment": environment()}
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
