"""Who holds what of a process that answers: by the formula of the memory plan, by the ledger, and from outside.

A request is measured in a fresh process (`in_child`), which loads, answers, and says what the ledger counted at its peak and the most
that was resident meanwhile (VmHWM). Linux only.

    python -m evaluation.memory_parts '{"directory": ..., "method": "cascade_tree", ...}'     the child: one JSON line
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import cats
from cats.cli.command import exit_with_sentence
from cats.methods import with_needs
from cats.planning.plan import LIBRARIES, activation_bytes, fixed_charges, kv_bytes
from evaluation.memory_run import peak_bytes, python_command, reset_peak
from evaluation.presets import parse_preset

FIRST_ID = 5
"""Of the prompt's tokens, which mean nothing: memory does not depend on them."""


@dataclass(frozen=True)
class Request:
    """What a process shall hold, and do.

    Attributes:
        adapters: places and exits, by role.
        method: a preset.
        budget: in bytes, of what `covers` says; None: everything is resident.
        ring: in largest matrices; None: the usual one.
    """

    directory: str
    method: str
    budget: int | None
    covers: str = "weights"
    adapters: dict[str, list[Any]] = field(default_factory=dict)
    dtype: str = "auto"
    prompt: int = 32
    new_tokens: int = 8
    threads: int = 1
    ring: int | None = None


def measured(request: Request) -> dict[str, Any]:
    """In this process: bytes by part, of the formula and of the ledger at its peak; of the process the most that was resident."""
    torch.set_num_threads(request.threads)
    _, method = parse_preset(request.method)
    positions = request.prompt + request.new_tokens
    covers = request.covers if request.budget is not None else "process"
    memory = with_needs(cats.MemoryOptions(request.budget, covers, positions=positions, ring_buffers=request.ring), method)
    adapters = {role: (Path(place), exit_layer) for role, (place, exit_layer) in request.adapters.items()}
    model = cats.load(request.directory, adapters, request.dtype, memory=memory, plan=None)
    ledger, plan = model.base.source.ledger, model.base.source.plan
    reset_peak()
    config, most, parts = cats.GenerationConfig(max_new_tokens=request.new_tokens, eos_token_ids=()), 0, dict[str, int]()
    for _ in cats.stream(model, list(range(FIRST_ID, FIRST_ID + request.prompt)), method, config):
        if ledger.total > most:
            most, parts = ledger.total, dict(ledger.taken)
    paged = most - sum(parts.values())
    return {
        "granted": plan.charged,
        "ledger": most,
        "process": peak_bytes(),
        "streamed": plan.streamed_bytes,
        "ring": plan.ring_bytes,
        "formula_parts": formula_parts(model),
        "ledger_parts": {name: nbytes for name, nbytes in parts.items() if nbytes} | {LIBRARIES: parts.get(LIBRARIES, 0) + paged},
        "tree": tree_bytes(model),
    }


def formula_parts(model: cats.MultiAdapterCATSModel) -> dict[str, int]:
    """What the plan grants, and what it would grant to the parts that a budget of weights does not count."""
    plan = model.base.source.plan
    assert plan.sizes is not None  # every load plans
    return dict(fixed_charges(plan.sizes, plan.demand, "process")) | dict(plan.charges)


def tree_bytes(model: cats.MultiAdapterCATSModel) -> int:
    """What of KV caches and activations is there for the tree's nodes beyond one, by the formula."""
    plan = model.base.source.plan
    assert plan.sizes is not None  # every load plans
    alone = replace(plan.demand, nodes=1)
    return sum(function(plan.sizes, plan.demand) - function(plan.sizes, alone) for function in (kv_bytes, activation_bytes))


def in_child(request: Request) -> dict[str, Any]:
    """`measured` in a fresh process; its failure raises `CatsError` with its words."""
    command = python_command("evaluation.memory_parts", json.dumps(dataclasses.asdict(request)))
    root = Path(__file__).resolve().parents[1]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if ended.returncode:
        words = (ended.stderr.strip() or "no words").splitlines()[-1].removeprefix("error: ")
        raise cats.CatsError(f"{request.method} under {request.budget} bytes: {words}")
    result: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Measure the request that is the only argument."""
    text = (sys.argv[1:] if argv is None else argv)[0]
    print(json.dumps(measured(Request(**json.loads(text)))))


if __name__ == "__main__":
    main()
