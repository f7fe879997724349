"""Train exit adapters on the frozen base model: on the fly from text (nothing stored), or from stored states.

One forward of the base trains the adapters of all exits. Each adapter learns the base model's own next-token
distribution at the answer tokens, by the reduced KL loss of the paper. A run is bounded by --epochs, --steps or
--hours, whichever ends first, and the learning rate follows whichever is closer to its end. Run the same command again
after an interruption: it goes on from the last checkpoint, bit for bit on a CPU in fp32 (with --hours the schedule
follows the clock, so there the weights differ).

    python -m training.train_finetune --model-path data/tiny --exit-layers 2 6 8 \\
        --data-path sharegpt_mix.json.gz --validation-path heldout.json.gz --outdir runs/adapters --hours 0.25
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file, as in the paper's README
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cats.adapter import BLOCKS, AdapterModel
from cats.checkpoint import DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat
from cats.earlyexit import read_config
from cats.errors import CatsError
from cats.records import sha256
from training.adapter_run import INITS, OPTIMIZERS, PRECISIONS, SCHEDULES, AdapterRun
from training.adapter_start import FITTED, FITTING_ROWS, fit_norms, starting_adapters
from training.adapter_trainer import AdapterTrainer
from training.base_model import load_base, model_path_of
from training.chat_tokens import encode_chats, training_text
from training.conversations import Conversation, read_sharegpt
from training.dataset import RowSource, TextSource, row_order, token_rows
from training.frozen_head import FrozenHead
from training.objective import HALVES, Objective
from training.provenance import hash_of_data, write_json
from training.stored_states import StoredSource, check_states

HELD_OUT_EVERY = 50  # without --validation-path, one conversation or row in so many is held out


def arguments_parser() -> argparse.ArgumentParser:
    """All flags; the defaults of the settings are those of `AdapterRun`."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("model and data")
    data.add_argument("--exit-layers", type=int, nargs="+", required=True, dest="exits")
    add_data(data)
    start = parser.add_argument_group("start and result")
    start.add_argument("--init", choices=INITS, help="where adapters start (default: fitted); see docs/training.md")
    start.add_argument("--block", choices=BLOCKS, help="the adapter's layer: attention alone (default), or a decoder block with its MLP")
    start.add_argument("--init-adapter", nargs="+", default=[], help="adapter directories to start from, one per exit")
    start.add_argument("--configpath", help="adapter template; default: derived from the base")
    start.add_argument("--outdir", required=True, help="checkpoint, logs and one adapter directory per exit")
    start.add_argument("--names", nargs="+", help="names of the adapter directories; default: exit<l>")
    start.add_argument("--save-dtype", choices=tuple(DTYPES), default="float32", help="of the adapters as written (default: %(default)s)")
    start.add_argument("--bin", action="store_true", help="also write pytorch_model.bin")
    training = parser.add_argument_group("training")
    add_settings(training)
    training.add_argument("--topk", type=int, help="target tokens in the loss (default 20); 0: full KL")
    training.add_argument("--drafts", type=int, help="chain length of the simulated accepted length (default 5)")
    parser.add_argument("--stop-epoch", type=int, default=0, help="stop after this epoch of a longer run (for drivers)")
    add_machine(parser)
    return parser


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Flags of where the work is done."""
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where an accelerator is present")


def add_data(data: argparse._ArgumentGroup) -> None:
    """Flags of the base model and of what is learnt from it."""
    data.add_argument("--model-path", help="base checkpoint directory; default: the environment variable CATS_BASE_MODEL")
    data.add_argument("--data-path", help="ShareGPT conversations for training on the fly")
    data.add_argument("--validation-path", help="held-out conversations; without it every 50th conversation is held out")
    data.add_argument("--data-home", help="states stored by ge_data, instead of --data-path")
    data.add_argument("--validation-home", help="held-out states; without it every 50th row is held out")
    data.add_argument("--start", type=int, default=0, help="first conversation of --data-path")
    data.add_argument("--end", type=int, help="conversation of --data-path to stop before")
    data.add_argument("--template", help="chat template by name, or a .jinja file; default: the model's own")
    data.add_argument(
        "--rows-from", choices=("packed", "conversations"), default="packed", help="on the fly: cut one stream, or one row per conversation"
    )
    data.add_argument("--every-token", action="store_true", help="learn at every token, not only at answer tokens")
    data.add_argument("--dtype", default=None, help="dtype of the base's weights; default: float32 on CPU, as stored elsewhere")
    data.add_argument("--compute-dtype", help="dtype of its arithmetic; default: float32 on CPU, that of --dtype elsewhere")


def add_settings(group: argparse._ArgumentGroup, lr: str = "3e-3") -> None:
    """Flags of the numbers and choices in `AdapterRun` that Medusa's heads share; `lr` is the default that the help names."""
    group.add_argument("--rows", "--batch-size", type=int, help="rows in one forward of one process (default 16)")
    group.add_argument("--length", type=int, help="tokens of a row (default 256)")
    group.add_argument("--accumulate", type=int, help="forwards per optimizer step (default 1)")
    group.add_argument("--samples", type=int, help="tokens drawn for the normaliser beside all targets (default 2048); 0: whole vocabulary")
    group.add_argument("--epochs", type=int)
    group.add_argument("--steps", type=int, help="optimizer steps")
    group.add_argument("--hours", type=float)
    group.add_argument("--optimizer", choices=OPTIMIZERS)
    group.add_argument("--lr", type=float, help=f"peak learning rate of AdamW (default {lr})")
    group.add_argument("--muon-lr", type=float)
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--warmup", type=int, help="optimizer steps (default 20)")
    group.add_argument("--schedule", choices=SCHEDULES)
    group.add_argument("--clip", type=float, help="largest gradient norm (default 1; 0: off)")
    group.add_argument("--precision", choices=PRECISIONS, help="arithmetic of the adapters; their weights stay float32")
    group.add_argument("--seed", type=int)
    group.add_argument("--validation-rows", type=int, help="rows per validation (default 64)")
    group.add_argument("--report-steps", type=int, help="also validate before the first and after every so many optimizer steps")
    group.add_argument("--save-minutes", type=float)


