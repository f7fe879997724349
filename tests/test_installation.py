"""The wheel: it holds cats alone, shows its help without loading transformers, and says what to do where there is no model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_house_rules import ROOT, tracked_files

SHOW_HELP = """
import sys
from cats.cli.ask import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"transformers", "huggingface_hub"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel of this repository was installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        if path.suffix in (".py", ".toml", ".md", ".html") or path.name == "LICENSE":
            (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / path).write_bytes((ROOT / path).read_bytes())
    pip("wheel", str(folder / "source"), "--no-build-isolation", "--wheel-dir", str(folder / "dist"))
    (wheel,) = (folder / "dist").glob("*.whl")
    pip("install", str(wheel), "--target", str(folder / "site"))
    return folder / "site"


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "CATS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_cats_alone(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"bin", "cats"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["cats"]
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "cats").rglob("*.py")}
    assert {path.parent.relative_to(installed) for path in (installed / "cats").rglob("*.py")} == packages
    assert (installed / "cats" / "serve" / "page.html").read_bytes() == (ROOT / "cats" / "serve" / "page.html").read_bytes()


def test_help_loads_nothing_heavy(installed: Path, tmp_path: Path) -> None:
    ended = run(installed, tmp_path, "-c", SHOW_HELP)
    assert ended.returncode == 0, ended.stderr
    assert "--model-path DIRECTORY_OR_HUB_ID" in ended.stdout


def test_without_a_model_one_sentence_says_how_to_get_one(installed: Path, tmp_path: Path) -> None:
    ended = run(installed, tmp_path, "-m", "cats", "Hello")
    assert ended.returncode == 2
    said = ended.stderr.strip().splitlines()[-1]  # behind the bar
    assert said.startswith("error: there is no model here: SmolLM2-135M-Instruct is not in ")
    assert "give --model-path DIRECTORY_OR_HUB_ID" in said
    assert "compiling" not in ended.stderr, "nobody waits for kernels to be told that"
