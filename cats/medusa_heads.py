"""Medusa's heads (Cai et al. 2024) on disk and in memory: each predicts a token further ahead from the base's last hidden state.

    y_k = x + SiLU(W_k x)          x is the state that enters the base's lm_head, after the final norm
    logits_k = lm_head(y_k)        the base's own head; or one of the head's own, which starts as a copy of it

The base's own prediction at x is the next token; head k (from 1) predicts the token k places after that one.
A directory of heads holds `config.json`, `model.safetensors` (`heads.<k-1>.weight` [D, D], of own heads also
`lm_heads.<k-1>.weight` [V, D]) and, where they were measured, `accuracy.json`.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from cats.checkpoint import load_strictly, tensor_forms
from cats.dtypes import is_exact
from cats.errors import CatsError
from cats.files import write_atomically
from cats.linear import WorkSpace, replace_projections

CONFIG, ACCURACY = "config.json", "accuracy.json"


@dataclass(frozen=True)
class HeadsShape:
    """How many heads there are, the width D and the vocabulary V that they belong to, and whether each has an lm_head of its own.

    Heads that share the base's lm_head may leave V out (None): they fit any.
    """

    heads: int
    hidden_size: int
    vocab_size: int | None
    own_head: bool = False


class MedusaHeads(nn.Module):
    """K heads; new ones predict what the base predicts next, as every W is zero. Fill `lm_heads` before use where there are any."""

    def __init__(self, shape: HeadsShape):
        super().__init__()
        self.shape = shape
        width, count = shape.hidden_size, shape.heads
        self.heads = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))
        own = count if shape.own_head else 0
        self.lm_heads = nn.ModuleList(nn.Linear(width, shape.vocab_size or 0, bias=False) for _ in range(own))
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, as resident."""
        return sum(weight.nbytes for weight in self.parameters())

    def states(self, place: int, x_PD: torch.Tensor) -> torch.Tensor:
        """What the head at `place` (from 0) gives to the lm_head. Shape [.., D]."""
        return x_PD + functional.silu(self.heads[place](x_PD))

    def logits(self, x_1D: torch.Tensor, count: int, lm_head: nn.Module) -> torch.Tensor:
        """Logits [count, V] of the first heads at one state."""
        states_KD = torch.cat([self.states(place, x_1D) for place in range(count)])
        if not self.shape.own_head:
            logits_KV: torch.Tensor = lm_head(states_KD)
            return logits_KV
        return torch.cat([self.lm_heads[place](states_KD[place : place + 1]) for place in range(count)])

    def compute_in(self, dtype: torch.dtype, device: torch.device, work: WorkSpace) -> None:
        """Make the arithmetic `dtype`, as the base's is; weights stay as they are, unless `dtype` would round them in every product."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device, parameter.dtype if is_exact(parameter.dtype, dtype) else dtype)
        replace_projections(self, work)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "MedusaHeads":
        """The heads of a directory, as they are stored; damaged ones raise `CatsError`."""
        shape = read_shape(directory)
        with torch.device("meta"):
            made = cls(shape)
        load_strictly(made, directory, tensor_forms(directory), f"the set of heads in {directory}", torch.clone)
        return made.eval()

    def save_pretrained(self, directory: str | Path, dtype: torch.dtype) -> None:
        """Write `config.json` and `model.safetensors`, each atomically."""
        directory = Path(directory)
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(directory / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))
        fields = {"model_type": "medusa_heads"} | asdict(self.shape) | {"dtype": str(dtype).removeprefix("torch.")}
        write_atomically(directory / CONFIG, lambda part: part.write_text(json.dumps(fields, indent=1) + "\n"))


def read_shape(directory: str | Path) -> HeadsShape:
    """The shape that `config.json` in a directory of heads names."""
    path = Path(directory) / CONFIG
    content = _read_json(path)
    fields = content if isinstance(content, dict) else {}
    heads, width, vocabulary = (fields.get(name) for name in ("heads", "hidden_size", "vocab_size"))
    own = fields.get("own_head") is True
    if not (is_count(heads) and is_count(width) and (is_count(vocabulary) or (vocabulary is None and not own))):
        raise CatsError(
            f"{path} does not give heads, hidden_size and vocab_size as whole numbers; training/train_heads.py writes such a file."
        )
    return HeadsShape(heads, width, vocabulary, own)


def is_count(number: object) -> TypeGuard[int]:
    """Whether this is a whole number above 0."""
    return type(number) is int and number > 0


def save_accuracy(directory: str | Path, accuracy: list[list[float]], positions: list[int]) -> None:
    """Write `accuracy.json`: of every head, how often its first, second, .. guess was the token, and at how many positions it was seen."""
    path, content = Path(directory) / ACCURACY, {"accuracy": accuracy, "positions": positions}
    write_atomically(path, lambda part: part.write_text(json.dumps(content) + "\n"))


def stored_bytes(directory: str | Path) -> int:
    """Bytes of the heads' weights, as they are stored and will be resident."""
    return sum(form.dtype.itemsize * math.prod(form.shape) for form in tensor_forms(directory).values())


def read_accuracy(directory: str | Path, heads: int) -> list[list[float]] | None:
    """Of every head, the share of held-out positions at which its guess of rank 1, 2, .. was right; None where nothing is stored."""
    path = Path(directory) / ACCURACY
    if not path.exists():
        return None
    content = _read_json(path)
    table = content.get("accuracy") if isinstance(content, dict) else None
    fits = isinstance(table, list) and len(table) == heads and all(isinstance(row, list) and row for row in table)
    if not fits or not all(isinstance(share, int | float) and 0 <= share <= 1 for row in table or () for share in row):
        raise CatsError(f"{path} must give each of the {heads} heads a list of shares between 0 and 1; delete it to use the default tree.")
    return table


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}: {error}; a directory of Medusa heads holds config.json beside model.safetensors.") from error
