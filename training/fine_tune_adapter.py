"""Drive adapter training through `accelerate launch`: stages and epochs, one process to many nodes, then the curves.

Stages, in this order: `regenerate` (the base model writes the answers of --data-path), `store` (its hidden states go to
--data_home), `train` (one launch per epoch, each going on from the checkpoint of the last), `plot`. A launch that fails
ends the run. Run again after an interruption: finished work is kept. Addresses of several nodes come from flags or from
the usual environment variables. Everything after `--` goes to train_finetune.py as it stands.

    python training/fine_tune_adapter.py --model-path vicuna-7b-v1.3 --exit_layer 3 15 --topk 20 --start_epoch 0 --end_epoch 20 \\
        --data_home states --outdir adapters --num_processes 2 -- --lr 1e-4 --rows 4 --length 2048 --precision bf16
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file, as in the paper's README
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cats.cli.command import CommandParser, exit_with_sentence
from cats.errors import CatsError
from training.base_model import model_path_of
from training.curves import publish
from training.regenerate import RESULT

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("regenerate", "store", "train", "plot")


def arguments_parser() -> argparse.ArgumentParser:
    """All flags; those of the paper's README keep their names."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exit_layer", "--exit-layers", type=int, nargs="+", required=True, help="one adapter is trained per exit layer")
    parser.add_argument("--topk", type=int, default=20, help="target tokens in the loss; 0: full KL")
    parser.add_argument("--start_epoch", type=int, default=0)
    parser.add_argument("--end_epoch", type=int, default=20, help="epoch to stop before; the learning rate reaches its end there")
    parser.add_argument("--data_home", "--data-home", help="folder of stored states; without it training is on the fly from --data-path")
    parser.add_argument("--data-path", help="ShareGPT conversations (on-the-fly training, or the stages regenerate and store)")
    parser.add_argument("--model-path", help="base checkpoint directory; default: the environment variable CATS_BASE_MODEL")
    parser.add_argument("--outdir", help="adapters, logs, curves; default: adapters_exit<l>... in the current directory")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["train", "plot"])
    parser.add_argument("--data-args", default="", help="flags for ge_data.py in the stages regenerate and store, as one quoted string")
    launch = parser.add_argument_group("accelerate launch")
    launch.add_argument("--num_processes", type=int, default=os.environ.get("NUM_PROCESSES", "1"), help="over all machines")
    launch.add_argument("--num_machines", type=int, default=os.environ.get("NUM_MACHINES", "1"))
    launch.add_argument("--machine_rank", type=int, default=os.environ.get("NODE_RANK", "0"))
    launch.add_argument("--main_process_ip", default=os.environ.get("MASTER_ADDR"))
    port = os.environ.get("MASTER_PORT", "0")
    launch.add_argument("--main_process_port", type=int, default=port, help="0: any free one (one machine only)")
    launch.add_argument("--cpu", action="store_true", help="train on CPUs, where several processes talk through gloo")
    return parser


