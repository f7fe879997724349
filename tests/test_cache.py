"""After every step every cache equals, entry for entry, one computed from scratch by transformers' own cache.

Base and adapters alike; what an adapter has not read yet must wait in `pending`, and be the right exit state.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import cats
from cats.acceptance import build_acceptance
from cats.engine import Limits, Step, decode_step, read_prompt
from cats.kv_cache import KVCache
from cats.state import AdapterState, DecodeState
from tests.methods import SHAPES, memory_for
from tests.scripted_model import random_script, scripted_model
from tests.tiny_models import TinyModel, prompts

Tiny = Callable[[str], TinyModel]
SPECULATIVE = [shape for shape in SHAPES if shape != "autoregressive"]


def steps(
    model: cats.MultiAdapterCATSModel, prompt: list[int], shape: str, config: cats.GenerationConfig
) -> Iterator[tuple[DecodeState, Step]]:
    """The state after each step of an answer."""
    method, limits = cats.build_method(SHAPES[shape], model), Limits(config, len(prompt), model.base.context, None)
    state = DecodeState(model, prompt, method.adapters, len(prompt) + limits.room, method.max_nodes)
    acceptance = build_acceptance(config, model.base.device)
    step = read_prompt(state, acceptance, limits)
    method.start(state)
    yield state, step
    while step.finish is None:
        step = decode_step(state, method, acceptance, limits)
        yield state, step


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-6, msg=lambda text: f"{what}: {text}")


def assert_cache_holds(cache: KVCache, length: int, scratch: DynamicCache, what: str) -> None:
    for layer, entries in enumerate(scratch.layers):
        assert isinstance(entries, DynamicLayer)
        for part, expected in enumerate((entries.keys, entries.values)):
            assert expected is not None
            assert_close(cache.storage[layer, part][:, :, :length], expected[:, :, :length], f"{what}, layer {layer}")


def assert_state_is_sound(state: DecodeState) -> None:
    """Caches hold every committed token but the root; adapters hold or still await them."""
    base, cached = state.base, state.tokens[:-1]
    assert state.cache.length == len(cached)
    ids = torch.tensor([cached])
    scratch = DynamicCache(config=base.config)
    hidden, exits = base.embed_tokens(ids), {}
    for layer in range(base.layer_count):
        hidden = base.forward_draft_or_large_model(
            hidden_states=hidden,
            start_layer=layer,
            end_layer=layer + 1,
            past_key_values=scratch,  # type: ignore[arg-type]
        )
        exits[layer + 1] = hidden
    assert_cache_holds(state.cache, len(cached), scratch, "base")
    assert_close(state.final_hidden_1D, exits[base.layer_count][0, -1:], "final state")
    for name, adapter in state.adapters.items():
        assert_adapter_is_sound(adapter, exits[state.exits[name]], name)


def assert_adapter_is_sound(adapter: AdapterState, exit_1ND: torch.Tensor, name: str) -> None:
    read = adapter.cache.length
    assert read + len(adapter.pending_ND) == exit_1ND.shape[1], name
    assert_close(adapter.pending_ND, exit_1ND[0, read:], f"{name}, pending")
    scratch = DynamicCache()
    adapter.adapter(exit_1ND, past_key_values=scratch)
    assert_cache_holds(adapter.cache, read, scratch, name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama-grouped", "llama-biases", "qwen2", "qwen3"])
@torch.inference_mode()
def test_caches_equal_caches_from_scratch(tiny: Tiny, family: str, shape: str) -> None:
    model = cats.load(tiny(family).base, tiny(family).adapters, dtype="float64", memory=memory_for(shape))
    for prompt in prompts(count=2, longest=12, seed=3):
        for state, _ in steps(model, prompt, shape, cats.GenerationConfig(max_new_tokens=24, eos_token_ids=())):
            assert_state_is_sound(state)


@pytest.mark.parametrize("shape", SPECULATIVE)
@torch.inference_mode()
def test_caches_are_sound_after_sampled_paths(tiny: Tiny, shape: str) -> None:
    """At T > 0 paths turn off the trunk often."""
    model = cats.load(tiny("llama").base, tiny("llama").adapters, dtype="float64", memory=memory_for(shape))
    config = cats.GenerationConfig(max_new_tokens=40, eos_token_ids=(), temperature=3.0, seed=1)
    for state, _ in steps(model, prompts(count=1, longest=12, seed=4)[0], shape, config):
        assert_state_is_sound(state)


@torch.inference_mode()
def test_every_kind_of_node_has_been_accepted_and_checked() -> None:
    """Trunk, sibling, correction and continuation, and paths that mix them: on a small vocabulary, at a high temperature."""
    target, draft, shallow = (random_script(6, seed, spread=0.7) for seed in range(3))
    model = scripted_model(target, draft, shallow, context=128)
    config = cats.GenerationConfig(max_new_tokens=110, eos_token_ids=(), temperature=1.0, seed=2)
    last: Counter[str] = Counter()
    mixed: Counter[frozenset[str]] = Counter()
    for shape in ("cascade-tree", "cascade-rounds"):
        for state, step in steps(model, [1, 2, 3], shape, config):
            assert_state_is_sound(state)
            last.update(step.trace.accepted_kinds[-1:])
            mixed[frozenset(step.trace.accepted_kinds)] += 1
    assert set(last) == {"trunk", "sibling", "correction", "continuation"}
    assert mixed[frozenset({"trunk", "correction"})]
    assert mixed[frozenset({"correction", "continuation"})]
