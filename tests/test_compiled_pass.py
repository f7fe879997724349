"""Models run compiled: transformers' layers to rounding, and plain decoding's logits bit for bit, whatever stands beside a row."""

from collections.abc import Callable, Sequence

import pytest
import torch

import cats
from cats import kernels
from cats.acceptance import Greedy, Verdict
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
    cats.generate(
        model, PROMPT, SHAPES[shape], cats.GenerationConfig(max_new_tokens=24, eos_token_ids=(EOS,)), acceptance=witness
    )
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
