"""Checkpoints into nested ones and back, tensor by tensor, and the proof that no bit was lost (docs/nested.md).

Tensors are read and written in blocks, so memory holds some tens of megabytes of them, whatever the model's size (of pickles of the old
kind, one shard). Work that was interrupted goes on where it was.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cats.checkpoint import INDEX_FILES, NESTED_INDEX, STORED_DTYPES, TensorForm, TensorPlace, locate_tensors, read_pickle, weight_files
from cats.config import require
from cats.errors import CatsError
from cats.families import family_of
from cats.nested import format
from cats.nested.growing import DTYPE_NAMES, ENTRY_BYTES, Making, check_free, index_of, raw, written_bytes
from cats.weight import Nested

AT_ONCE = 1 << 20
"""Numbers in a block; converting one takes about 30 bytes each."""
COARSE_FILE, RESIDUAL_FILE = "nested-coarse.safetensors", "nested-residual.safetensors"
ORIGINAL_CONFIG = "original_config.json"
ORIGINAL = "original "
"""Metadata of the coarse file: this and a name -> SHA-256, dtype, shape and file of the tensor as it was published."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".part")
Progress = Callable[[int], object]
"""Called with bytes of original tensors that are done."""


def ignored(nbytes: int) -> None:
    """No progress is shown."""


class Source:
    """The tensors of a checkpoint directory, in blocks of rows.

    Attributes:
        forms: by name.
        files: names of the files that hold them.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        paths = weight_files(directory)
        self.forms: dict[str, TensorForm] = {}
        self.files: dict[str, str] = {}
        self._places: dict[str, TensorPlace] = {}
        self._shard: tuple[Path | None, dict[str, torch.Tensor]] = (None, {})
        if paths[0].suffix == ".safetensors":
            self._places = locate_tensors(directory)
            for name, place in self._places.items():
                self.forms[name], self.files[name] = TensorForm(place.dtype, place.shape), place.path.name
        for path in paths if not self._places else ():
            for name, tensor in self._pickled(path).items():
                self.forms[name], self.files[name] = TensorForm(tensor.dtype, tuple(tensor.shape)), path.name

    def _pickled(self, path: Path) -> dict[str, torch.Tensor]:
        """A shard, of which one is in memory at a time."""
        if self._shard[0] != path:
            self._shard = (None, {})
            self._shard = (path, read_pickle(path))
        return self._shard[1]

    def nbytes(self, name: str) -> int:
        """Of a tensor."""
        return math.prod(self.forms[name].shape) * self.forms[name].dtype.itemsize

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor as matrix [rows, last dimension], in blocks of rows."""
        rows, columns = flattened(self.forms[name].shape)
        for start, stop in row_blocks(rows, columns):
            yield self.rows(name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor as a matrix."""
        rows, columns = flattened(self.forms[name].shape)
        if not self._places:
            return self._pickled(self.directory / self.files[name])[name].reshape(rows, columns)[start:stop]
        return rows_in(self._places[name], start, stop)


class NestedSource(Source):
    """The tensors that a nested checkpoint was made of.

    Attributes:
        digests: SHA-256 of each, as it was published.
    """

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.digests: dict[str, str] = {}
        for key, text in metadata_of(directory / COARSE_FILE).items():
            if key.startswith(ORIGINAL):
                digest, dtype, shape, file = text.split(" ", 3)
                name = key.removeprefix(ORIGINAL)
                self.forms[name] = TensorForm(STORED_DTYPES[dtype], tuple(int(size) for size in shape.split("x") if size))
                self.files[name], self.digests[name] = file, digest

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `Source`; put together from the parts."""
        if name in self._places:
            return super().rows(name, start, stop)
        form = self.forms[name]
        codes, low, exceptions = (self._places[f"{name}.{part}"] for part in ("codes", "residual", "exceptions"))
        listed = rows_in(exceptions, 0, 1)[0]
        format.check_exceptions(listed, form.shape, f"{name}.exceptions")
        part = format.exceptions_between(listed, form.shape[0], start, stop)
        return format.decode(rows_in(codes, start, stop), rows_in(low, start, stop), part, format.layout_of(form.dtype))


def flattened(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor of any shape."""
    columns = shape[-1] if shape else 1
    return math.prod(shape) // max(1, columns), columns


def row_blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """All rows in blocks of about AT_ONCE numbers."""
    height = max(1, AT_ONCE // max(1, columns))
    return ((start, min(start + height, rows)) for start in range(0, rows, height))


def rows_in(place: TensorPlace, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor on disk, as a matrix."""
    _, columns = flattened(place.shape)
    width = columns * place.dtype.itemsize
    values = np.fromfile(place.path, np.uint8, (stop - start) * width, offset=place.offset + start * width)
    require(len(values) == (stop - start) * width, f"{place.path} was cut short while it was being read; fetch it again.")
    return torch.from_numpy(values).view(place.dtype).view(stop - start, columns)


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file of ours; `CatsError` where there are none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length)).get("__metadata__", {})
    require(any(key.startswith(ORIGINAL) for key in metadata), f"{path} does not say what it was made of; convert the checkpoint again.")
    return dict(metadata)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint that is to be nested, looked at.

    Attributes:
        dtype: of the matrices, as configurations write it.
        matrices: names of the tensors that are cut up, in the order of a pass.
        others: names of those that are stored as they are.
        coarse_bytes, residual_bytes: of the two files, at most.
    """

    source: Source
    target: Path
    dtype: str
    matrices: tuple[str, ...]
    others: tuple[str, ...]
    coarse_bytes: int
    residual_bytes: int

    @property
    def original_bytes(self) -> int:
        """Of all tensors as they are."""
        return sum(self.source.nbytes(name) for name in self.source.forms)

    @property
    def missing_bytes(self) -> int:
        """What has to be written still, at most."""
        return max(0, self.coarse_bytes + self.residual_bytes - written_bytes(self.target))


def fields_of(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory."""
    try:
        fields: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatsError(f"cannot read {directory / 'config.json'}: {error}; fetch the checkpoint again.") from error
    return fields


