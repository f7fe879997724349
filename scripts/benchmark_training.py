"""What adapter training costs on the embedded model: time against a bare forward of the base, peak memory, disk.

    python -m scripts.benchmark_training [--output evaluation/results/training_cost.json]

Time: one optimizer step for one, two and three exits, on the fly and from stored states, in turns with a forward of the
base over the same rows (all layers, and the head at every position). Each quotient is taken within a round and the
median over rounds is reported, of wall-clock and of processor seconds, since other programs disturb the former more.
Memory: the high-water mark of a fresh process for each case (Linux only). The rows are random tokens, of which a share
counts as answers: time and memory do not depend on which tokens they are.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import live_bar
from cats.earlyexit import EarlyExitLlamaForCausalLM, read_config
from cats.errors import CatsError
from cats.files import write_atomically
from evaluation.timing import environment
from scripts.memory_run import peak_bytes
from training.adapter_run import AdapterRun
from training.adapter_start import starting_adapters
from training.adapter_trainer import AdapterTrainer
from training.base_model import load_base
from training.dataset import RowSource, TextSource, TokenRows
from training.frozen_head import FrozenHead
from training.objective import Objective
from training.provenance import write_json
from training.stored_states import DESCRIPTION, StoredSource, shard_path, write_shard

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"
EXITS = (2, 6, 8)
LENGTH = 384
ROWS = 8
SHARDS = 4
STEPS_FOR_MEMORY = 4


def random_rows(config: PretrainedConfig, count: int, share: float) -> TokenRows:
    """`count` rows of random tokens; every row ends with an answer that takes `share` of it."""
    ids = np.random.default_rng(0).integers(3, config.vocab_size, count * LENGTH, dtype=np.int32)
    counted = np.tile(np.arange(LENGTH) >= round(LENGTH * (1 - share)), count)
    return TokenRows(ids, counted, np.arange(count) * LENGTH, np.full(count, LENGTH))


def trainer_of(source: RowSource, exits: tuple[int, ...], outdir: Path) -> AdapterTrainer:
    """A trainer of the default settings (AdamW, reduced KL over 20 tokens, float32)."""
    run = AdapterRun(exits, rows=ROWS, length=LENGTH, steps=1_000_000)
    adapters = starting_adapters(TINY, exits, "base", [], 0, None)
    objective = Objective(FrozenHead.read(TINY, torch.float32, "cpu"), run.topk, run.precision)
    return AdapterTrainer(run, adapters, objective, source, source, Accelerator(cpu=True), outdir)


def store(source: TextSource, root: Path) -> int:
    """Write the states of all rows in float16; returns the bytes on disk."""
    for number in range(SHARDS):
        rows = np.arange(number * ROWS, (number + 1) * ROWS)
        write_shard(shard_path(root, number), source.rows, rows, source.batch(rows), torch.float16)
    write_json(root / DESCRIPTION, {"exits": list(source.exits), "width": source.base.config.hidden_size})
    return sum(path.stat().st_size for path in root.glob("*.safetensors"))


def source_of(kind: str, exits: tuple[int, ...], rows: TokenRows, states: Path) -> RowSource:
    """Rows run through the base now ("on the fly"), or the stored states."""
    if kind == "stored":
        return StoredSource(states, exits, LENGTH, torch.device("cpu"))
    return TextSource(rows, load_base(TINY, "float32", torch.device("cpu"), LENGTH), exits)


@dataclass
class Turns:
    """Seconds of several callables that take turns: name -> (wall-clock, processor) per round."""

    seconds: dict[str, list[tuple[float, float]]]

    @classmethod
    def take(cls, actions: dict[str, Callable[[], object]], rounds: int) -> "Turns":
        """Call every action once a round, after one untimed round."""
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
        for round_number in live_bar(range(rounds + 1), desc="rounds"):
            for name, action in actions.items():
                wall, processor = time.perf_counter(), time.process_time()
                action()
                taken = (time.perf_counter() - wall, time.process_time() - processor)
                if round_number:
                    seconds[name].append(taken)
        return cls(seconds)

    def figures(self, name: str, against: str) -> dict[str, Any]:
        """Median seconds, and the median quotient against another action of the same round."""
        pairs = zip(self.seconds[name], self.seconds[against], strict=True)
        quotients = [(mine[0] / other[0], mine[1] / other[1]) for mine, other in pairs]
        return {
            "wall_s": statistics.median(wall for wall, _ in self.seconds[name]),
            "processor_s": statistics.median(processor for _, processor in self.seconds[name]),
            "wall_against_forward": statistics.median(wall for wall, _ in quotients),
            "processor_against_forward": statistics.median(processor for _, processor in quotients),
            "wall_seconds": [wall for wall, _ in self.seconds[name]],
            "processor_seconds": [processor for _, processor in self.seconds[name]],
        }


def products_against_forward(config: PretrainedConfig, exits: int, share: float) -> float:
    """Multiplications of weight matrices in a training step against those in a forward with the head at every position.

    The adapter's matrices and the head cost as much again backwards: the head for the gradient of its input alone, the
    adapter for that of its input and weights. This is the quotient to be expected where nothing else costs time.
    """
    width, head_width = config.hidden_size, config.head_dim
    attention = 2 * width * head_width * (config.num_attention_heads + config.num_key_value_heads)
    layers = config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)
    head = width * config.vocab_size
    return (layers + share * head + exits * (3 * attention + 2 * share * head)) / (layers + head)


def measure_time(base: EarlyExitLlamaForCausalLM, rows: TokenRows, states: Path, share: float, rounds: int) -> dict[str, Any]:
    """Figures of every case, against the bare forward of the same round."""
    ids_BN, _ = rows.padded(np.arange(ROWS))
    last = base.layer_count

    @torch.no_grad()
    def layers() -> torch.Tensor:
        return base.hidden_states(ids_BN, (last,))[last]

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return base.target_logits(layers())

    actions: dict[str, Callable[[], object]] = {"forward": forward, "layers without the head": layers}
    for count in range(1, len(EXITS) + 1):
        for kind in ("on the fly", "stored"):
            trainer = trainer_of(source_of(kind, EXITS[:count], rows, states), EXITS[:count], states)
            actions[f"{kind}, exits {count}"] = trainer.optimizer_step
    turns = Turns.take(actions, rounds)
    figures = {name: turns.figures(name, "forward") for name in actions}
    for count in range(1, len(EXITS) + 1):
        figures[f"on the fly, exits {count}"]["products_against_forward"] = products_against_forward(base.config, count, share)
    return figures


def memory_in_this_process(kind: str, count: int, share: float, states: Path) -> None:
    """Train a few steps (none for the kind "imports") and print the peak."""
    rows = random_rows(read_config(TINY), ROWS * SHARDS, share)
    if kind != "imports":
        trainer = trainer_of(source_of(kind, EXITS[:count], rows, states), EXITS[:count], states)
        for _ in range(STEPS_FOR_MEMORY):
            trainer.optimizer_step()
    print(json.dumps({"peak_bytes": peak_bytes()}))


def measure_memory(share: float, threads: int, states: Path) -> dict[str, int]:
    """Peak bytes of a fresh process per case."""
    if not Path("/proc/self/status").exists():
        raise CatsError("peak memory is read from /proc, which this system has not; run on Linux, or give --no-memory.")
    peaks = {}
    for kind, count in (("imports", 0), *((kind, count) for kind in ("on the fly", "stored") for count in range(1, len(EXITS) + 1))):
        flags = ["--memory-of", kind, str(count), "--states", str(states), "--answer-share", str(share), "--threads", str(threads)]
        command = [sys.executable, "-m", "scripts.benchmark_training", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CatsError(f"measuring the memory of {kind!r} failed: {done.stderr.strip().splitlines()[-1]}")
        peaks[f"{kind}, exits {count}" if count else kind] = int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
    return peaks


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--answer-share", type=float, default=0.7, help="of each row, counted in the loss (default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--output", type=Path, help="write the result here")
    parser.add_argument("--memory-of", nargs=2, metavar=("KIND", "EXITS"), help="measure one case in this process and print its peak")
    parser.add_argument("--states", type=Path, help="with --memory-of: where the stored states lie")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.answer_share <= 1 or min(arguments.rounds, arguments.threads) < 1:
        raise CatsError("--answer-share must lie above 0 and at most at 1, and --rounds and --threads must be at least 1.")
    torch.set_num_threads(arguments.threads)
    share = arguments.answer_share
    if arguments.memory_of:
        memory_in_this_process(arguments.memory_of[0], int(arguments.memory_of[1]), share, arguments.states)
        return
    base = load_base(TINY, "float32", torch.device("cpu"), LENGTH)
    rows = random_rows(base.config, ROWS * SHARDS, share)
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder)
        stored_bytes = store(TextSource(rows, base, EXITS), states)
        tokens = {"rows": ROWS, "tokens_per_step": ROWS * LENGTH, "answer_share": share, "exits": list(EXITS)}
        result = tokens | {"stored_bytes_per_token": stored_bytes / (len(rows.starts) * LENGTH)}
        if not arguments.no_memory:
            result["peak_bytes"] = measure_memory(share, arguments.threads, states)
        result |= {"time": measure_time(base, rows, states, share, arguments.rounds), "environment": environment()}
    print(json.dumps(result, indent=1))
    if arguments.output:
        write_atomically(arguments.output, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
