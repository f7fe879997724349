"""A memory budget, checked from outside in fresh processes: peak memory, private data, and what was really read from the disk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cats import CatsError, MemoryOptions, load

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits RLIMIT_DATA as Linux does")

CHILD = """
import json, pathlib, resource, sys
import torch
torch.set_num_threads(1)
import cats
from cats.planning.plan import parse_amount

asked = json.loads(sys.argv[1])
status = lambda: dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
kilobytes = lambda name: int(status()[name].split()[0]) * 1024
read = lambda: int(dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())["read_bytes"])

budget = asked["budget"]
if asked["limit_data"]:
    limit = kilobytes("VmData") + budget
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
adapters = {name: (path, None) for name, path in asked["adapters"].items()}
kind = cats.CascadeConfig(tree_topk=4, total_tokens=24) if adapters else cats.AutoregressiveConfig()
method = cats.build_method(kind)
memory = cats.MemoryOptions(budget, asked["covers"], pinning=asked["pinning"], ring_buffers=2, positions=256, nodes=method.max_nodes)
model = cats.load(asked["model"], adapters, dtype="float32", memory=memory, plan=None)
config = cats.GenerationConfig(max_new_tokens=asked["tokens"], eos_token_ids=())
cycles, before, ids = [], read(), []
if asked["threads"] > 1:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(asked["threads"]) as pool:
        make = lambda _: cats.generate(model, list(range(5, 60)), cats.build_method(kind), config).ids
        ids = list(pool.map(make, range(2 * asked["threads"])))
for step in cats.stream(model, list(range(5, 60)), method, config) if asked["threads"] == 1 else ():
    cycles.append((read() - before, step.trace.bytes_streamed))
    before, ids = read(), ids + step.tokens
source = model.base.source
print(json.dumps({
    "peak": kilobytes("VmHWM"), "charged": source.plan.charged, "streamed": source.plan.streamed_bytes,
    "mode": source.streamer.mode if source.streamer else None, "cycles": cycles, "ids": ids,
}))
"""


def run(budget: int | None, *, adapters: bool = True, covers: str = "process", **changes: Any) -> tuple[int, dict[str, Any], str]:
    """Exit status, report and error output of a fresh process that answers under a budget."""
    names = {"draft": str(TINY / "adapters" / "draft_exit2"), "shallow": str(TINY / "adapters" / "shallow_exit6")} if adapters else {}
    asked = {"model": str(TINY), "adapters": names, "budget": budget, "covers": covers}
    asked |= {"pinning": True, "limit_data": False, "tokens": 24, "threads": 1}
    command = [sys.executable, "-c", CHILD, json.dumps(asked | changes)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return ended.returncode, json.loads(ended.stdout) if ended.returncode == 0 else {}, ended.stderr


@pytest.fixture(scope="module")
def unlimited() -> dict[str, Any]:
    """CATS where everything behind the front is streamed and no limit matters."""
    status, report, errors = run(10**12, pinning=False)
    assert status == 0, errors
    return report


def test_the_process_stays_under_its_budget_and_a_kernel_limit_of_it_is_enough(unlimited: dict[str, Any]) -> None:
    """RLIMIT_DATA counts every private mapping, used or not."""
    budget = unlimited["charged"] + 10 * 2**20  # what the interpreter holds differs a little from one process to the next
    status, tight, errors = run(budget, limit_data=True)
    assert status == 0, errors
    assert tight["peak"] <= budget
    assert tight["ids"] == unlimited["ids"]


def test_eight_threads_stay_under_the_budget_and_agree(unlimited: dict[str, Any]) -> None:
    budget = unlimited["charged"] + 10 * 2**20
    status, together, errors = run(budget, threads=8)
    assert status == 0, errors
    assert together["peak"] <= budget
    assert together["ids"] == [unlimited["ids"]] * 16


def test_plain_decoding_stays_under_its_budget(unlimited: dict[str, Any]) -> None:
    budget = unlimited["charged"] - 2 * 2**20
    status, plain, errors = run(budget, adapters=False)
    assert status == 0, errors
    assert plain["peak"] <= budget


def test_a_budget_too_small_is_refused_in_one_sentence() -> None:
    with pytest.raises(CatsError, match="the whole process needs at least"):
        load(TINY, {}, memory=MemoryOptions(50 * 10**6))


def test_what_is_read_from_the_disk_is_what_the_ledger_says() -> None:
    """Pinned layers are never read again, and the page cache hides nothing."""
    _, report, _ = run(9_000_000, covers="weights", tokens=64)
    if report["mode"] != "direct":
        pytest.skip(f"files are read in mode {report['mode']!r} here, which the kernel accounts otherwise")
    cycles = report["cycles"][1:]
    read, ledger = (sum(cycle[place] for cycle in cycles) for place in (0, 1))
    assert ledger >= report["streamed"] * len(cycles)
    assert abs(read - ledger) <= 0.01 * ledger
