"""Ways to decode a model larger than memory, one process each: ours (plain, CATS, nested), accelerate's disk offload, mapped files.

    python -m evaluation.benchmarks.budget_engines REQUEST.json RESULT.json        (budget.py calls it)

All read the same safetensors shards, but for nested, which reads the nested checkpoint made of them. What is timed: committed tokens after
the prompt and one warm-up step.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import cats
from cats.checkpoint import locate_tensors, weight_files
from cats.cli.command import exit_with_sentence
from cats.config import MemoryOptions, MethodConfig, require
from cats.methods import with_needs
from cats.planning.plan import COARSE, EXACT, MemoryPlan, View
from cats.runtime.budget import interpreter_bytes
from evaluation.benchmarks.greedy_loop import greedy_loop
from evaluation.benchmarks.timed_run import EXTRA_CYCLES, Engine, Request, Step, answer
from evaluation.replay import ReplayedAcceptance, Schedule, replayed

CYCLES = 10_000
"""Length of a replayed schedule; longer than any run."""


def longest_answer(request: Request) -> int:
    """Tokens that a run may commit, so that no tree is cut by the end of the answer while it is timed."""
    a_pass = request.steps + 2 if request.replayed_acceptance is None else math.ceil(request.replayed_acceptance)
    longest = request.tokens + (EXTRA_CYCLES + 1) * a_pass + 2 * (request.steps + 2) + 1
    if request.positions is None:
        return longest
    least = request.prompt_tokens + longest
    require(least <= request.positions, f"the run may take {least} positions; give as many, or time fewer tokens.")
    return request.positions - request.prompt_tokens


def ours(request: Request, config: MethodConfig, adapters: dict[str, tuple[str, int | None]], schedule: Schedule | None = None) -> Engine:
    """Our engine under a memory plan, accepting what a schedule says where there is one."""
    torch.set_num_threads(request.threads)
    settings = cats.GenerationConfig(max_new_tokens=longest_answer(request), eos_token_ids=())
    memory = None
    if request.budget_bytes is not None:
        positions = request.prompt_tokens + settings.max_new_tokens
        memory = with_needs(MemoryOptions(request.budget_bytes, ring_buffers=request.ring_buffers, positions=positions), config)
    dtypes = {"dtype": request.dtype, "compute_dtype": request.compute_dtype}
    model = cats.load(request.model, adapters, memory=memory, plan=None, **dtypes)
    method = cats.build_method(config, model) if schedule is None else replayed(config, schedule, model)
    rule = None if schedule is None else ReplayedAcceptance(schedule)

    def steps(prompt: Sequence[int]) -> Iterator[Step]:
        for step in cats.stream(model, prompt, method, settings, acceptance=rule):
            yield Step(step.tokens, step.trace)

    plan = model.base.source.plan
    front = front_bytes(plan, config, {name: int(adapter.exit_layer or 0) for name, adapter in model.adapters.items()})
    notes = {"arithmetic": str(model.base.dtype).removeprefix("torch."), "front_bytes_per_pass": front}
    return Engine(steps, {**notes, **plan_notes(plan)})


def front_bytes(plan: MemoryPlan, config: MethodConfig, exits: dict[str, int]) -> int:
    """Bytes of weights that drafting and shallow verification multiply by in a cycle, each time that they do."""
    sizes = plan.sizes
    if sizes is None:
        raise cats.CatsError("this plan does not know the sizes of its model; load the model anew.")

    def layers(first: int, last: int, view: View) -> int:
        return sum(piece.resident_bytes for piece in sizes.pieces if first <= piece.layer < last and view.needs(piece))

    if isinstance(config, cats.NestedConfig):
        return config.steps * (layers(0, sizes.layers, COARSE) + sizes.lm_head_bytes)
    if isinstance(config, cats.CascadeConfig):
        leaving = sizes.adapter_bytes + sizes.lm_head_bytes
        checking = layers(exits["draft"], exits["shallow"], EXACT) + leaving
        return config.steps * (layers(0, exits["draft"], EXACT) + leaving) + checking
    return 0


def plan_notes(plan: MemoryPlan) -> dict[str, Any]:
    """What a memory plan streams and holds."""
    return {"streamed_bytes_per_pass": plan.streamed_bytes, "charges": dict(plan.charges), "pinned_matrices": len(plan.pinned)}


def ours_plain(request: Request) -> Engine:
    """Plain decoding with pinned weights."""
    return ours(request, cats.AutoregressiveConfig(), {})


def ours_cats(request: Request) -> Engine:
    """CATS, with replayed acceptance where the request says so."""
    if request.adapters is None:
        raise cats.CatsError("CATS needs a draft and a shallow adapter; give --draft-adapter-path and --shallow-adapter-path.")
    adapters: dict[str, tuple[str, int | None]] = dict(zip(("draft", "shallow"), ((path, None) for path in request.adapters), strict=True))
    config = cats.CascadeConfig(steps=request.steps, tree_topk=request.tree_topk, total_tokens=request.total_tokens)
    if request.replayed_acceptance is None:
        return ours(request, config, adapters)
    schedule = Schedule.with_mean(request.replayed_acceptance, config, request.replayed_corrections, cycles=CYCLES)
    return ours(request, config, adapters, schedule)


def ours_nested(request: Request) -> Engine:
    """A chain of nested weights, with replayed acceptance where the request says so."""
    config = cats.NestedConfig(steps=request.steps, adaptive=False)
    replay = request.replayed_acceptance
    return ours(request, config, {}, None if replay is None else Schedule.with_mean(replay, config, cycles=CYCLES))


def empty_model(request: Request) -> Any:
    """transformers' own model without weights; what is computed from the configuration is there."""
    config = AutoConfig.from_pretrained(request.model)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()


