"""What the ledger says is what is seen from outside: a fresh process on a random model of some size, streamed and resident."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import cats
from cats.adapter import AdapterModel
from cats.earlyexit import read_config
from cats.errors import CatsError
from cats.planning.plan import Demand, MemoryPlan
from cats.runtime.budget import Ledger
from tests.tiny_models import SHALLOW_EXIT, TinyModel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).resolve().parent.parent
SHARE = 0.02
CHILD = """
import json, pathlib, sys
import torch
torch.set_num_threads(1)
import cats

asked = json.loads(sys.argv[1])
status = lambda name: int(pathlib.Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024
model = cats.load(asked["model"], memory=cats.MemoryOptions(asked["budget"], positions=340, nodes=1))
ledger = model.base.source.ledger
pathlib.Path("/proc/self/clear_refs").write_text("5")
config, most = cats.GenerationConfig(max_new_tokens=3, eos_token_ids=()), 0
for step in cats.stream(model, list(range(5, 325)), "autoregressive", config):
    most = max(most, ledger.total)
print(json.dumps({
    "peak": status("VmHWM"), "most": most, "resident": status("VmRSS"), "total": ledger.total, "charged": model.base.source.plan.charged,
    "streamed": model.base.source.plan.streamed_bytes, "taken": ledger.taken,
}))
"""


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 million random weights in bfloat16."""
    sizes: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
    config = LlamaConfig(vocab_size=4000, max_position_embeddings=1024, num_hidden_layers=8, dtype="bfloat16", **sizes)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    directory = tmp_path_factory.mktemp("middling")
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    return directory


def run(model: Path, budget: int) -> dict[str, Any]:
    """What a fresh process that answers under a budget holds, and says."""
    command = [sys.executable, "-c", CHILD, json.dumps({"model": str(model), "budget": budget})]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


@pytest.mark.slow
def test_the_ledger_is_what_the_process_holds(middling: Path) -> None:
    """At its peak and after the answer; the budget is met with and without a stream."""
    resident = run(middling, 2 * 10**9)
    streamed = run(middling, resident["charged"] - 50 * 10**6)
    assert streamed["streamed"] > 0 == resident["streamed"]
    for report, budget in ((resident, resident["charged"]), (streamed, resident["charged"] - 50 * 10**6)):
        assert report["peak"] <= budget
        assert abs(report["most"] - report["peak"]) <= SHARE * report["peak"], report
        assert abs(report["total"] - report["resident"]) <= SHARE * report["resident"], report
        assert report["taken"]["KV caches"] == report["taken"]["activations"] == 0


def test_charges_are_given_back() -> None:
    ledger = Ledger(MemoryPlan(Demand(), 100, "process", frozenset(), (), 0, 0, (("KV caches", 60),)))
    ledger.charge("KV caches", 60)
    with pytest.raises(CatsError, match="KV caches would take 61 bytes and the memory plan grants 60 bytes"):
        ledger.charge("KV caches", 1)
    ledger.charge("KV caches", -60)
    ledger.charge("KV caches", 60)
    with pytest.raises(CatsError, match="adapters would take 1 bytes and the memory plan grants 0 bytes"):
        ledger.charge("adapters", 1)


def test_a_budget_of_weights_notes_what_it_does_not_count() -> None:
    ledger = Ledger(MemoryPlan(Demand(), 100, "weights", frozenset(), (), 0, 0, (("ring", 60),)))
    ledger.charge("KV caches", 10**6)
    assert ledger.taken["KV caches"] == 10**6
    with pytest.raises(CatsError, match="ring would take 61 bytes"):
        ledger.charge("ring", 61)


def test_adapters_of_several_sizes_are_charged_what_they_hold(tiny: Callable[[str], TinyModel], tmp_path: Path) -> None:
    """A decoder block holds several times what attention alone does."""
    base = tiny("llama").base
    large = AdapterModel(AdapterModel.config_for(read_config(base), "decoder"), SHALLOW_EXIT)
    large.save_pretrained(tmp_path / "large")
    model = cats.load(base, {"draft": tiny("llama").draft, "shallow": tmp_path / "large"}, memory=cats.MemoryOptions(10**10), plan=None)
    sizes = [adapter.nbytes for adapter in model.adapters.values()]
    assert sizes[1] > 1.5 * sizes[0]
    assert sum(sizes) <= dict(model.base.source.plan.charges)["adapters"] < sum(sizes) + len(sizes)
