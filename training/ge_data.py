"""Run the base model over conversations once and store the hidden states that adapter training needs.

Each row is one conversation (or a piece of the packed stream): the states that leave the chosen exit layers and the
last layer, and which tokens are answers. Shards are written atomically and finished ones are kept, so the same command
goes on after an interruption; `accelerate launch` shares the shards out over processes. Before it starts, the time and
the disk that it will take are printed, and it refuses a disk that is too small. Training on the fly
(`train_finetune.py --data-path`) needs none of this.

    python -m training.ge_data --model-path vicuna-7b-v1.3 --data-path ShareGPT.json --exit-layers 3 15 --outdir states

With --regenerate the model first writes its own answers to the prompts (see regenerate.py); --text-only stops there.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file, as in the paper's README
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate import Accelerator

import cats
from cats.checkpoint import DTYPES
from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.earlyexit import EarlyExitLlamaForCausalLM, read_config
from cats.errors import CatsError
from training.base_model import base_device, load_base, model_path_of
from training.chat_tokens import encode_chats, training_text
from training.conversations import Conversation, read_sharegpt
from training.dataset import TextSource, TokenRows, token_rows
from training.provenance import agree, hash_of_data, write_json
from training.regenerate import RESULT, Answerer, Regeneration, collect, regenerate
from training.stored_states import DESCRIPTION, read_lengths, shard_path, with_best_tokens, write_shard

PAPER_DATA = "ShareGPT_V4.3_unfiltered_cleaned_split.json"
STORE_DTYPES = ("float16", "bfloat16", "float32")


def arguments_parser() -> argparse.ArgumentParser:
    """All flags; those of the paper's README keep their names."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="base checkpoint directory; default: the environment variable CATS_BASE_MODEL")
    parser.add_argument("--data-path", default=PAPER_DATA, help="ShareGPT conversations (.json, .json.gz)")
    parser.add_argument("--exit-layers", type=int, nargs="+", default=[3, 15])
    parser.add_argument("--start", type=int, default=0, help="first conversation")
    parser.add_argument("--end", type=int, help="conversation to stop before")
    parser.add_argument("--index", type=int, default=0, help="number of this run; its shards go to <outdir>/<index>")
    parser.add_argument("--gpu_index", type=int, nargs="+", help="CUDA device of this process (one number per local process)")
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--template", help="chat template by name, or a .jinja file; default: the model's own")
    parser.add_argument("--length", type=int, default=2048, help="longest row in tokens")
    parser.add_argument("--rows-from", choices=("conversations", "packed"), default="conversations")
    parser.add_argument("--every-token", action="store_true", help="mark every token to be learnt, not only those of answers")
    parser.add_argument("--shard-rows", type=int, default=16, help="rows in one shard, which is also one forward")
    parser.add_argument("--dtype", help="dtype of the base's weights; default: float32 on CPU, as stored elsewhere")
    parser.add_argument("--compute-dtype", default="auto", help="dtype of its arithmetic; default: float32 on CPU, else that of --dtype")
    parser.add_argument("--store-dtype", choices=STORE_DTYPES, default="float16")
    parser.add_argument("--targets", type=int, default=0, help="store this many best tokens of the base in the place of its final states")
    parser.add_argument("--dry-run", action="store_true", help="print the estimate and stop")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where an accelerator is present")
    written = parser.add_argument_group("answers written by the model")
    written.add_argument("--regenerate", action="store_true", help="let the base model write the answers itself")
    written.add_argument("--text-only", action="store_true", help="with --regenerate: write the conversations, store no states")
    written.add_argument("--max-new-tokens", type=int, default=512)
    written.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    written.add_argument("--top-p", type=float, default=1.0)
    written.add_argument("--seed", type=int, default=0)
    written.add_argument("--answer-rows", type=int, default=32, help="answers written at once (default: %(default)s)")
    return parser


@dataclass(frozen=True)
class Estimate:
    """What storing will take: `tokens` still to run, `bytes` still to write, `seconds` for all processes together."""

    tokens: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.bytes / 1e9:.2f} GB of disk, about {self.seconds / 60:.1f} minutes"