def conversion_of(directory: Path, target: Path) -> Conversion:
    """Look at a checkpoint; `CatsError` where it cannot be nested, or where the disk has no room."""
    config = fields_of(directory)
    family, layers = family_of(config.get("model_type"), str(directory)), config.get("num_hidden_layers", 0)
    require(
        not config.get("quantization_config"),
        f"the weights in {directory} are quantised already; nested ones are made of bfloat16 or float16 as published.",
    )
    source, dtypes = Source(directory), set()
    matrices = [f"model.layers.{layer}.{matrix}.weight" for layer in range(layers) for matrix in family.matrices]
    require(bool(matrices), f"{directory / 'config.json'} names no number of layers; fetch the checkpoint again.")
    for name in matrices:
        require(
            name in source.forms, f"the checkpoint in {directory} lacks the tensor {name}; it is not a checkpoint of this architecture."
        )
        dtypes.add(str(source.forms[name].dtype).removeprefix("torch."))
        fits = len(source.forms[name].shape) == 2 and dtypes <= format.LAYOUTS.keys() and len(dtypes) == 1
        require(
            fits,
            f"{name} is a {'x'.join(map(str, source.forms[name].shape))} tensor of {source.forms[name].dtype}; nested weights are made of "
            "matrices that are all bfloat16 or all float16.",
        )
    dtype = dtypes.pop()
    others = tuple(name for name in source.forms if name not in set(matrices))
    coarse, residual = sizes_of(source, matrices, others, format.LAYOUTS[dtype])
    made = Conversion(source, target, dtype, tuple(matrices), others, coarse, residual)
    check_free(target)
    check_room(target, made.missing_bytes)
    return made


def sizes_of(source: Source, matrices: list[str], others: tuple[str, ...], layout: format.Layout) -> tuple[int, int]:
    """Bytes of the two files, at most: with as many exceptions as are allowed."""
    coarse, residual = header_room(source), header_room(source)
    for name in matrices:
        rows, columns = source.forms[name].shape
        exceptions = 4 * (format.HEADER + rows + 1) + 8 * int(format.MOST_EXCEPTIONS * rows * columns)
        coarse += rows * columns + exceptions + 2 * 4096
        residual += rows * layout.row_bytes(columns) + 4096
    return coarse + sum(source.nbytes(name) + 4096 for name in others), residual


def header_room(source: Source) -> int:
    """Bytes of a header that names every part and every original tensor."""
    return 4096 + sum(8 * (len(name) + ENTRY_BYTES) + len(source.files[name]) for name in source.forms)


