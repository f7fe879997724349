"""Kinds of weight that only the tests have: what a quantised copy and a nested format will ask of planning, streaming and products."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from cats.dtypes import rounded
from cats.planning.plan import View
from cats.weight import KINDS, Parts, Weight

COARSE = View(precision="coarse")


class SumWeight(Weight):
    """A coarse part that drafts, and a residual that makes it exact by addition."""

    parts: ClassVar[Mapping[str, frozenset[str]]] = {"coarse": frozenset({"exact", "coarse"}), "residual": frozenset({"exact"})}

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        numbers = parts["coarse"][start:stop].float()
        return rounded(numbers + parts["residual"][start:stop] if "residual" in parts else numbers, self.held)


class CopyWeight(Weight):
    """The exact matrix, and a coarse copy that drafts."""

    parts: ClassVar[Mapping[str, frozenset[str]]] = {"exact": frozenset({"exact"}), "coarse": frozenset({"coarse"})}

    def rows(self, parts: Parts, start: int, stop: int) -> torch.Tensor:
        (numbers,) = parts.values()
        return rounded(numbers[start:stop], self.held)


KINDS.update({"sum": SumWeight, "copy": CopyWeight})


def summed(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    coarse = matrix.bfloat16()
    return {"coarse": coarse, "residual": matrix.float() - coarse.float()}


def doubled(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"exact": matrix, "coarse": matrix.to(torch.bfloat16, copy=True)}


SPLIT: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {"sum": summed, "copy": doubled}


def rewritten(base: Path, kind: str, directory: Path, stored: torch.dtype = torch.float32, **metadata: str) -> Path:
    """The checkpoint again, its numbers in another dtype, its layers' matrices of this kind."""
    tensors: dict[str, torch.Tensor] = {}
    config = json.loads((base / "config.json").read_text())
    for name, tensor in load_file(base / "model.safetensors").items():
        if kind != "plain" and ".layers." in name and name.endswith("_proj.weight"):
            tensors |= {f"{name}.{part}": numbers for part, numbers in SPLIT[kind](tensor.to(stored)).items()}
        else:
            tensors[name] = tensor.to(stored)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", **metadata})
    method: dict[str, Any] = {} if kind == "plain" else {"quantization_config": {"quant_method": kind}}
    (directory / "config.json").write_text(json.dumps(config | method))
    return directory


@cache
def of_kind(base: Path, kind: str) -> Path:
    """A checkpoint of this kind with the numbers of `base`."""
    return base if kind == "plain" else rewritten(base, kind, base.parent / kind)


def views_of(kind: str) -> tuple[View, ...]:
    """What drafts in a model of this kind."""
    return () if kind == "plain" else (COARSE,)
