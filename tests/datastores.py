"""Small datastores for the tests, by the number of their ids: a circle of tokens, and noise."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from cats.datastore import Datastore


@cache
def store_of(vocabulary: int) -> Path:
    """A datastore in which t is mostly followed by t + 1; it is removed when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="datastore-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    generator = np.random.default_rng(0)
    steps = [generator.choice([1, 1, 1, 2, 3], 50) for _ in range(20)]
    documents = [np.cumsum(step) % vocabulary for step in steps]
    Datastore.build(documents, {"tokenizer": None, "vocabulary": vocabulary, "sources": []}).save(directory / "store")
    return directory / "store"
