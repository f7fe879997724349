"""Tensors on disk: which file holds which name, reading them safely, and putting them into a module strictly.

Knows the two published layouts (safetensors, `pytorch_model.bin`), each as one file or as shards with an index.
Pickles are read with `weights_only`, so a checkpoint cannot run code. `locate_tensors` says where each tensor's bytes lie,
for readers that fetch them piece by piece.
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from cats.errors import CatsError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NESTED_INDEX = "nested.safetensors.index.json"
"""Of nested checkpoints (docs/nested.md), under a name that transformers does not look for: it would load what it found at random."""
CONFIG_FAULTS = (OSError, ValueError, TypeError, AttributeError, KeyError, StrictDataclassError)
"""What transformers raises on a configuration that it cannot use."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a safetensors header calls them."""
LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer ones too."""


UNUSED_ENTRIES = ("rotary_emb.inv_freq",)
"""Ends of names that old checkpoints store and nobody needs."""


class TensorForm(NamedTuple):
    """What a tensor on the disk is, whatever the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: `nbytes` bytes from byte `offset` of the file `path`, row by row, little endian."""

    path: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


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
    for single, index in (("", NESTED_INDEX), *zip(SINGLE_FILES, INDEX_FILES, strict=True)):
        if (directory / index).exists():
            shards = sorted(set(read_index(directory / index).values()))
            for shard in shards:
                if not (directory / shard).exists():
                    raise CatsError(f"{directory / index} names the shard {shard}, which is not there; fetch the checkpoint again.")
            return [directory / shard for shard in shards]
        if single and (directory / single).exists():
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
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CatsError(f"{path} names the shard {shard!r}, which is no file inside its directory; fetch the checkpoint again.")
    return weight_map


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of one `.bin` file, on the CPU, as stored; mapped into memory, not read, where the file is of today's zip form."""
    try:
        tensors: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return tensors
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CatsError(
            f"cannot read the weights in {path}: {str(error).splitlines()[0]}; the file is damaged or cut short, fetch it again."
        ) from error


def each_tensor(directory: str | Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor as stored, on the CPU) of every wanted tensor of a checkpoint directory, one after the other.

    What was yielded may share memory with its file: copy what is to stay. Of pickles one shard at a time is in memory.
    """
    for path in weight_files(directory):
        if path.suffix == ".safetensors":
            yield from _each_of_safetensors(path, wanted)
        else:
            yield from ((name, tensor) for name, tensor in read_pickle(path).items() if wanted(name))


def _each_of_safetensors(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if wanted(name):
                    yield name, file.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def read_tensor(directory: str | Path, name: str) -> torch.Tensor:
    """One tensor of a checkpoint directory, without reading the others where the format allows it."""
    for _, tensor in each_tensor(directory, lambda other: other == name):
        return tensor
    raise CatsError(f"the checkpoint in {directory} has no tensor {name}.")


def tensor_forms(directory: str | Path) -> dict[str, TensorForm]:
    """Tensor name -> dtype and shape as stored; safetensors are not read for it, pickles shard by shard."""
    forms: dict[str, TensorForm] = {}
    for path in weight_files(directory):
        entries: Mapping[str, Any] = _places_in(path) if path.suffix == ".safetensors" else read_pickle(path)
        forms |= {name: TensorForm(entry.dtype, tuple(entry.shape)) for name, entry in entries.items()}
    return forms


def locate_tensors(directory: str | Path) -> dict[str, TensorPlace]:
    """Tensor name -> its place on the disk, from the headers of the safetensors files of a checkpoint directory.

    Raises:
        CatsError: for pickles, whose tensors have no fixed place, and for headers that are damaged or disagree with the file's size.
    """
    places: dict[str, TensorPlace] = {}
    for path in weight_files(directory):
        if path.suffix != ".safetensors":
            raise CatsError(f"the weights in {path} are a pickle, which cannot be streamed; save the checkpoint as safetensors.")
        places.update(_places_in(path))
    return places


def _places_in(path: Path) -> dict[str, TensorPlace]:
    """The header of one safetensors file (8 bytes of length, then JSON), checked against itself and the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, "it is cut short, or its header is longer than the file")
        if length > LONGEST_HEADER:
            raise _damaged(path, f"its header claims {length} bytes, more than any real one has")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _damaged(path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no mapping")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry, 8 + length, size) for name, entry in header.items()}
    for before, after in pairwise(sorted(places, key=lambda name: (places[name].offset, places[name].nbytes))):
        if places[before].offset + places[before].nbytes > places[after].offset:
            raise _damaged(path, f"the tensors {before} and {after} overlap")
    return places


def _place(path: Path, name: str, entry: Any, data: int, size: int) -> TensorPlace:
    """One entry of a header; `data` is where the tensors begin, `size` where the file ends."""
    try:
        stored, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header does not describe the tensor {name}") from error
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise _damaged(path, f"its header does not describe the tensor {name}")
    if not isinstance(stored, str) or stored not in STORED_DTYPES:
        raise CatsError(f"the tensor {name} in {path} has the dtype {stored!r}; known are {', '.join(STORED_DTYPES)}.")
    dtype = STORED_DTYPES[stored]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"the bytes of the tensor {name} do not fit its shape {list(shape)} of {stored}")
    if data + end > size:
        raise _damaged(path, f"it is cut short, the tensor {name} ends at byte {data + end} of {size}")
    return TensorPlace(path, data + begin, end - begin, dtype, shape)