def mapped_files(request: Request) -> Engine:
    """Weights as views of memory-mapped shards: the kernel fetches and evicts their pages."""
    model = empty_model(request)
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(request.model):
        state.update(load_file(path))
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return greedy_loop(model, request)


def accelerate_offload(request: Request) -> Engine:
    """accelerate's hooks: what fits beside the interpreter stays, the rest is fetched from the shards layer by layer, in every pass."""
    model = empty_model(request)
    room = None if request.budget_bytes is None else {"cpu": max(0, request.budget_bytes - interpreter_bytes())}
    blocks = list(getattr(model, "_no_split_modules", None) or ())
    device_map = infer_auto_device_map(model, max_memory=room, no_split_module_classes=blocks)
    offloaded = [name for name, device in device_map.items() if device == "disk"]
    places = locate_tensors(request.model)
    index = {
        name: {"safetensors_file": str(place.path), "weight_name": name, "dtype": str(place.dtype).removeprefix("torch.")}
        for name, place in places.items()
        if any(module == "" or name.startswith(f"{module}.") for module in offloaded)
    }
    tensors = {name: read_copy(place.path, name) for name, place in places.items() if name not in index}
    model.load_state_dict(tensors, strict=False, assign=True)
    if offloaded:
        model = dispatch_model(model, device_map, main_device="cpu", offload_index=index)
    return greedy_loop(model, request, {"modules_offloaded": len(offloaded), "modules": len(device_map)})


def read_copy(path: Path, name: str) -> torch.Tensor:
    """One tensor in memory of its own."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


ENGINES: dict[str, Callable[[Request], Engine]] = {
    "plain": ours_plain,
    "cats": ours_cats,
    "nested": ours_nested,
    "accelerate": accelerate_offload,
    "mmap": mapped_files,
}


@exit_with_sentence
def main(argv: Sequence[str] | None = None) -> None:
    """Run what the first file asks for, write the second."""
    answer(sys.argv[1:] if argv is None else argv, ENGINES)


if __name__ == "__main__":
    main()