def shards_of(rows: TokenRows, shard_rows: int) -> list[np.ndarray]:
    """Row numbers of every shard."""
    return [np.arange(start, min(start + shard_rows, len(rows.starts))) for start in range(0, len(rows.starts), shard_rows)]


def is_finished(path: Path) -> bool:
    """Whether a shard is on disk and whole; a damaged one is made again."""
    if not path.exists():
        return False
    try:
        read_lengths(path)
    except CatsError:
        return False
    return True


def bytes_of(tokens: int, rows: int, width: int, exits: int, dtype: torch.dtype, targets: int = 0) -> int:
    """Size of stored rows: states of every exit and of the last layer, an int32 id and a mask byte per token, an int64 length per row.

    In the place of the last layer's states there may be `targets` tokens, an int32 and a float16 each.
    """
    state = width * dtype.itemsize
    return tokens * (exits * state + (6 * targets or state) + 5) + 8 * rows


def estimate(source: TextSource, open_shards: list[np.ndarray], dtype: torch.dtype, targets: int, processes: int) -> Estimate:
    """Tokens, bytes and seconds of the shards still to be made; the time comes from one forward of one row."""
    tokens = sum(int(source.rows.lengths[rows].sum()) for rows in open_shards)
    count = sum(len(rows) for rows in open_shards)
    size = bytes_of(tokens, count, source.base.config.hidden_size, len(source.exits), dtype, targets)
    if not open_shards:
        return Estimate(0, 0, 0.0)
    trial = open_shards[0][:1]
    source.batch(trial)  # the first forward also pays for warming up
    started = time.monotonic()
    float(next(iter(source.batch(trial).hidden.values())).sum())
    rate = int(source.rows.lengths[trial].sum()) / max(1e-9, time.monotonic() - started)
    return Estimate(tokens, size, tokens / rate / processes)


def check_disk(directory: Path, needed: int) -> None:
    """Raise `CatsError` where the disk under `directory` has less than the needed bytes free."""
    free = shutil.disk_usage(directory).free
    if needed * 1.02 > free:
        raise CatsError(
            f"the states need {needed / 1e9:.2f} GB, but the disk of {directory} has {free / 1e9:.2f} GB free; "
            "choose another --outdir, fewer conversations (--end), fewer exits, or train on the fly, which stores nothing."
        )


def make_shards(source: TextSource, arguments: argparse.Namespace, accelerator: Accelerator, directory: Path) -> None:
    """Estimate, refuse or write this process's share of the shards."""
    dtype = DTYPES[arguments.store_dtype]
    shards = shards_of(source.rows, arguments.shard_rows)
    with heartbeat("estimate", accelerator.is_main_process):
        open_numbers = [number for number in range(len(shards)) if not is_finished(shard_path(directory, number))]
        needed = estimate(source, [shards[number] for number in open_numbers], dtype, arguments.targets, accelerator.num_processes)
    if accelerator.is_main_process:
        done = len(shards) - len(open_numbers)
        print(f"{len(source):,} rows in {len(shards):,} shards ({done:,} finished); still needed: {needed}", flush=True)
    check_disk(directory, needed.bytes)
    accelerator.wait_for_everyone()
    if arguments.dry_run:
        return
    mine = open_numbers[accelerator.process_index :: accelerator.num_processes]
    for number in live_bar(mine, desc="store states", unit="shard", disable=not accelerator.is_main_process):
        batch = source.batch(shards[number])
        if arguments.targets:
            batch = with_best_tokens(batch, source.base.target_logits, arguments.targets)
        write_shard(shard_path(directory, number), source.rows, shards[number], batch, dtype)
    accelerator.wait_for_everyone()


