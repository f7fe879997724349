"""Random Medusa heads for the tests, by the width of the model."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from cats.medusa_heads import HeadsShape, MedusaHeads, save_accuracy

HEADS = 3


@cache
def heads_of(width: int, vocabulary: int | None = None, own_head: bool = False) -> Path:
    """A directory of heads that change a state much and guess as if by chance; it is removed when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="heads-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    heads = MedusaHeads(HeadsShape(HEADS, width, vocabulary, own_head))
    with torch.no_grad():
        for weight in heads.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / width**0.5)
    heads.save_pretrained(directory, torch.float32)
    save_accuracy(directory, [[0.4, 0.2, 0.1, 0.05], [0.3, 0.1, 0.05], [0.2, 0.1]], [100, 90, 80])
    return directory