def _damaged(path: Path, fault: str) -> CatsError:
    return CatsError(f"cannot read the weights in {path}: {fault}; the file is damaged, fetch it again.")


def check_tensors(
    wanted: Mapping[str, torch.Size], shapes: Mapping[str, Sequence[int]], what: str, ignored: Iterable[str] = ()
) -> list[str]:
    """The names of `shapes` that a module with the parameters `wanted` takes; the first missing, extra or mis-shaped one raises.

    Args:
        ignored: suffixes of names that old checkpoints store and nobody needs.
    """
    names = [name for name in shapes if not name.endswith(tuple(ignored))]
    missing, extra = sorted(wanted.keys() - set(names)), sorted(set(names) - wanted.keys())
    if missing:
        raise CatsError(
            f"{what} lacks the tensor {missing[0]} ({len(missing)} missing in all); it is not a checkpoint of this architecture."
        )
    if extra:
        raise CatsError(f"{what} has a tensor {extra[0]} that the architecture does not know ({len(extra)} extra in all).")
    for name in names:
        if tuple(shapes[name]) != tuple(wanted[name]):
            raise CatsError(f"{what}: {name} has shape {list(shapes[name])}, but the configuration asks for {list(wanted[name])}.")
    return names


def load_strictly(
    module: nn.Module,
    directory: str | Path,
    forms: Mapping[str, TensorForm],
    what: str,
    place: Callable[[torch.Tensor], torch.Tensor],
    tied: Mapping[str, str] | None = None,
) -> None:
    """Fill `module` (built on the meta device) from a checkpoint, one tensor after the other.

    Memory holds the module, and one shard that is being read. What does not fit raises as `check_tensors` says, before anything is read.

    Args:
        forms: see `tensor_forms`.
        place: makes the copy that stays.
        tied: parameter -> the one whose tensor it shares.
    """
    tied = tied or {}
    shapes = {name: form.shape for name, form in forms.items()}
    shapes |= {name: shapes[other] for name, other in tied.items() if other in shapes}
    names = set(check_tensors({name: tensor.shape for name, tensor in module.state_dict().items()}, shapes, what, UNUSED_ENTRIES))
    for name, tensor in each_tensor(directory, lambda name: name in names and name not in tied):
        owner, _, parameter = name.rpartition(".")
        setattr(module.get_submodule(owner), parameter, nn.Parameter(place(tensor), requires_grad=False))
    for name, other in tied.items():
        owner, _, parameter = name.rpartition(".")
        setattr(module.get_submodule(owner), parameter, module.get_parameter(other))
