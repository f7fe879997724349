"""The commands of the README and of docs/: every module is there, every flag is known to it, every path that it names exists."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
FENCES = [
    text
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", "\n".join(TEXTS), flags=re.MULTILINE | re.DOTALL)
    if language in ("", "bash")
]
PYTHON = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip()
    for fence in FENCES
    for line in fence.replace("\\\n", " ").splitlines()
    if re.match(r"\s*(?:python3? |accelerate launch |bash )", line)
]


def module_of(words: list[str]) -> str:
    """The module that a command line runs: after -m, or the script as a module."""
    if "-m" in words:
        return words[words.index("-m") + 1]
    script = next(word for word in words if word.endswith(".py"))
    return script.removesuffix(".py").replace("/", ".")


def test_there_are_commands() -> None:
    assert PYTHON
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists_and_knows_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    name = module_of(words)
    module = importlib.import_module(f"{name}.__main__" if name == "cats" else name)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    known = set(re.findall(r"--[a-z][a-z0-9_-]*", capsys.readouterr().out))
    flags = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
    assert flags <= known, flags - known


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_in_the_readme_runs(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    text, length = capsys.readouterr().out.rsplit(maxsplit=1)
    assert text.strip()
    assert float(length) > 1


def test_paths_in_the_readme_exist() -> None:
    named = set(re.findall(r"`((?:cats|training|evaluation|data|scripts|tests)/[\w./-]+\.\w+)`", "\n".join(TEXTS)))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_entry_point_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluation" / "CATS_dynamic.py"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