def run_of(arguments: argparse.Namespace) -> AdapterRun:
    """The settings of a command line; flags that were not given keep the defaults of `AdapterRun`."""
    return AdapterRun(**given_settings(arguments, AdapterRun) | {"exits": tuple(arguments.exits)})


def given_settings(arguments: argparse.Namespace, settings: type[AdapterRun]) -> dict[str, Any]:
    """Those of the settings that a command line gives."""
    names = {field.name for field in fields(settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return given | {"packed": arguments.rows_from == "packed"}


def split_conversations(arguments: argparse.Namespace) -> tuple[list[Conversation], list[Conversation]]:
    """Training and held-out conversations."""
    chats = read_sharegpt(arguments.data_path)[arguments.start : arguments.end]
    if not chats:
        raise CatsError(f"--start {arguments.start} --end {arguments.end} leaves no conversation of {arguments.data_path}.")
    if arguments.validation_path:
        return chats, read_sharegpt(arguments.validation_path)
    train = [chat for place, chat in enumerate(chats) if place % HELD_OUT_EVERY]
    return train or chats, chats[::HELD_OUT_EVERY]


def text_sources(arguments: argparse.Namespace, run: AdapterRun, device: torch.device) -> tuple[RowSource, RowSource]:
    """Training and validation rows that run the frozen base on the fly."""
    base = load_base(arguments.model_path, arguments.dtype, device, run.length, arguments.compute_dtype or "auto")
    text = training_text(arguments.model_path, arguments.template)
    train, validation = split_conversations(arguments)
    train_rows, validation_rows = (
        token_rows(encode_chats(text, chats, base.context), run.length, run.packed, run.every_token)
        for chats in (train, validation[: 20 * run.validation_rows])
    )
    return TextSource(train_rows, base, run.read_exits), TextSource(validation_rows, base, run.read_exits)


def stored_sources(arguments: argparse.Namespace, run: AdapterRun, device: torch.device) -> tuple[RowSource, RowSource]:
    """Training and validation rows from stored states; the base model is not loaded."""
    everything = StoredSource(arguments.data_home, run.read_exits, run.length, device)
    if arguments.validation_home:
        check_states(arguments.validation_home, run.read_exits, read_config(arguments.model_path).hidden_size)
        return everything, StoredSource(arguments.validation_home, run.read_exits, run.length, device)
    validation = np.arange(0, len(everything), HELD_OUT_EVERY)
    train = np.setdiff1d(np.arange(len(everything)), validation)
    return everything.subset(train if len(train) else validation), everything.subset(validation)


def sources_of(arguments: argparse.Namespace, run: AdapterRun, device: torch.device) -> tuple[RowSource, RowSource, str]:
    """Training rows, validation rows, and a hash that identifies the training data."""
    if bool(arguments.data_path) == bool(arguments.data_home):
        raise CatsError("give either --data-path (conversations, trained on the fly) or --data-home (states stored by ge_data).")
    if arguments.data_path:
        return *text_sources(arguments, run, device), hash_of_data(arguments.data_path)
    for name in ("start", "end", "template", "dtype", "compute_dtype", "every_token", "validation_path"):
        if getattr(arguments, name):
            raise CatsError(f"--{name.replace('_', '-')} was decided when the states were stored; leave it out with --data-home.")
    identity = check_states(arguments.data_home, run.read_exits, read_config(arguments.model_path).hidden_size)
    return *stored_sources(arguments, run, device), identity


def export(trainer: AdapterTrainer, arguments: argparse.Namespace) -> None:
    """Write the adapter directories, each with its PROVENANCE.json, and training_log.json, which adds every step."""
    outdir, metadata = Path(arguments.outdir), provenance(trainer, arguments)
    for name, (exit_layer, adapter) in zip(adapter_names(arguments), trainer.adapters.items(), strict=True):
        adapter.save_pretrained(outdir / name, arguments.bin, DTYPES[arguments.save_dtype])
        figures = trainer.reports[-1]["validation"][str(exit_layer)] if trainer.reports else {}
        hashes = {"sha256": {"model.safetensors": sha256(outdir / name / "model.safetensors")}}
        write_json(outdir / name / "PROVENANCE.json", metadata | {"exit_layer": exit_layer, "validation": figures} | hashes)
    write_json(outdir / "training_log.json", metadata | {"reports": trainer.reports, "steps": trainer.log}, indent=None)


def provenance(trainer: AdapterTrainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the adapters were made from and how; file names without the paths of this machine."""
    paths = ("model_path", "data_path", "data_home", "validation_path", "validation_home", "outdir", "configpath")
    given = {name: Path(value).name if name in paths and value else value for name, value in vars(arguments).items()}
    given["init_adapter"] = [Path(value).name for value in arguments.init_adapter]
    return {
        "what": "exit adapters trained on the base model's own next-token distribution (reduced KL)",
        "run": asdict(trainer.run),
        "arguments": given,
        "data_identity": trainer.identity["data"],
        "processes": trainer.accelerator.num_processes,
        "machine": f"{os.cpu_count()} x {platform.machine()} CPU cores, device {trainer.accelerator.device}, torch {torch.__version__}",
        "rows": len(trainer.source),
        "rows_per_step": trainer.rows_per_step,
        "steps_per_epoch": trainer.steps_per_epoch,
        "vocabulary": len(trainer.objective.head.lm_head_VD),
        "block": trainer.identity["block"],
        "adapter_parameters": {str(exit_layer): count_parameters(adapter) for exit_layer, adapter in trainer.adapters.items()},
        "optimizer_steps": trainer.step,
        "hours": trainer.seconds / 3600,
    }


def count_parameters(adapter: AdapterModel) -> int:
    """Numbers that an adapter holds."""
    return sum(parameter.numel() for parameter in adapter.parameters())


def adapter_names(arguments: argparse.Namespace) -> list[str]:
    """Names of the adapter directories."""
    return arguments.names or [f"exit{exit_layer}" for exit_layer in arguments.exits]


def step_writer(board: SummaryWriter, unit: str) -> Callable[[dict[str, Any]], None]:
    """Puts losses, gradient norms and the learning rate of a step on TensorBoard; `unit` is what is trained, "exit" or "head"."""

    def write(entry: dict[str, Any]) -> None:
        board.add_scalar("learning rate", entry["lr"], entry["step"])
        for kind in ("loss", "gradient_norm"):
            for number, value in entry[kind].items():
                board.add_scalar(f"{unit} {number}/{kind.replace('_', ' ')}", value, entry["step"])

    return write


def report_writer(board: SummaryWriter, trainer: AdapterTrainer, arguments: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Shows a report on the terminal and TensorBoard, and exports the adapters as they are."""

    def write(report: dict[str, Any]) -> None:
        for exit_layer, figures in report["validation"].items():
            tqdm.write(f"step {report['step']} exit {exit_layer}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            for name, value in figures.items():
                board.add_scalar(f"exit {exit_layer}/validation {name.replace('_', ' ')}", value, report["step"])
        export(trainer, arguments)

    return write


def build_trainer(arguments: argparse.Namespace, run: AdapterRun, accelerator: Accelerator) -> AdapterTrainer:
    """Adapters, data and head put together; an interrupted run is picked up."""
    start = (run.init, arguments.init_adapter, run.seed, arguments.configpath, arguments.block)
    with heartbeat("make the adapters"):
        adapters = starting_adapters(arguments.model_path, run.exits, *start)
        for adapter in adapters.values():
            adapter.to(accelerator.device)
    source, validation, data = sources_of(arguments, run, accelerator.device)
    with heartbeat("read the head"):
        head = FrozenHead.read(arguments.model_path, HALVES.get(run.precision, torch.float32), accelerator.device)
    objective = Objective(head, run.topk, run.precision, run.samples)
    trainer = AdapterTrainer(run, adapters, objective, source, validation, accelerator, Path(arguments.outdir), data)
    if trainer.step == 0 and run.init in FITTED and not arguments.init_adapter:
        with heartbeat("rows to fit norms"):
            batch = source.batch(row_order(len(source), 0, run.seed)[:FITTING_ROWS])
        fit_norms(objective, adapters, batch, FITTED[run.init])
    return trainer


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    arguments = arguments_parser().parse_args(argv)
    arguments.model_path = model_path_of(arguments.model_path)
    run = run_of(arguments)
    if arguments.samples and run.topk == 0:
        raise CatsError("--samples draws tokens beside top-k targets, and --topk 0 sums over the whole vocabulary; leave one of them out.")
    if arguments.init and arguments.init_adapter:
        raise CatsError("--init-adapter says where the adapters start, so --init would do nothing; leave one of them out.")
    if arguments.names and len(arguments.names) != len(run.exits):
        raise CatsError(f"--names gives {len(arguments.names)} names for {len(run.exits)} exits; give one per exit.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    accelerator = Accelerator(cpu=arguments.cpu)
    trainer = build_trainer(arguments, run, accelerator)
    if not accelerator.is_main_process:
        trainer.train(stop_epoch=arguments.stop_epoch)
        return
    with SummaryWriter(Path(arguments.outdir) / "tensorboard", purge_step=trainer.step + 1) as board:
        trainer.train(step_writer(board, trainer.unit), report_writer(board, trainer, arguments), arguments.stop_epoch)
    export(trainer, arguments)


if __name__ == "__main__":
    main()
