"""Kinds of weight: two that only the tests have, small stand-ins for copies and nested formats, and the real ones, written by hand."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from cats.config import MemoryOptions
from cats.dtypes import rounded
from cats.nested import format
from cats.planning.plan import COARSE, View
from cats.weight import KINDS, Nested, Parts, Weight

STORED = {"nested": torch.bfloat16}
"""Dtypes of the kinds that do not hold every one."""


class SumWeight(Weight):
    """A coarse part that drafts, and a residual that makes it exact by addition."""

    parts: ClassVar[Mapping[str, frozenset[str]]] = {"coarse": frozenset({"exact", "coarse"}), "residual": frozenset({"exact"})}

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        numbers = parts["coarse"][start:stop].float()
        return rounded(numbers + parts["residual"][start:stop] if "residual" in parts else numbers, self.dtype)


class CopyWeight(Weight):
    """The exact matrix, and a coarse copy that drafts."""

    parts: ClassVar[Mapping[str, frozenset[str]]] = {"exact": frozenset({"exact"}), "coarse": frozenset({"coarse"})}

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        (numbers,) = parts.values()
        return rounded(numbers[start:stop], self.dtype)


KINDS.update({"sum": SumWeight, "copy": CopyWeight})


def summed(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    coarse = matrix.bfloat16()
    return {"coarse": coarse, "residual": matrix.float() - coarse.float()}


def doubled(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"exact": matrix, "coarse": matrix.to(torch.bfloat16, copy=True)}


def nested(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    codes, residual, exceptions = format.encode(matrix)
    return {"codes": codes, "residual": residual, "exceptions": exceptions}


SPLIT: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {"sum": summed, "copy": doubled, "nested": nested}


def settings_of(kind: str, stored: torch.dtype) -> dict[str, Any]:
    return Nested.settings(str(stored).removeprefix("torch.")) if kind == "nested" else {"quant_method": kind}


def rewritten(base: Path, kind: str, directory: Path, stored: torch.dtype = torch.float32, **metadata: str) -> Path:
    """The checkpoint again, its numbers in another dtype, its layers' matrices of this kind."""
    tensors: dict[str, torch.Tensor] = {}
    config = json.loads((base / "config.json").read_text())
    for name, tensor in load_file(base / "model.safetensors").items():
        if kind in SPLIT and ".layers." in name and name.endswith("_proj.weight"):
            tensors |= {f"{name}.{part}": numbers for part, numbers in SPLIT[kind](tensor.to(stored)).items()}
        else:
            tensors[name] = tensor.to(stored)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", **metadata})
    method: dict[str, Any] = {"quantization_config": settings_of(kind, stored)} if kind in SPLIT else {}
    (directory / "config.json").write_text(json.dumps(config | method))
    return directory


@cache
def of_kind(base: Path, kind: str) -> Path:
    """A checkpoint of this kind with the numbers of `base`, or of `plain_of`."""
    return rewritten(base, kind, base.parent / kind, STORED.get(kind, torch.float32)) if kind in SPLIT else base


@cache
def plain_of(base: Path, kind: str) -> Path:
    """The plain checkpoint whose numbers a checkpoint of this kind has."""
    return rewritten(base, "plain", base.parent / f"plain-{kind}", STORED[kind]) if kind in STORED else base


def views_of(kind: str) -> tuple[View, ...]:
    """What drafts in a model of this kind."""
    return () if kind == "plain" else (COARSE,)


def options_of(kind: str, memory: MemoryOptions) -> MemoryOptions:
    """The options, with what drafts in a model of this kind."""
    return replace(memory, views=(*memory.views, *views_of(kind)), coarse="int8" if kind == "int8" else None)