def check_room(target: Path, nbytes: int) -> None:
    """Raise `CatsError` where the disk has not so many bytes free."""
    place = next(path for path in target.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    require(
        free >= nbytes, f"{target} needs {nbytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room, or choose another."
    )


def fingerprint(directory: Path) -> dict[str, object]:
    """What shows that a checkpoint is the one that work was begun with."""
    stats = {path.name: path.stat() for path in weight_files(directory)}
    return {"directory": str(directory.resolve()), "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}}


def convert(conversion: Conversion, progress: Progress = ignored) -> None:
    """Make the nested checkpoint, or go on with it."""
    source, room = conversion.source, header_room(conversion.source)
    begun_with = {"format": Nested.version, **fingerprint(source.directory)}
    making = Making(conversion.target, begun_with, {COARSE_FILE: room, RESIDUAL_FILE: room}, pages=True)
    try:
        for name in (*conversion.matrices, *conversion.others):
            if name not in making.notes:
                nest = nested_matrix if name in conversion.matrices else copied_tensor
                form = source.forms[name]
                shape = "x".join(map(str, form.shape))
                making.note(name, f"{nest(source, name, making)} {DTYPE_NAMES[form.dtype]} {shape} {source.files[name]}")
            progress(source.nbytes(name))
        config = (source.directory / "config.json").read_text(encoding="utf-8")
        nested = json.loads(config) | {"quantization_config": Nested.settings(conversion.dtype)}
        texts = {"config.json": json.dumps(nested, indent=2) + "\n", ORIGINAL_CONFIG: config, NESTED_INDEX: index_of(making.files)}
        metadata = {"format": "pt", **{f"{ORIGINAL}{name}": note for name, note in making.notes.items()}}
        making.finish(metadata, texts, other_files(source.directory))
    finally:
        making.close()


def nested_matrix(source: Source, name: str, making: Making) -> str:
    """Write the parts of a matrix; returns the SHA-256 of the matrix."""
    layout, (rows, columns) = format.layout_of(source.forms[name].dtype), source.forms[name].shape
    digest, top = hashlib.sha256(), 0
    for block in source.blocks(name):
        digest.update(raw(block))
        top = max(top, format.top_of(block, layout))
    coarse, residual, base = making.files[COARSE_FILE], making.files[RESIDUAL_FILE], format.base_for(top)
    coarse.begin(f"{name}.codes", "U8", (rows, columns))
    residual.begin(f"{name}.residual", "U8", (rows, layout.row_bytes(columns)))
    counts, places, bits = [], [], []
    for block in source.blocks(name):
        pieces = format.split(block, base, layout)
        coarse.write(pieces.codes_RK)
        residual.write(pieces.low_RB)
        counts.append(pieces.misfits_RK.sum(1))
        places.append(pieces.misfits_RK.nonzero()[:, 1])
        bits.append(format.bits_of(block)[pieces.misfits_RK])
        format.check_share(sum(map(len, bits)), rows * columns, name)
    coarse.complete()
    residual.complete()
    listed = format.listed(base, torch.cat(counts), torch.cat(places), torch.cat(bits))
    coarse.add(f"{name}.exceptions", "I32", listed.shape, [listed])
    return digest.hexdigest()


def copied_tensor(source: Source, name: str, making: Making) -> str:
    """Write a tensor as it is; returns its SHA-256."""
    digest, form = hashlib.sha256(), source.forms[name]
    file = making.files[COARSE_FILE]
    file.begin(name, DTYPE_NAMES[form.dtype], form.shape)
    for block in source.blocks(name):
        digest.update(raw(block))
        file.write(block)
    file.complete()
    return digest.hexdigest()


def other_files(directory: Path) -> list[Path]:
    """Everything in a checkpoint directory but weights and configuration: tokenizer, chat template, licence."""
    left_out = (*INDEX_FILES, NESTED_INDEX, "config.json", ORIGINAL_CONFIG)
    files = (path for path in sorted(directory.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if not path.name.endswith(WEIGHT_SUFFIXES) and path.name not in left_out]


def opened(directory: Path) -> NestedSource:
    """A nested checkpoint; `CatsError` for another one."""
    require((directory / COARSE_FILE).is_file(), f"{directory} is no nested checkpoint: it has no {COARSE_FILE}.")
    return NestedSource(directory)


def check_names(nested: NestedSource, source: Source) -> None:
    """Raise `CatsError` where a tensor is in one of them only."""
    differing = sorted(nested.digests.keys() ^ source.forms.keys())
    require(not differing, f"only one of {nested.directory} and {source.directory} has the tensor {', '.join(differing[:1])}.")


def verify(nested: NestedSource, source: Source | None = None, progress: Progress = ignored) -> None:
    """Rebuild every original tensor and compare its SHA-256, and all bits where `source` is given; `CatsError` names one that differs."""
    if source is not None:
        check_names(nested, source)
    for name, expected in nested.digests.items():
        digest, same = hashlib.sha256(), source is None or nested.forms[name] == source.forms[name]
        others = None if source is None or not same else source.blocks(name)
        for block in nested.blocks(name):
            digest.update(raw(block))
            same = same and (others is None or raw(block) == raw(next(others)))
        require(same, f"{name} in {nested.directory} is not the one in {source and source.directory}; convert the checkpoint again.")
        require(digest.hexdigest() == expected, f"{name} in {nested.directory} is damaged: its SHA-256 has changed; convert it again.")
        progress(nested.nbytes(name))


def check_published(nested: NestedSource, source: Source, progress: Progress = ignored) -> int:
    """Raise `CatsError` unless `source` holds the tensors that `nested` was made of, by their SHA-256; returns how many there are."""
    check_names(nested, source)
    for name, expected in nested.digests.items():
        require(
            tensor_digest(source, name, progress) == expected,
            f"{name} in {source.directory} is not the tensor that {nested.directory} was made of; give the checkpoint that it was made of.",
        )
    return len(nested.digests)


def tensor_digest(source: Source, name: str, progress: Progress = ignored) -> str:
    """SHA-256 of a tensor as it is stored."""
    digest = hashlib.sha256()
    for block in source.blocks(name):
        digest.update(raw(block))
        progress(block.nbytes)
    return digest.hexdigest()


def restored_name(file: str) -> str:
    """The safetensors file that stands for one of the original files."""
    return re.sub(r"\.bin$", ".safetensors", re.sub(r"^pytorch_model", "model", file))


def restore(nested: NestedSource, target: Path, progress: Progress = ignored) -> None:
    """Make the original checkpoint again, or go on with it: the same tensors, bit for bit, in safetensors files of the same names."""
    names = sorted(nested.digests, key=lambda name: (-nested.forms[name].dtype.itemsize, name))
    check_free(target)
    check_room(target, max(0, sum(nested.nbytes(name) for name in names) - written_bytes(target)))
    rooms = dict.fromkeys(sorted({restored_name(nested.files[name]) for name in names}), header_room(nested))
    making = Making(target, {"restores": Nested.version, **fingerprint(nested.directory)}, rooms, pages=False)
    try:
        for name in names:
            if name not in making.notes:
                restore_tensor(nested, name, making)
            progress(nested.nbytes(name))
        texts = {"config.json": (nested.directory / ORIGINAL_CONFIG).read_text(encoding="utf-8")}
        if len(rooms) > 1:
            texts[INDEX_FILES[0]] = index_of(making.files)
        making.finish({"format": "pt"}, texts, other_files(nested.directory))
    finally:
        making.close()


def restore_tensor(nested: NestedSource, name: str, making: Making) -> None:
    """Write one of the original tensors, checked."""
    digest, form = hashlib.sha256(), nested.forms[name]
    file = making.files[restored_name(nested.files[name])]
    file.begin(name, DTYPE_NAMES[form.dtype], form.shape)
    for block in nested.blocks(name):
        digest.update(raw(block))
        file.write(block)
    file.complete()
    if digest.hexdigest() != nested.digests[name]:
        raise CatsError(f"{name} in {nested.directory} is damaged: its SHA-256 has changed; convert the checkpoint again.")
    making.note(name, digest.hexdigest())


def shown_sizes(conversion: Conversion) -> Mapping[str, int]:
    """What a conversion reads and writes, in bytes, for people."""
    return {
        "original": conversion.original_bytes,
        "codes, exceptions and what is stored as it is": conversion.coarse_bytes,
        "residual": conversion.residual_bytes,
        "still to be written": conversion.missing_bytes,
    }
