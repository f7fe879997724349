"""README and docs: commands know their flags, links resolve, Python runs, the file map is whole, the table is of the results."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cats
from cats import smollm2
from evaluation.streamed_speed import NESTED, PUBLISHED, rows_of, streamed_table

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = smollm2.cached()
"""Where it has been fetched; the cache of a test is empty."""
PAGES = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, LAYOUT = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs" / "layout.md"]
TEXTS = list(PAGES.values())
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
SHELL = [text for page in TEXTS for _, language, text in FENCE.findall(page) if language in ("", "bash")]
INDENTED = ["\n".join(re.findall(r"^ {4,}(.*)$", page, flags=re.MULTILINE)) for page in TEXTS]
"""Commands also stand in blocks by indentation."""
PYTHON = [text for _, language, text in FENCE.findall(README) if language == "python"]
COMMANDS = list(
    dict.fromkeys(
        line.strip()
        for block in (*SHELL, *INDENTED)
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"\s*(?:python3? |accelerate launch |bash )", line)
    )
)
ROOMS = (
    "cats",
    "cats/methods",
    "cats/nested",
    "cats/kernels",
    "cats/runtime",
    "cats/planning",
    "cats/serve",
    "cats/cli",
    "training",
    "evaluation",
    "evaluation/benchmarks",
    "scripts",
)


def module_of(words: list[str]) -> str:
    """The module that a command line runs: after -m, or the script as a module."""
    if "-m" in words:
        return words[words.index("-m") + 1]
    script = next(word for word in words if word.endswith(".py"))
    return script.removesuffix(".py").replace("/", ".")


def anchors_of(page: str) -> set[str]:
    """What links into a page may point at: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def help_of(module: ModuleType, given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command, or a command of a command, says of its flags."""
    with pytest.raises(SystemExit) as stopped:
        module.main([*given, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


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
    known = help_of(module, [], capsys)
    given = words[words.index(name) + 1 :] if name in words else []
    if given and re.search(rf"^ {{4}}{re.escape(given[0])} ", known, flags=re.MULTILINE):
        known += help_of(module, given[:1], capsys)
    flags = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
    assert flags <= set(re.findall(r"--[a-z][a-z0-9_-]*", known))


@pytest.mark.parametrize("block", PYTHON)
def test_the_python_in_the_readme_runs(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    text, length = capsys.readouterr().out.rsplit(maxsplit=1)
    assert text.strip()
    assert float(length) > 1


@pytest.mark.skipif(DEFAULT_MODEL is None, reason="the default model is not fetched")
def test_the_answer_in_the_readme_is_what_the_model_writes() -> None:
    ((text, tokens),) = re.findall(r"^    (1\. .*?)\n\n    \[(\d+) tokens, ", README, flags=re.MULTILINE | re.DOTALL)
    (prompt,) = re.findall(r'^python -m cats "(.*?)" --memory-budget', README, flags=re.MULTILINE)
    assert DEFAULT_MODEL is not None
    answer = cats.load(DEFAULT_MODEL).chat(prompt, cats.AutoregressiveConfig())
    assert (answer.text, len(answer.ids)) == (text.replace("\n    ", "\n"), int(tokens))


def test_paths_that_pages_name_exist() -> None:
    named = set(re.findall(r"`((?:cats|training|evaluation|data|docs|scripts|tests)/[\w./-]+\.\w+)`", "\n".join(TEXTS)))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[path]):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), target
        assert not anchor or anchor in anchors_of(PAGES[page]), target


def test_every_page_is_linked_from_the_readme() -> None:
    assert not [path.name for path in PAGES if path.parent.name == "docs" and f"](docs/{path.name}" not in README]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_readmes_table_is_of_the_results() -> None:
    assert streamed_table(rows_of(PUBLISHED, nested=False) + rows_of(NESTED, nested=True)) in README


def test_result_files_that_pages_name_are_there() -> None:
    name = r"`(?:evaluation/results/)?((?:reproduce/)?\w+\.(?:json|jsonl|runs\.jsonl))`"
    names = set(re.findall(name, PAGES[ROOT / "docs" / "results.md"]))
    assert names
    assert not [file for file in names if not (ROOT / "evaluation" / "results" / file).exists()]


def test_no_committed_comparison_with_transformers_differs() -> None:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "evaluation" / "results").glob("correctness_*.json")]
    assert found
    assert not [result["settings"]["methods"] for result in found if result["differences"] or not result["comparisons"]]


@pytest.mark.parametrize("room", ROOMS)
def test_the_file_map_names_every_file(room: str) -> None:
    (part,) = re.findall(rf"^## {room}/\n(.*?)(?=^## )", LAYOUT, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(\w+\.(?:py|sh))`", part)
    assert sorted(named) == sorted(path.name for suffix in ("py", "sh") for path in (ROOT / room).glob(f"*.{suffix}"))


def test_the_file_map_has_every_room() -> None:
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for name in ("cats", "training", "evaluation")
        for path in (ROOT / name).rglob("*.py")
    }
    assert packages | {"scripts"} == set(ROOMS)


def test_the_entry_point_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluation" / "CATS_dynamic.py"), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