def check_arguments(arguments: argparse.Namespace, layers: int) -> None:
    """Refuse contradictions before anything is loaded or written."""
    if arguments.text_only and not arguments.regenerate:
        raise CatsError("--text-only stores nothing unless --regenerate writes new answers; give both or neither.")
    if arguments.targets < 0:
        raise CatsError(f"--targets {arguments.targets} must be 0 (store final states) or the number of tokens to keep, 20 for example.")
    if arguments.shard_rows < 1 or arguments.length < 2:
        raise CatsError(f"--shard-rows {arguments.shard_rows} must be at least 1 and --length {arguments.length} at least 2.")
    if min(arguments.exit_layers) < 1 or max(arguments.exit_layers) >= layers:
        raise CatsError(f"--exit-layers {arguments.exit_layers} must lie between 1 and {layers - 1}, since the base has {layers} layers.")


def chosen_conversations(arguments: argparse.Namespace) -> list[Conversation]:
    """Conversations `[start, end)` of the data file."""
    chats = read_sharegpt(arguments.data_path)[arguments.start : arguments.end]
    if not chats:
        raise CatsError(f"--start {arguments.start} --end {arguments.end} leaves no conversation of {arguments.data_path}.")
    return chats


def provenance(arguments: argparse.Namespace, base: EarlyExitLlamaForCausalLM) -> dict[str, object]:
    """What states or answers are made from; a second run in the same folder must agree."""
    names = ["start", "end", "template"]
    if arguments.regenerate:
        names += ["max_new_tokens", "temperature", "top_p", "seed"]
    settings = {name: getattr(arguments, name) for name in names}
    model = {"model": arguments.model_path.name, "layers": base.layer_count, "width": base.config.hidden_size}
    model["base_dtype"] = str(base.dtype)
    if base.weight_dtype != base.dtype:
        model["held_dtype"] = str(base.weight_dtype)
    return model | {"data_sha256": hash_of_data(arguments.data_path), "regenerate": arguments.regenerate} | settings


def states_description(arguments: argparse.Namespace, base: EarlyExitLlamaForCausalLM) -> dict[str, object]:
    """What the shards are made from, as `states.json` keeps it."""
    names = ("length", "rows_from", "every_token", "shard_rows", "store_dtype")
    chosen = {"exits": sorted(set(arguments.exit_layers))} | ({"targets": arguments.targets} if arguments.targets else {})
    return provenance(arguments, base) | {name: getattr(arguments, name) for name in names} | chosen


def own_answers(
    base: EarlyExitLlamaForCausalLM, arguments: argparse.Namespace, accelerator: Accelerator, directory: Path
) -> list[Conversation]:
    """The chosen conversations with answers by the base model, also written to `regenerated.json` in ShareGPT format."""
    chats, text = chosen_conversations(arguments), training_text(arguments.model_path, arguments.template)
    agree(directory / "answers.json", provenance(arguments, base), accelerator.is_main_process)
    settings = Regeneration(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.seed, arguments.answer_rows)
    answerer = Answerer(cats.MultiAdapterCATSModel(base), text, settings)
    accelerator.wait_for_everyone()
    regenerate(answerer, chats, directory, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(directory / RESULT, collect(directory, len(chats)))
    accelerator.wait_for_everyone()
    return read_sharegpt(directory / RESULT)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    arguments = arguments_parser().parse_args(argv)
    arguments.model_path = model_path_of(arguments.model_path)
    check_arguments(arguments, read_config(arguments.model_path).num_hidden_layers)
    accelerator = Accelerator(cpu=arguments.cpu)
    device = base_device(accelerator, arguments.gpu_index)
    directory = Path(arguments.outdir) / str(arguments.index)
    directory.mkdir(parents=True, exist_ok=True)
    base = load_base(arguments.model_path, arguments.dtype, device, arguments.length, arguments.compute_dtype)
    chats = own_answers(base, arguments, accelerator, directory) if arguments.regenerate else chosen_conversations(arguments)
    if arguments.text_only:
        return
    tokens = encode_chats(training_text(arguments.model_path, arguments.template), chats, base.context)
    rows = token_rows(tokens, arguments.length, arguments.rows_from == "packed", arguments.every_token)
    agree(directory / DESCRIPTION, states_description(arguments, base), accelerator.is_main_process)
    make_shards(TextSource(rows, base, sorted(set(arguments.exit_layers))), arguments, accelerator, directory)


if __name__ == "__main__":
    main()
