"""Train the small chat model in data/tiny, a fixture of the tests: tokenizer, corpus, model, export and provenance, in one command.

The model is a plain `LlamaForCausalLM`, so everything that loads a Llama checkpoint loads it. Matrices are trained by
Muon, the rest by AdamW; the learning rate is constant, then falls linearly to zero over the last part of the run
(warm-up, stable, decay). A run is bounded by tokens or by hours, whichever ends first, and the schedule follows
whichever is closer to its end, so a run that is cut short still ends on an annealed model. The last part of the
run uses sequences of the full context, so that positions past the short training length are learnt.

    python -m training.train_tiny --corpus sharegpt_mix.json.gz --heldout heldout.json.gz --work-dir runs/tiny --hours 1.2
"""

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cats.cli.command import CommandParser, exit_with_sentence
from cats.cli.progress import heartbeat, live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from cats.text import VICUNA, render
from training.conversations import read_sharegpt
from training.muon import Muon

SPECIALS = ("<unk>", "<s>", "</s>")
# Words with their leading space, digits one at a time (sums are then learnable), runs of marks, runs of spaces (code).
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]{1,4}|\s*\n+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TinyRun:
    """Everything that decides a training run."""

    corpus: str
    heldout: str
    work_dir: str
    hours: float
    tokens: int
    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    context: int
    sequence: int
    batch_tokens: int
    long_share: float
    decay_share: float
    muon_lr: float
    adam_lr: float
    threads: int
    seed: int
    compile: bool