def launch_command(arguments: argparse.Namespace, module: str, flags: Sequence[str]) -> list[str]:
    """The `accelerate launch` command line of one of our modules.

    `--multi_gpu` means torch's elastic launcher; CPU processes need it too, since `--cpu` starts a single one (or mpirun).
    The module itself is told to stay on the CPU.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(arguments.num_processes)]
    command += ["--num_machines", str(arguments.num_machines), "--machine_rank", str(arguments.machine_rank)]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if arguments.num_processes > 1:
        command.append("--multi_gpu")
    elif arguments.cpu:
        command.append("--cpu")
    if arguments.num_machines > 1:
        command += ["--main_process_ip", str(arguments.main_process_ip)]
    if arguments.num_machines > 1 or arguments.num_processes > 1:
        command += ["--main_process_port", str(arguments.main_process_port)]
    return [*command, "--module", module, *flags, *(["--cpu"] if arguments.cpu else [])]


def run_stage(arguments: argparse.Namespace, module: str, flags: Sequence[str], what: str) -> None:
    """Launch a module and wait; a failure raises `CatsError` with its exit status, after the module's own message."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.stderr.write(f"{what}: starting\n")
    finished = subprocess.run(launch_command(arguments, module, flags), env=os.environ | {"PYTHONPATH": path}, check=False)
    if finished.returncode:
        raise CatsError(f"{what} ended with exit status {finished.returncode}; its message stands above.")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse contradictions before anything is launched."""
    if not 0 <= arguments.start_epoch < arguments.end_epoch:
        raise CatsError(f"--start_epoch {arguments.start_epoch} must be at least 0 and below --end_epoch {arguments.end_epoch}.")
    if arguments.num_machines > 1 and not (arguments.main_process_ip and arguments.main_process_port):
        raise CatsError("several machines need --main_process_ip and --main_process_port (or MASTER_ADDR and MASTER_PORT).")
    machines, processes, rank = arguments.num_machines, arguments.num_processes, arguments.machine_rank
    if machines < 1 or processes < machines or processes % machines or not 0 <= rank < machines:
        raise CatsError(
            f"--num_processes {processes}, --num_machines {machines} and --machine_rank {rank} do not fit; "
            "processes count all machines alike, and ranks start from 0."
        )
    if "train" in arguments.stages and not (arguments.data_home or arguments.data_path):
        raise CatsError("there is nothing to train on; give --data_home (stored states) or --data-path (conversations).")
    for stage, name in (("regenerate", "data_path"), ("store", "data_path"), ("store", "data_home")):
        if stage in arguments.stages and not getattr(arguments, name):
            raise CatsError(f"the stage {stage} needs --{name}.")
    resumed = Path(arguments.outdir) / "checkpoint.pt"
    if "train" in arguments.stages and arguments.start_epoch > 0 and not resumed.exists():
        raise CatsError(f"--start_epoch {arguments.start_epoch} goes on from {resumed}, which is not there; start from epoch 0.")


def make_data(arguments: argparse.Namespace, model: str) -> str | None:
    """Run the stages `regenerate` and `store`; returns the conversations to train on."""
    data, extra = arguments.data_path, shlex.split(arguments.data_args)
    exits = [str(exit_layer) for exit_layer in arguments.exit_layer]
    shared = ["--model-path", model, "--exit-layers", *exits, *extra]
    if "regenerate" in arguments.stages:
        written = Path(arguments.outdir) / "own_answers"
        flags = [*shared, "--data-path", data, "--outdir", str(written), "--regenerate", "--text-only"]
        run_stage(arguments, "training.ge_data", flags, "writing the model's own answers")
        data = str(written / "0" / RESULT)
    if "store" in arguments.stages:
        run_stage(arguments, "training.ge_data", [*shared, "--data-path", data, "--outdir", arguments.data_home], "storing hidden states")
    return data


def train(arguments: argparse.Namespace, model: str, data: str | None, extra: Sequence[str]) -> None:
    """One launch per epoch."""
    source = ["--data-home", arguments.data_home] if arguments.data_home else ["--data-path", str(data)]
    exits = [str(exit_layer) for exit_layer in arguments.exit_layer]
    settings = ["--model-path", model, "--exit-layers", *exits, "--topk", str(arguments.topk), "--outdir", arguments.outdir, *source]
    for epoch in range(arguments.start_epoch, arguments.end_epoch):
        bounds = ["--epochs", str(arguments.end_epoch), "--stop-epoch", str(epoch + 1)]
        run_stage(arguments, "training.train_finetune", [*settings, *bounds, *extra], f"training of epoch {epoch}")


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    arguments, extra = arguments_parser().parse_args(given[:cut]), given[cut + 1 :]
    arguments.outdir = arguments.outdir or "adapters_exit" + "_".join(str(exit_layer) for exit_layer in arguments.exit_layer)
    check_arguments(arguments)
    if set(arguments.stages) != {"plot"}:
        model = str(model_path_of(arguments.model_path))
        data = make_data(arguments, model)
        if "train" in arguments.stages:
            train(arguments, model, data, extra)
    if "plot" in arguments.stages and arguments.machine_rank == 0:
        publish([Path(arguments.outdir) / "training_log.json"], Path(arguments.outdir) / "curves.json")


if __name__ == "__main__":
    main()
