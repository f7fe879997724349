"""Policy as tests: who imports whom, short functions, small files, no machine paths, the paper's flags. pyproject.toml has ruff's part.

Reads source text and syntax trees; of the commands it runs only --help.
"""

import ast
import functools
import importlib
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cats", "training", "evaluation", "tests")
COMMANDS = Path("cats/cli/command.py")
"""Where the parser of every command is made."""
VAGUE = {"utils", "util", "common", "misc", "helpers", "legacy", "old", "new"}
LONGEST_FUNCTION = 60
LARGEST_FILE = 16 * 2**20

# A module of cats/ may import from its own rank and from those above it in this list.
RANKS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "files", "records", "turns", "families", "hub", "adapter_card", "datastore", "static_tree"}),
    frozenset({"from_gguf", "smollm2", "planning", "config", "tree", "masks", "acceptance", "trace", "stopping", "settings", "text"}),
    frozenset({"rope", "kv_cache", "rows", "kernels", "checkpoint", "dtypes", "linear", "weight", "nested", "runtime"}),
    frozenset({"calibration"}),
    frozenset({"embedding", "adapter", "earlyexit", "loading", "resources", "cats_model", "medusa_heads"}),
    frozenset({"state", "kept"}),
    frozenset({"methods"}),
    frozenset({"reference", "engine", "writers"}),
    frozenset({"machine"}),
    frozenset({"planned"}),
    frozenset({"api", "custom_generate"}),
    frozenset({""}),
    frozenset({"serve"}),
    frozenset({"cli", "__main__"}),
)
# "": the names that the package exports.
TRAINING_MAY_USE = {"errors", "files", "records", "families", "cli", "text", "rope", "checkpoint", "earlyexit", ""}
TRAINING_MAY_USE |= {"adapter", "datastore", "medusa_heads", "planning"}
PLAIN = ("planning", "tree", "static_tree", "config", "trace")
"""Modules of plain arithmetic."""

README_FLAGS = {
    "evaluation.CATS_dynamic": (
        "--model-path --draft-adapter-path --shallow-adapter-path --model-id --bench-name --question-begin --question-end --draft-layer "
        "--shallow-layer --steps --sv-passes --threshold --tree-topk --total-tokens --num-runs --temperature --typical-tau --typical-alpha "
        "--dtype --max-new-tokens"
    ),
    "training.ge_data": "--start --end --index --gpu_index --outdir",
    "training.fine_tune_adapter": "--exit_layer --topk --start_epoch --end_epoch --data_home",
}


def sources(*packages: str) -> list[Path]:
    """Every Python file of these packages, relative to the root."""
    return sorted(path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, with `from package import name` spelled out as package.name."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def cats_module(dotted: str) -> str | None:
    """'cats.methods.base.Method' -> 'methods', a name that the package itself exports -> '', not ours -> None."""
    first, _, rest = dotted.partition(".")
    if first != "cats":
        return None
    module = rest.split(".")[0]
    known = {path.stem if path.is_file() else path.name for path in (ROOT / "cats").iterdir()}
    return module if module in known else ""


def rank(module: str) -> int:
    found = [place for place, modules in enumerate(RANKS) if module in modules]
    assert found, f"cats/{module} has no rank in tests/test_house_rules.py: say which modules it may import"
    return found[0]


def module_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py") if path.parts[1] != "__init__.py" else ""


def breaches(rule: Callable[[Path], Iterator[str]], files: Iterable[Path]) -> list[str]:
    """What a rule has to say of these files, each with its file."""
    return [f"{path}: {what}" for path in files for what in rule(path)]


def test_imports_inside_cats_point_one_way() -> None:
    def above(path: Path) -> Iterator[str]:
        own = module_of(path)
        for dotted in imports(path):
            other = cats_module(dotted)
            if dotted.split(".")[0] in ("evaluation", "training", "data", "tests"):
                yield f"imports {dotted}, which is no library"
            elif other not in (None, own) and (rank(other) > rank(own) or rank(own) == 1 < rank(other)):
                yield f"imports {dotted}, which stands above it"

    assert not breaches(above, sources("cats"))


def test_plain_arithmetic_needs_no_torch() -> None:
    def heavy(path: Path) -> Iterator[str]:
        return (dotted for dotted in imports(path) if dotted.split(".")[0] in ("torch", "transformers"))

    assert not breaches(heavy, (path for path in sources("cats") if module_of(path) in PLAIN))


def test_training_sees_only_the_models() -> None:
    def foreign(path: Path) -> Iterator[str]:
        for dotted in imports(path):
            module = cats_module(dotted)
            if dotted.split(".")[0] in ("evaluation", "tests") or (module is not None and module not in TRAINING_MAY_USE):
                yield f"imports {dotted}"

    assert not breaches(foreign, sources("training"))


def test_functions_are_short() -> None:
    def long(path: Path) -> Iterator[str]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or first.lineno) - first.lineno + 1
                if length > LONGEST_FUNCTION:
                    yield f"{node.name} is {length} lines long"

    assert not breaches(long, sources(*PACKAGES))


def test_names_tell_what_a_file_is() -> None:
    def vague(path: Path) -> Iterator[str]:
        if VAGUE & set(path.with_suffix("").parts):
            yield "name it after what it does"
        if re.search(r"_v\d+$", path.stem):
            yield "replace the old path instead of numbering it"

    assert not breaches(vague, sources(*PACKAGES))


def test_every_command_has_the_flags_of_every_command() -> None:
    def bare(path: Path) -> Iterator[str]:
        if path != COMMANDS and "ArgumentParser(" in (ROOT / path).read_text(encoding="utf-8"):
            yield "build a CommandParser"

    assert not breaches(bare, sources("cats", "evaluation", "training"))


def tracked_files() -> list[Path]:
    """Files that git tracks or would add; of a copy without git, everything outside hidden folders."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        return [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file() and not any(p.startswith(".") for p in path.parts)]
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_are_small() -> None:
    large = {str(path): size for path in tracked_files() if (size := (ROOT / path).stat().st_size) > LARGEST_FILE}
    assert not large


def test_no_absolute_paths_of_a_machine() -> None:
    machine = re.compile(rb"(?<![\w.])/(?:work|home|root|Users|mnt|tmp)/[A-Za-z.]")
    found = [
        f"{path}: {match.group().decode()}"
        for path in tracked_files()
        if path.suffix in (".py", ".sh", ".md", ".toml", ".txt", ".json", ".yml") and (match := machine.search((ROOT / path).read_bytes()))
    ]
    assert not found


@pytest.mark.parametrize("module", README_FLAGS)
def test_the_papers_command_lines_are_known(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    missing = set(README_FLAGS[module].split()) - known
    assert not missing, f"{module} lost flags of the paper's README"