def train_tokenizer(texts: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab` entries with `<s>` in front and the Vicuna v1.1 chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}" + VICUNA,
    )


def encode_corpus(tokenizer: PreTrainedTokenizerFast, texts: list[str], path: Path) -> np.ndarray:
    """All texts as one stream of uint16 ids, each starting with `<s>`; kept at `path` for the next run."""
    if not path.exists():
        pieces: list[np.ndarray] = []
        for start in live_bar(range(0, len(texts), 2000), desc="tokenize", unit="batch"):
            batch = tokenizer.backend_tokenizer.encode_batch(texts[start : start + 2000])
            pieces.extend(np.asarray(encoding.ids, dtype=np.uint16) for encoding in batch)
        write_atomically(path, partial(save_array, np.concatenate(pieces)))
    stream: np.ndarray = np.load(path, mmap_mode="r")
    return stream


def save_array(array: np.ndarray, path: Path) -> None:
    """Write an array under exactly this name (numpy would append .npy)."""
    with path.open("wb") as file:
        np.save(file, array)


def build_model(run: TinyRun) -> LlamaForCausalLM:
    """A Llama of the run's shape; residual outputs start at zero, so every layer starts as the identity."""
    config = LlamaConfig(
        vocab_size=run.vocab,
        hidden_size=run.width,
        intermediate_size=run.mlp,
        num_hidden_layers=run.layers,
        num_attention_heads=run.heads,
        num_key_value_heads=run.kv_heads,
        max_position_embeddings=run.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def build_optimizers(model: LlamaForCausalLM, run: TinyRun) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    muon = Muon(matrices, lr=run.muon_lr, weight_decay=0.02)
    adam = torch.optim.AdamW(others, lr=run.adam_lr, betas=(0.9, 0.97), weight_decay=0.0)
    return [muon, adam]


def lr_scale(progress: float, step: int, decay_share: float) -> float:
    """Warm-up over 40 steps, then 1, then linear to 0 over the last `decay_share` of the run."""
    return min(1.0, (step + 1) / 40) * min(1.0, (1 - progress) / decay_share)


def batch_at(stream: np.ndarray, position: int, rows: int, length: int) -> torch.Tensor:
    """`rows` consecutive windows of `length + 1` ids, starting at `position` and wrapping around. Shape [rows, length + 1]."""
    starts = (position + np.arange(rows) * length) % (len(stream) - length - 1)
    return torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64))


def mean_nll(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of ids[:, 1:] given ids[:, :-1]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def heldout_bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int) -> float:
    """Total bits of the rendered conversations (first `context` tokens of each) over their UTF-8 bytes."""
    bits = size = 0.0
    for text in live_bar(texts, desc="held-out", unit="conversation"):
        encoding = tokenizer(text, truncation=True, max_length=context, return_offsets_mapping=True)
        ids = torch.tensor([encoding["input_ids"]])
        bits += float(mean_nll(model, ids)) * (ids.shape[1] - 1) / math.log(2)
        size += len(text[: encoding["offset_mapping"][-1][1]].encode())
    return bits / size


class Trainer:
    """One resumable run: stream position, model, optimizers, clock."""

    def __init__(self, run: TinyRun, stream: np.ndarray):
        self.run, self.stream = run, stream
        self.model = build_model(run)
        self.optimizers = build_optimizers(self.model, run)
        self.step, self.seen, self.seconds = 0, 0, 0.0
        self.path = Path(run.work_dir) / "checkpoint.pt"
        if self.path.exists():
            self.load()

    def load(self) -> None:
        """Continue from `checkpoint.pt`."""
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seen, self.seconds = state["step"], state["seen"], state["seconds"]

    def save(self) -> None:
        """Write everything the next step depends on, atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seen": self.seen,
            "seconds": self.seconds,
        }
        write_atomically(self.path, lambda part: torch.save(state, part))

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end, by tokens or by hours, whichever is further."""
        return min(1.0, max(self.seen / self.run.tokens, self.seconds / 3600 / self.run.hours))

    def train(self) -> None:
        """Train to the end of the run; checkpoints every three minutes."""
        run, forward = self.run, torch.compile(mean_nll) if self.run.compile else mean_nll
        bar = live_bar(total=run.tokens, initial=self.seen, unit="tok", unit_scale=True, mininterval=10)
        average, saved_at = None, time.monotonic()
        while self.progress < 1.0:
            started = time.monotonic()
            length = run.context if self.progress > 1 - run.long_share else run.sequence
            rows = max(1, run.batch_tokens // length)
            loss = forward(self.model, batch_at(self.stream, self.seen, rows, length))
            loss.backward()
            self.update()
            self.step, self.seen = self.step + 1, self.seen + rows * length
            self.seconds += time.monotonic() - started
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.update(rows * length)
            bar.set_postfix(loss=f"{average:.3f}", progress=f"{self.progress:.2f}", length=length)
            if time.monotonic() - saved_at > 180:
                self.save()
                saved_at = time.monotonic()
        bar.close()
        self.save()

    def update(self) -> None:
        """Clip, then step both optimizers at the current learning rate; gradients that are not finite are dropped."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = lr_scale(self.progress, self.step, self.run.decay_share)
        for optimizer, peak in zip(self.optimizers, (self.run.muon_lr, self.run.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, heldout: list[str], out: Path) -> None:
    """Write the bf16 checkpoint, the tokenizer and PROVENANCE.json to `out`."""
    run, model = trainer.run, trainer.model
    stored: Any = LlamaForCausalLM(model.config)
    stored.bfloat16()
    stored.load_state_dict(model.state_dict())
    stored.save_pretrained(out)
    bits = heldout_bits_per_byte(stored.float(), tokenizer, heldout, run.context)
    tokenizer.save_pretrained(out)
    hashes = {name: sha256(out / name) for name in ("model.safetensors", "tokenizer.json")}
    provenance = {
        "what": "Llama-architecture chat model trained from scratch: a fixture of tests and continuous integration",
        "licence": "research only: part of the training text is non-commercial (CC BY-NC) or written by commercial models",
        "data": {"corpus_sha256": sha256(Path(run.corpus)), "heldout_sha256": sha256(Path(run.heldout)), "template": "vicuna_v1.1"},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_seen": trainer.seen,
        "optimizer_steps": trainer.step,
        "hours": round(trainer.seconds / 3600, 3),
        "machine": f"{os.cpu_count()} x {platform.machine()} CPU cores, torch {torch.__version__}, float32",
        "heldout_bits_per_byte": round(bits, 4),
        "heldout_rule": "bits of all tokens of the rendered conversations, cut at the context, over their UTF-8 bytes; weights in bf16",
        "heldout_conversations": len(heldout),
        "run": {**asdict(run), "corpus": Path(run.corpus).name, "heldout": Path(run.heldout).name, "work_dir": ""},
        "sha256": hashes,
    }
    write_atomically(out / "PROVENANCE.json", lambda part: part.write_text(json.dumps(provenance, indent=1) + "\n"))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="training conversations, ShareGPT .json or .json.gz")
    parser.add_argument("--heldout", required=True, help="held-out conversations in the same format")
    parser.add_argument("--work-dir", required=True, help="token stream and checkpoints; a second run resumes from here")
    parser.add_argument("--out", default="data/tiny", help="where the finished checkpoint goes")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--sequence", type=int, default=256, help="training length of the first part of the run")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--long-share", type=float, default=0.12, help="last share of the run, at the full context length")
    parser.add_argument("--decay-share", type=float, default=0.5)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--export-only", action="store_true", help="write the newest checkpoint to --out and stop")
    return parser.parse_args(argv)


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Tokenizer, corpus, training, export; each part is taken up where an earlier run left it."""
    arguments = vars(parse_arguments(argv))
    out, export_only = Path(arguments.pop("out")), arguments.pop("export_only")
    run = TinyRun(**arguments)
    torch.set_num_threads(run.threads)
    work = Path(run.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    if run.width % run.heads or run.heads % run.kv_heads:
        raise CatsError(f"width {run.width} must divide by heads {run.heads}, and heads by kv-heads {run.kv_heads}.")
    chats, held = read_sharegpt(run.corpus), read_sharegpt(run.heldout)
    with heartbeat("render conversations"):
        heldout, texts = ([render(VICUNA, chat.messages) for chat in part] for part in (held, chats))
    if not (work / "tokenizer").exists():
        with heartbeat("train the tokenizer"):
            train_tokenizer(texts[::4], run.vocab, run.context).save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    trainer = Trainer(run, encode_corpus(tokenizer, texts, work / "stream.npy"))
    if not export_only:
        trainer.train()
    export(trainer, tokenizer, heldout, out)


if __name__ == "__main__":
    main()
