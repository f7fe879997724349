"""Hidden states on disk: numbered safetensors shards of rows, and a `RowSource` over them. Knows no model.

A shard holds R rows end to end: `lengths` [R], `counted` [tokens] (uint8), `ids` [tokens] (int32), `hidden_<exit>` and
`final` [tokens, D] in half precision, or in the place of `final` the base's K most likely tokens: `best_indices`
[tokens, K] (int32) and `best_probabilities` [tokens, K] (float16), zeros where no counted token is predicted. Beside the
shards, `states.json` says what they were made from. Shards of several folders under one root (several `--index` runs) are
read in the order of their paths.
"""

import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from cats.cli.progress import live_bar
from cats.errors import CatsError
from cats.files import write_atomically
from training.dataset import Batch, BestTokens, TokenRows
from training.losses import predicting_positions
from training.provenance import read_json

DESCRIPTION = "states.json"
OPEN_SHARDS = 32
POSITIONS_AT_ONCE = 512
"""Positions whose logits over the whole vocabulary are in memory together."""


def shard_path(directory: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return directory / f"states_{number:06d}.safetensors"


def write_shard(path: Path, rows: TokenRows, chosen: np.ndarray, batch: Batch, dtype: torch.dtype) -> None:
    """Write the chosen rows with their states, atomically; values beyond the range of `dtype` raise `CatsError`."""
    lengths = rows.lengths[chosen]
    ids_BN, counted_BN = rows.padded(chosen)
    real_BN = torch.arange(ids_BN.shape[1]) < torch.from_numpy(lengths)[:, None]
    states = {f"hidden_{exit_layer}": hidden for exit_layer, hidden in batch.hidden.items()}
    if batch.final is not None:
        states["final"] = batch.final
    tensors = {name: state[real_BN.to(state.device)].to("cpu", dtype).contiguous() for name, state in states.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CatsError(f"{name} has values that {dtype} cannot hold; give --store-dtype bfloat16.")
    if batch.best is not None:
        tensors["best_probabilities"] = batch.best.probabilities[real_BN].to("cpu", torch.float16)
        tensors["best_indices"] = batch.best.indices[real_BN].to("cpu", torch.int32)
    tensors |= {"ids": ids_BN[real_BN].to(torch.int32), "counted": counted_BN[real_BN].to(torch.uint8)}
    tensors["lengths"] = torch.from_numpy(lengths)
    write_atomically(path, lambda part: save_file(tensors, part))


def with_best_tokens(batch: Batch, logits_of: Callable[[torch.Tensor], torch.Tensor], count: int) -> Batch:
    """The batch with the base's `count` best tokens, where a counted token is predicted, in the place of its final states.

    Args:
        logits_of: final states [P, D] -> the base's logits [P, V].
    """
    if batch.final is None:
        raise ValueError("the batch has no final states")
    predicting_BN = predicting_positions(batch.counted_BN)
    probabilities = batch.final.new_zeros((*predicting_BN.shape, count), dtype=torch.float32)
    indices = torch.zeros_like(probabilities, dtype=torch.int64)
    best = [logits_of(piece_PD).float().softmax(-1).topk(count, dim=-1) for piece_PD in batch.final[predicting_BN].split(POSITIONS_AT_ONCE)]
    if best:
        probabilities[predicting_BN] = torch.cat([piece.values for piece in best])
        indices[predicting_BN] = torch.cat([piece.indices for piece in best])
    return Batch(batch.hidden, None, batch.counted_BN, BestTokens(probabilities, indices))


def read_lengths(path: Path) -> np.ndarray:
    """Row lengths of a shard; a damaged shard raises `CatsError` that names it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.get_tensor("lengths").numpy()
    except (safetensors.SafetensorError, OSError) as error:
        raise CatsError(f"the shard {path} is damaged or cut short ({error}); delete it and run ge_data again.") from error


class StoredSource:
    """Rows of all shards under `root`, each cut at `length` tokens."""

    def __init__(self, root: str | Path, exits: tuple[int, ...], length: int, device: torch.device):
        self.root, self.exits, self.length, self.device = Path(root), exits, length, device
        self.paths = sorted(self.root.rglob("states_*.safetensors"))
        if not self.paths:
            raise CatsError(f"there are no stored states under {root}; run training/ge_data.py with --outdir {root} first.")
        with live_bar(self.paths, desc="open stored states", unit="shard", leave=False) as bar:
            lengths = [read_lengths(path) for path in bar]
        self.shard_R = np.repeat(np.arange(len(self.paths)), [len(each) for each in lengths])
        self.start_R = np.concatenate([np.cumsum(each) - each for each in lengths])
        self.length_R = np.minimum(np.concatenate(lengths), length)
        self.rows = np.arange(len(self.shard_R))
        self._open: OrderedDict[int, Any] = OrderedDict()
        self.has_best = "best_indices" in self._shard(0).keys()  # noqa: SIM118 - safe_open is no mapping

    @property
    def lengths(self) -> np.ndarray:
        """See `RowSource`."""
        return np.asarray(self.length_R[self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows: np.ndarray) -> "StoredSource":
        """The same shards, and of their rows those with these numbers."""
        other = copy.copy(self)
        other.rows, other._open = self.rows[rows], OrderedDict()
        return other

    def batch(self, rows: np.ndarray) -> Batch:
        """See `RowSource`; states are float32 where they were stored so, else in their half precision."""
        chosen = self.rows[rows]
        target = ("best_probabilities", "best_indices") if self.has_best else ("final",)
        names = [*(f"hidden_{exit_layer}" for exit_layer in self.exits), *target, "counted", "ids"]
        pieces = [self._read(row, names) for row in chosen]
        padded = {name: pad_sequence([piece[name] for piece in pieces], batch_first=True).to(self.device) for name in names}
        hidden = {exit_layer: padded[f"hidden_{exit_layer}"] for exit_layer in self.exits}
        best = BestTokens(padded["best_probabilities"], padded["best_indices"]) if self.has_best else None
        return Batch(hidden, padded.get("final"), padded["counted"].bool(), best, padded["ids"].long())

    def _read(self, row: int, names: list[str]) -> dict[str, torch.Tensor]:
        file, start = self._shard(int(self.shard_R[row])), int(self.start_R[row])
        return {name: file.get_slice(name)[start : start + int(self.length_R[row])] for name in names}

    def _shard(self, number: int) -> Any:
        """An open shard; the least recently used one is closed when too many are open."""
        if number not in self._open:
            self._open[number] = safetensors.safe_open(self.paths[number], framework="pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def check_states(root: str | Path, exits: tuple[int, ...], width: int) -> str:
    """Refuse stored states that lack an exit or belong to a model of another width; returns a hash that identifies them."""
    folders = sorted({path.parent for path in Path(root).rglob("states_*.safetensors")})
    digest, kinds = hashlib.sha256(), set[int]()
    for folder in folders:
        description = read_json(folder / DESCRIPTION, "training/ge_data.py")
        missing = sorted(set(exits) - set(description["exits"]))
        if missing:
            raise CatsError(f"{folder} holds states of exits {description['exits']}, not of {missing}; run ge_data with these exits.")
        if description["width"] != width:
            raise CatsError(f"{folder} holds states of width {description['width']}, but the model is {width} wide.")
        kinds.add(description.get("targets", 0))
        digest.update(json.dumps(description, sort_keys=True).encode())
    if len(kinds) > 1:
        raise CatsError(f"the folders under {root} were made with --targets {sorted(kinds)}; run ge_data with one of them for all.")
    return digest.hexdigest()
