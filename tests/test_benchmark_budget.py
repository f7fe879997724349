"""The engines of the budget benchmark say the same tokens, are held to their limit, and their figures say how they were made."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cats
from cats import CatsError
from cats.nested import conversion
from cats.planning.plan import COARSE
from evaluation.benchmarks import budget as benchmark_budget
from evaluation.benchmarks import write_gguf
from evaluation.benchmarks.budget import in_turns, main, one_run, summarise
from evaluation.benchmarks.budget_engines import ENGINES
from evaluation.benchmarks.make_synthetic_checkpoint import base_config, make_checkpoint
from evaluation.benchmarks.peer_engines import PEERS
from evaluation.benchmarks.timed_run import Request, measure
from evaluation.memory_run import GROUPS, run_limited
from tests.test_synthetic_checkpoint import CONFIG

needs_groups = pytest.mark.skipif(not os.access(GROUPS / "memory", os.W_OK), reason="no writable version 1 memory control groups")
PEER_PYTHON = os.environ.get("CATS_PEER_PYTHON")
TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
NOTES = {"notes": {"arithmetic": "float32", "front_bytes_per_pass": 300}, "stage_seconds_per_step": None, "load_peak_bytes": 1}
NOTES |= {"peak_bytes": 1, "group_peak_bytes": 7, "disk_bytes_per_step": 50, "wire_bytes_per_s": 100, "memory_bytes_per_s": 600}


@pytest.fixture(scope="module")
def request_for(tmp_path_factory: pytest.TempPathFactory) -> Request:
    folder = tmp_path_factory.mktemp("budget")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}))
    model = folder / "model"
    make_checkpoint(base_config(folder / "config.json", None), torch.float32, [1, 3], model)
    adapters = (str(model / "adapters" / "exit1"), str(model / "adapters" / "exit3"))
    return Request("plain", str(model), adapters, None, tokens=6, prompt_tokens=5)


def test_all_engines_say_the_same(request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {engine: measure(replace(request_for, engine=engine), ENGINES)["ids"] for engine in ENGINES if engine != "nested"}
    monkeypatch.setattr("evaluation.benchmarks.budget_engines.interpreter_bytes", lambda: 0)
    for budget in (2_000_000, 2_600_000):
        offloaded = measure(replace(request_for, engine="accelerate", budget_bytes=budget), ENGINES)
        assert offloaded["notes"]["modules_offloaded"] > 0
        said[f"accelerate, {budget}"] = offloaded["ids"]
    shortest = min(len(ids) for ids in said.values())
    assert shortest >= 8
    assert len({tuple(ids[:shortest]) for ids in said.values()}) == 1


def test_a_replayed_run_ends_at_its_mean(request_for: Request) -> None:
    result = measure(replace(request_for, engine="cats", replayed_acceptance=3.05, replayed_corrections=2.6, tokens=12), ENGINES)
    assert abs(result["tokens"] - 3.05 * result["steps"]) <= 0.5
    assert 7 < result["nodes_per_step"] < 11


@pytest.fixture(scope="module")
def nested_pair(request_for: Request) -> tuple[Path, Path]:
    """A checkpoint in bfloat16, and the nested one made of it."""
    folder = Path(request_for.model).parent
    published, nested = folder / "bfloat16", folder / "nested"
    make_checkpoint(base_config(folder / "config.json", None), torch.bfloat16, [], published)
    conversion.convert(conversion.conversion_of(published, nested))
    return published, nested


def test_nested_says_the_same_and_ends_at_its_mean(request_for: Request, nested_pair: tuple[Path, Path]) -> None:
    published, nested = nested_pair
    asked = replace(request_for, engine="nested", model=str(nested), adapters=None, steps=6)
    plain, found = measure(replace(request_for, model=str(published), adapters=None), ENGINES), measure(asked, ENGINES)
    shortest = min(len(plain["ids"]), len(found["ids"]))
    assert plain["ids"][:shortest] == found["ids"][:shortest]
    result = measure(replace(asked, replayed_acceptance=4.5, tokens=12), ENGINES)
    assert abs(result["tokens"] - 4.5 * result["steps"]) <= 0.5
    assert result["nodes_per_step"] == 7
    sizes = cats.load(nested, memory=cats.MemoryOptions(views=(COARSE,), pinning=False)).base.source.plan.sizes
    assert sizes is not None
    coarse = sum(piece.resident_bytes for piece in sizes.pieces if piece.part != "residual")
    assert result["notes"]["front_bytes_per_pass"] == 6 * (coarse + sizes.lm_head_bytes)
    with pytest.raises(CatsError, match=r"the run may take \d+ positions"):
        measure(replace(asked, positions=20), ENGINES)
    wide = measure(replace(asked, budget_bytes=2**33, positions=100), ENGINES)["notes"]["charges"]["KV caches"]
    assert wide == 2 * 32 * (100 + 7) * 4 * 6


def test_every_engine_takes_every_place() -> None:
    turns = in_turns(["a", "b", "c"], 3)
    assert [engine for repeat, engine in turns if repeat == 1] == ["b", "c", "a"]
    assert len(set(turns)) == 9


def record(engine: str, repeat: int, rate: float) -> dict[str, Any]:
    names = ("accepted_length", "disk_bytes_per_token", "load_seconds", "prefill_seconds", "seconds_per_step")
    return {"engine": engine, "repeat": repeat, "tokens_per_s": rate, **dict.fromkeys(names, 1.0), **NOTES}


def test_figures_are_paired_and_named() -> None:
    records = [record("plain", 0, 1.0), record("cats", 0, 3.0), record("plain", 1, 2.0), record("cats", 1, 5.0)]
    records.append({"engine": "mmap", "repeat": 0, "failed": "error: killed by the kernel at the memory limit"})
    held = {"disk_bytes_per_step": 0, "notes": {"arithmetic": "bfloat16", "version": "memopro 0.1.10"}}
    records.append(record("memopro", 0, 1.0) | held)
    rows = summarise(records, ["plain", "cats", "mmap", "memopro"], {"cats": 3.05, "nested": None})
    assert rows[1]["engine"] == "ours, CATS, replayed acceptance 3.05"
    assert rows[1]["against_plain"] == 2.75
    assert (rows[1]["bound_seconds"], rows[1]["times_bound"], rows[1]["group_peak_bytes"]) == (1.0, 1.0, 7)
    text = benchmark_budget.table(rows)
    assert "killed by the kernel" in text
    assert "| memopro, streamed weights, memopro 0.1.10 | 1.000" in text
    assert text.endswith("| 0.000 | - |\n"), "what reads nothing has no bound"
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_finished_runs_are_not_made_again(request_for: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    assert request_for.adapters is not None

    def pretend(request: Request, *_: object) -> dict[str, Any]:
        made.append(request.engine)
        return record(request.engine, 0, 1.0) if request.engine == "plain" else {"failed": "error: no"}

    monkeypatch.setattr(benchmark_budget, "one_run", pretend)
    output = tmp_path / "result.json"
    flags = f"--model-path {request_for.model} --engines plain mmap --memory-budget 1GB --no-limit --repeats 1 --output {output}".split()
    main(flags)
    main(flags)
    assert made == ["plain", "mmap", "mmap"]
    with pytest.raises(SystemExit):
        main([*flags, "--tokens", "9"])
    with pytest.raises(SystemExit):
        main([*flags, "--draft-adapter-path", request_for.adapters[0], "--shallow-adapter-path", request_for.adapters[1]])
    assert made == ["plain", "mmap", "mmap"], "runs of other settings or adapters are not taken up"
    for more in (["--engines", "nested"], ["--nested-acceptance", "3"], ["--nested-model-path", request_for.model]):
        with pytest.raises(SystemExit):
            main([*flags, *more])
    assert "NOT enforced" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("engine", PEERS)
def test_a_peer_that_is_missing_is_one_sentence(engine: str, request_for: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(CatsError, match=r"is not installed in the interpreter of the peers; give one that has it with --peer-python"):
        measure(replace(request_for, engine=engine), PEERS)


def test_a_peer_that_cannot_run_is_a_row(request_for: Request, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = f"--model-path {request_for.model} --engines llama_cpp --memory-budget 1GB --no-limit --repeats 1 --output {output}"
    main([*flags.split(), "--peer-python", sys.executable])
    assert re.search(r"\| llama.cpp, mapped GGUF \| [^|]*(is not installed|--gguf-path is missing)", output.with_suffix(".md").read_text())
    with pytest.raises(SystemExit):
        main([*flags.split(), "--peer-python", str(tmp_path / "python")])


def test_peers_need_nothing_of_ours() -> None:
    program = "import evaluation.benchmarks.peer_engines, sys; sys.exit(str({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "set()"


@pytest.mark.skipif(PEER_PYTHON is None, reason="no peers: CATS_PEER_PYTHON names no interpreter that has them (docs/peers.md)")
@pytest.mark.parametrize("engine", PEERS)
def test_peers_say_what_we_say(engine: str, tmp_path: Path) -> None:
    converted = {"llama_cpp": str(tmp_path / "tiny.gguf"), "airllm": str(tmp_path / "layers")}.get(engine)
    if engine == "llama_cpp":
        write_gguf.main([str(TINY), str(converted)])
    asked = Request(engine, str(TINY), None, None, tokens=6, prompt_tokens=12, converted=converted)
    found = one_run(asked, str(PEER_PYTHON), None, False, 600)
    ours = measure(replace(asked, engine="plain"), ENGINES)["ids"]
    assert found.get("ids", found) == ours[:8]


@needs_groups
def test_a_process_that_takes_more_than_its_limit_is_killed(tmp_path: Path) -> None:
    greedy = [sys.executable, "-c", "x = b'1' * 200_000_000"]
    outcome = run_limited(greedy, 60_000_000, None, tmp_path, tmp_path / "log.txt", 60)
    assert outcome.failure == "killed by the kernel at the memory limit"
    assert outcome.group_peak_bytes is not None
    assert outcome.group_peak_bytes <= 60_000_000
    modest = run_limited([sys.executable, "-c", "raise SystemExit('no wish')"], 60_000_000, None, tmp_path, tmp_path / "log.txt", 60)
    assert modest.failure == "no wish"
    assert not list((GROUPS / "memory").glob(f"cats-{os.getpid()}-*"))


def test_without_groups_the_benchmark_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.memory_run.GROUPS", tmp_path / "none")
    with pytest.raises(CatsError, match="--no-limit"):
        run_limited(["true"], 10**9, None, tmp_path, tmp_path / "log.txt", 10)
