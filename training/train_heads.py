"""Train Medusa's heads on the frozen base model: on the fly from text, or from stored final states.

One forward of the base trains all heads. Head k learns the token k places after the base's own next token, at the tokens of
answers; give answers that the model wrote itself (`ge_data --regenerate --text-only`). Run the same command again after an
interruption: it goes on from the last checkpoint, bit for bit on a CPU in fp32.

    python -m training.train_heads --model-path data/tiny --data-path answers.json.gz --outdir runs/medusa

writes `runs/medusa/heads` (config.json, model.safetensors, accuracy.json, PROVENANCE.json), of which `--method medusa` makes drafts.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cats.checkpoint import DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat
from cats.errors import CatsError
from cats.medusa_heads import HeadsShape, MedusaHeads, save_accuracy
from cats.records import sha256
from training.base_model import model_path_of
from training.frozen_head import FrozenHead
from training.head_objective import HeadObjective, by_rank
from training.head_trainer import HeadRun, HeadTrainer
from training.objective import HALVES
from training.provenance import write_json
from training.train_finetune import add_data, add_machine, add_settings, given_settings, sources_of, step_writer

HEADS = "heads"


def arguments_parser() -> argparse.ArgumentParser:
    """All flags; the defaults of the settings are those of `HeadRun`."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser.add_argument_group("model and data"))
    result = parser.add_argument_group("heads and result")
    result.add_argument("--heads", type=int, default=4, help="heads, each predicts one token further ahead (default: %(default)s)")
    result.add_argument("--own-head", action="store_true", help="give every head an lm_head of its own, a copy of the base's at first")
    result.add_argument("--outdir", required=True, help="checkpoint, logs and the directory of the heads")
    result.add_argument("--save-dtype", choices=tuple(DTYPES), default="float32", help="of the heads as written (default: %(default)s)")
    training = parser.add_argument_group("training")
    add_settings(training, lr="1e-3")
    training.add_argument("--decay", type=float, help="the loss of head k weighs this to the power of k (default 0.8)")
    add_machine(parser)
    return parser


def run_of(arguments: argparse.Namespace) -> HeadRun:
    """The settings of a command line."""
    given = given_settings(arguments, HeadRun) | {"exits": tuple(range(1, arguments.heads + 1))}
    if arguments.own_head:
        if arguments.samples:
            raise CatsError("--samples draws tokens of the shared lm_head, and --own-head sums over the vocabulary; leave one of them out.")
        given["samples"] = 0
    return HeadRun(**given)


def build_trainer(arguments: argparse.Namespace, run: HeadRun, accelerator: Accelerator) -> HeadTrainer:
    """Heads, data and lm_head put together; an interrupted run is picked up."""
    source, validation, data = sources_of(arguments, run, accelerator.device)
    with heartbeat("read the head"):
        frozen = FrozenHead.read(arguments.model_path, HALVES.get(run.precision, torch.float32), accelerator.device)
    vocabulary, width = frozen.lm_head_VD.shape
    heads = MedusaHeads(HeadsShape(arguments.heads, width, vocabulary, run.own_head))
    for own in heads.lm_heads:
        own.load_state_dict({"weight": frozen.lm_head_VD})
    objective = HeadObjective(heads.to(accelerator.device), frozen, run.precision, run.samples)
    return HeadTrainer(run, objective, source, validation, accelerator, Path(arguments.outdir), data)


def export(trainer: HeadTrainer, arguments: argparse.Namespace) -> None:
    """Write the directory of the heads as they are, and training_log.json, which adds every step."""
    outdir, metadata = Path(arguments.outdir), provenance(trainer, arguments)
    heads = outdir / HEADS
    trainer.head_objective.heads.save_pretrained(heads, DTYPES[arguments.save_dtype])
    figures = trainer.reports[-1]["validation"] if trainer.reports else {}
    if figures:
        save_accuracy(heads, [by_rank(each) for each in figures.values()], [each["positions"] for each in figures.values()])
    hashes = {"sha256": {"model.safetensors": sha256(heads / "model.safetensors")}}
    write_json(heads / "PROVENANCE.json", metadata | {"validation": figures} | hashes)
    write_json(outdir / "training_log.json", metadata | {"reports": trainer.reports, "steps": trainer.log}, indent=None)


def provenance(trainer: HeadTrainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the heads were made from and how; file names without the paths of this machine."""
    paths = ("model_path", "data_path", "data_home", "validation_path", "validation_home", "outdir")
    given = {name: Path(value).name if name in paths and value else value for name, value in vars(arguments).items()}
    return {
        "what": "Medusa heads trained on the tokens that follow the base model's own next one",
        "run": asdict(trainer.head_run),
        "arguments": given,
        "data_identity": trainer.identity["data"],
        "processes": trainer.accelerator.num_processes,
        "machine": f"{os.cpu_count()} x {platform.machine()} CPU cores, device {trainer.accelerator.device}, torch {torch.__version__}",
        "rows": len(trainer.source),
        "rows_per_step": trainer.rows_per_step,
        "steps_per_epoch": trainer.steps_per_epoch,
        "parameters": sum(weight.numel() for weight in trainer.head_objective.heads.parameters()),
        "optimizer_steps": trainer.step,
        "hours": trainer.seconds / 3600,
    }


def report_writer(board: SummaryWriter, trainer: HeadTrainer, arguments: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Shows a report on the terminal and TensorBoard, and exports the heads as they are."""

    def write(report: dict[str, Any]) -> None:
        for head, figures in report["validation"].items():
            shown = ("loss", "top1", "top2", "top3", "top5", "top10", "positions")
            tqdm.write(f"step {report['step']} head {head}: " + ", ".join(f"{name} {figures[name]:.4g}" for name in shown))
            for name, value in figures.items():
                board.add_scalar(f"head {head}/validation {name}", value, report["step"])
        export(trainer, arguments)

    return write


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    arguments = arguments_parser().parse_args(argv)
    arguments.model_path = model_path_of(arguments.model_path)
    run = run_of(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    accelerator = Accelerator(cpu=arguments.cpu)
    trainer = build_trainer(arguments, run, accelerator)
    if not accelerator.is_main_process:
        trainer.train()
        return
    with SummaryWriter(Path(arguments.outdir) / "tensorboard", purge_step=trainer.step + 1) as board:
        trainer.train(step_writer(board, trainer.unit), report_writer(board, trainer, arguments))
    export(trainer, arguments)


if __name__ == "__main__":
    main()
