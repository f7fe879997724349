"""Models run compiled: transformers' layers to rounding, and plain decoding's logits bit for bit, whatever stands beside a row."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cats
from cats import kernels
from cats.acceptance import Greedy, Verdict
from cats.masks import causal_sight
from cats.planning.plan import View
from cats.rows import Rows
from cats.state import Cycle, DecodeState
from cats.tree import TokenTree
from tests.methods import SHAPES, memory_for
from tests.tiny_models import EOS, FAMILIES, TinyModel, prompts

if kernels.why_not() is not None:
    pytest.skip(f"nothing is compiled here: {kernels.why_not()}", allow_module_level=True)

Tiny = Callable[[str], TinyModel]
PROMPT = prompts(count=1, longest=20, seed=4)[0]


class Committed(Greedy):
    """Greedy acceptance that keeps the target's logits at every committed position."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def judge(self, tree: TokenTree, nodes: Sequence[int], logits_TV: torch.Tensor) -> Verdict:
        verdict = super().judge(tree, nodes, logits_TV)
        self.logits += [logits_TV[list(nodes).index(node)].clone() for node in verdict.path]
        return verdict


def committed(model: cats.MultiAdapterCATSModel, shape: str) -> torch.Tensor:
    """The logits of an answer, position by position."""
    witness = Committed()
    cats.generate(model, PROMPT, SHAPES[shape], cats.GenerationConfig(max_new_tokens=24, eos_token_ids=(EOS,)), acceptance=witness)
    return torch.stack(witness.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_are_transformers_layers(tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cats.load(tiny(family).base, tiny(family).adapters)
    assert model.base.compiled is not None
    assert all(adapter.compiled is not None for adapter in model.adapters.values())
    found = committed(model, "cascade-tree")
    monkeypatch.setattr(kernels, "why_not", lambda: "a test")
    plain = cats.load(tiny(family).base, tiny(family).adapters)
    assert plain.base.compiled is None
    torch.testing.assert_close(found, committed(plain, "cascade-tree"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("memory", [None, cats.MemoryOptions(pinning=False)], ids=["resident", "streamed"])
def test_every_methods_logits_are_plain_decodings(tiny: Tiny, shape: str, dtype: str, memory: cats.MemoryOptions | None) -> None:
    base, adapters = tiny("llama-grouped").base, tiny("llama-grouped").adapters
    model = cats.load(base, adapters, dtype=dtype, memory=memory_for(shape, memory), plan=None)
    assert model.base.compiled is not None
    plain, found = committed(model, "autoregressive"), committed(model, shape)
    length = min(len(plain), len(found))
    assert length > 10
    assert torch.equal(plain[:length], found[:length])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trees_logits_are_plain_decodings_in_every_family(tiny: Tiny, family: str) -> None:
    model = cats.load(tiny(family).base, tiny(family).adapters)
    plain, found = committed(model, "autoregressive"), committed(model, "cascade-rounds")
    length = min(len(plain), len(found))
    assert torch.equal(plain[:length], found[:length])


def test_the_number_of_threads_shows_in_no_bit(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(committed(model, "cascade-tree"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [None, cats.MemoryOptions(pinning=False)], ids=["resident", "streamed"])
@torch.inference_mode()
def test_a_node_among_two_hundred_behind_two_thousand_positions(tmp_path: Path, dtype: str, memory: cats.MemoryOptions | None) -> None:
    """Logits of nodes that are run together in a tree, in parts of it, and alone after their ancestors."""
    directory, rng, nodes = long_context(tmp_path), random.Random(0), 200
    model = cats.load(directory, dtype=dtype, memory=memory, plan=None)
    state = DecodeState(model, [rng.randrange(50) for _ in range(2000)], (), 2001, nodes)
    state.read_prompt()
    state.tokens.append(7)
    parents = [0, *(rng.randrange(max(1, node - 20), node + 1) - 1 for node in range(2, nodes))]
    tokens = [rng.randrange(50) for _ in range(nodes)]

    def grown() -> Cycle:
        cycle = Cycle(state, nodes)
        for node, parent in enumerate(parents, start=1):
            assert cycle.tree.add(parent, tokens[node] + 50 * (node % 3), "trunk") == node
        return cycle

    together = grown().target_logits(range(nodes))
    for count in (2, 7, 40):
        assert torch.equal(grown().target_logits(range(count)), together[:count])
    for node in (1, 50, 199):
        cycle = grown()
        for step in cycle.tree.path(node):
            alone = cycle.target_logits([step])
        assert torch.equal(alone[0], together[node])
    state.close()


def long_context(directory: Path) -> Path:
    """A random model of three layers that sees 2,300 positions."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    config = LlamaConfig(vocab_size=200, max_position_embeddings=2300, eos_token_id=EOS, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("view", [View(mlp=frozenset({1, 4})), View(attention=frozenset({2, 3}), mlp=frozenset({2}))])
def test_views_that_leave_sublayers_out_run_in_one_call(tiny: Tiny, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states as sublayer by sublayer through transformers' layers, and as many layers counted."""
    base = cats.load(tiny("llama-grouped").base).base
    assert base.compiled is not None
    calls, call = [], base.compiled._call
    monkeypatch.setattr(base.compiled, "_call", lambda *arguments: calls.append(1) or call(*arguments))  # type: ignore[func-returns-value]

    def states() -> tuple[torch.Tensor, int]:
        with torch.inference_mode():
            hidden = base.embed_tokens(torch.tensor([PROMPT]))
            rope, count = base.rope.rows(torch.arange(len(PROMPT)), base.dtype), len(PROMPT)
            sight = causal_sight(count, 0, base.dtype, base.device)
            rows = Rows(hidden, rope, sight, base.new_cache(count), slice(0, count), count)
            passes = base.run_layers([rows], 0, base.layer_count, view)
        return rows.hidden_BTD, passes

    found, passes = states()
    assert len(calls) == 1
    monkeypatch.setattr(base, "compiled", None)
    expected, counted = states()
    assert passes == counted
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
