"""Tensors on disk: which file holds which name, reading them safely, and putting them into a module strictly.

Knows the two published layouts (safetensors, `pytorch_model.bin`), each as one file or as shards with an index.
Pickles are read with `weights_only`, so a checkpoint cannot run code.
"""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn

from cats.errors import CatsError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
CONFIG_FAULTS = (OSError, ValueError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises on a configuration that it cannot use."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def parse_dtype(name: str, stored: torch.dtype | None = None) -> torch.dtype:
    """The torch dtype of `name`; "auto" is the dtype that the checkpoint names (float32 where it names none)."""
    if name == "auto":
        return stored or torch.float32
    if name not in DTYPES:
        raise CatsError(f"unknown dtype {name!r}; choose one of {', '.join(DTYPES)} or auto.")
    return DTYPES[name]


def weight_files(directory: str | Path) -> list[Path]:
    """The files that hold the weights of `directory`, safetensors before pickles, every shard that the index names."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CatsError(f"there is no directory {directory}; give the path of a checkpoint directory.")
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (directory / index).exists():
            shards = sorted(set(read_index(directory / index).values()))
            for shard in shards:
                if not (directory / shard).exists():
                    raise CatsError(f"{directory / index} names the shard {shard}, which is not there; fetch the checkpoint again.")
            return [directory / shard for shard in shards]
        if (directory / single).exists():
            return [directory / single]
    raise CatsError(f"{directory} holds no weights; expected {SINGLE_FILES[0]}, {SINGLE_FILES[1]} or their sharded form with an index.")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from a `*.index.json`."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CatsError(f"{path} is not a shard index (no readable 'weight_map'); fetch the checkpoint again.") from error
    if not isinstance(weight_map, dict):
        raise CatsError(f"{path} is not a shard index ('weight_map' is no mapping); fetch the checkpoint again.")
    return weight_map


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one weight file, on the CPU, as stored."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CatsError(
            f"cannot read the weights in {path}: {str(error).splitlines()[0]}; the file is damaged or cut short, fetch it again."
        ) from error


def read_tensors(directory: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, on the CPU, as stored."""
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        tensors.update(read_file(path))
    return tensors


def read_tensor(directory: str | Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint directory, without reading the others where the format allows it."""
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    if name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                        return file.get_tensor(name)
            except safetensors.SafetensorError as error:
                raise CatsError(f"cannot read the weights in {path}: {error}; the file is damaged or cut short, fetch it again.") from error
        elif name in (tensors := read_file(path)):
            return tensors[name]
    raise CatsError(f"the checkpoint in {directory} has no tensor {name}.")


def load_strictly(
    module: nn.Module, tensors: Mapping[str, torch.Tensor], what: str, dtype: torch.dtype, device: torch.device, ignored: Iterable[str] = ()
) -> None:
    """Put `tensors` into `module` (built on the meta device); any missing, extra or mis-shaped name raises, naming the first.

    Args:
        ignored: suffixes of names that old checkpoints store and nobody needs.
    """
    wanted = module.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(tuple(ignored) or ("\0",))}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise CatsError(
            f"{what} lacks the tensor {missing[0]} ({len(missing)} missing in all); it is not a checkpoint of this architecture."
        )
    if extra:
        raise CatsError(f"{what} has a tensor {extra[0]} that the architecture does not know ({len(extra)} extra in all).")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CatsError(f"{what}: {name} has shape {list(tensor.shape)}, but the configuration asks for {list(wanted[name].shape)}.")
    placed = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in tensors.items()}
    module.load_state_dict(placed, strict=True, assign=True)
    module.requires_grad_(False)
