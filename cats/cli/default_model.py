"""The model that commands use where none is named: a small chat model, fetched on first use; where that cannot be, the test model."""

import sys
from pathlib import Path
from typing import NamedTuple

from cats.cli.fetch import fetch_with_progress
from cats.errors import CatsError, NetworkError
from cats.smollm2 import cache_directory

DATA = Path(__file__).resolve().parent.parent.parent / "data"
"""Of a checkout of the repository; an installation from a wheel has none."""
TEST_MODEL = DATA / "tiny"
TEST_ADAPTERS = {"draft": TEST_MODEL / "adapters" / "draft_exit2", "shallow": TEST_MODEL / "adapters" / "shallow_exit6"}
SHIPPED = DATA / "smollm2-135m" / "adapters"
EXITS = {"draft": 3, "shallow": 15}
MODEL = "SmolLM2-135M-Instruct"


class DefaultModel(NamedTuple):
    """A checkpoint and the adapters that were trained for it: "draft" and "shallow" -> directory, empty where there are none."""

    path: Path
    adapters: dict[str, Path]

    @property
    def name(self) -> str:
        """For people."""
        return "the small test model" if self.path == TEST_MODEL else MODEL


def default_model() -> DefaultModel:
    """SmolLM2-135M-Instruct, fetched with a bar on standard error where the cache has none; without a network the checkout's test model.

    Raises:
        CatsError: there is neither, or the disk has no room.
    """
    try:
        return DefaultModel(Path(fetch_with_progress()), shipped_adapters())
    except NetworkError as error:
        missing = f"{MODEL} is not in {cache_directory()} and cannot be fetched ({error.reason})"
        if not TEST_MODEL.is_dir():
            raise CatsError(f"there is no model here: {missing}; give --model-path DIRECTORY_OR_HUB_ID, or run with a network.") from error
        sys.stderr.write(f"{missing}, so the checkout's small test model answers in its place, which makes no sense.\n")
        return DefaultModel(TEST_MODEL, TEST_ADAPTERS)


def shipped_adapters() -> dict[str, Path]:
    """The adapters for SmolLM2-135M-Instruct of this checkout; none where it has none."""
    places = {name: SHIPPED / f"exit{exit_layer}" for name, exit_layer in EXITS.items()}
    return places if all((place / "config.json").is_file() for place in places.values()) else {}
