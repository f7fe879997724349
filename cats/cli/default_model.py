"""The model that commands use where none is named."""

from pathlib import Path

from cats import smollm2
from cats.errors import CatsError

EMBEDDED = Path(__file__).resolve().parent.parent.parent / "data" / "tiny"
EMBEDDED_ADAPTERS = {"draft": EMBEDDED / "adapters" / "draft_exit2", "shallow": EMBEDDED / "adapters" / "shallow_exit6"}


def default_model() -> tuple[Path, dict[str, Path]]:
    """Checkpoint and adapters: the embedded model of a repository checkout, else the small model that was fetched; else `CatsError`."""
    if EMBEDDED.is_dir():
        return EMBEDDED, EMBEDDED_ADAPTERS
    fetched = smollm2.cached()
    if fetched is None:
        raise CatsError("there is no model here; give --model-path DIRECTORY_OR_HUB_ID, or fetch a small one: `python -m cats.cli.fetch`.")
    return fetched, {}
