"""On a CUDA device: the tokens of the CPU's arithmetic, streams that nothing waits for, and a host that waits for no drafted token.

Skipped where there is no device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import cats
from cats.methods.chain import draft_chain
from cats.state import Cycle, DecodeState
from tests.methods import SHAPES
from tests.test_streaming import assert_equal, run
from tests.tiny_models import TinyModel, prompts
from tests.weight_kinds import of_kind, options_of, plain_of

Tiny = Callable[[str], TinyModel]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STREAMED = cats.MemoryOptions(pinning=False, ring_buffers=2)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for everything in the block that makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loaded(tiny: TinyModel, memory: cats.MemoryOptions | None, kind: str = "plain") -> cats.MultiAdapterCATSModel:
    return cats.load(of_kind(tiny.base, kind), tiny.adapters, dtype="float32", device="cuda", memory=memory)


@pytest.mark.parametrize("kind", ["plain", "sum", "copy", "nested", "int8"])
@pytest.mark.parametrize("shape", ["autoregressive", "cascade-tree", "kangaroo"])
def test_streamed_is_resident(tiny: Tiny, kind: str, shape: str) -> None:
    memory = options_of(kind, cats.MemoryOptions(pinning=False, ring_buffers=2))
    resident = cats.load(plain_of(tiny("llama").base, kind), tiny("llama").adapters, dtype="float32", device="cuda")
    assert_equal(run(loaded(tiny("llama"), memory, kind), shape), run(resident, shape))


@pytest.mark.parametrize("memory", [None, STREAMED], ids=["resident", "streamed"])
def test_a_drafted_chain_waits_for_nothing(tiny: Tiny, memory: cats.MemoryOptions | None) -> None:
    """Up to the one transfer at its end, which is taken out here."""
    model, prompt = loaded(tiny("llama"), memory), prompts(1, 10, seed=1)[0]
    method = cats.build_method(SHAPES["cascade-chain"])
    with torch.inference_mode():
        state = DecodeState(model, prompt, method.adapters, len(prompt) + 20, method.max_nodes)
        state.read_prompt()
        state.tokens.append(5)
        cycle, node = Cycle(state, 10), 0
        draft_chain(Cycle(state, 10), "draft", 0, 3, 0.0, 1)  # rotary tables and work spaces are made at first use
        with no_waiting():
            for _ in range(5):
                cycle.advance([node], state.exits["draft"])
                best = cycle.adapter_logits("draft", [node])[0].argmax()
                node = cycle.tree.add_unknown(node, "trunk")
                cycle.name_token(node, best)


def test_a_target_pass_waits_for_nothing(tiny: Tiny) -> None:
    """Streamed matrices come by events; trees bring their masks and indices along."""
    model, prompt = loaded(tiny("llama"), STREAMED), prompts(1, 10, seed=2)[0]
    with torch.inference_mode():
        state = DecodeState(model, prompt, (), len(prompt) + 20, 8)
        state.read_prompt()
        state.tokens.append(5)
        for guarded in (False, True):
            cycle = Cycle(state, 10)
            nodes = [0, *(cycle.tree.add(parent, token, "sibling") for parent, token in ((0, 3), (0, 4), (1, 5), (2, 6)))]
            if guarded:
                with no_waiting():
                    cycle.target_logits(nodes)
            else:
                cycle.target_logits(nodes)


def test_staging_is_charged(tiny: Tiny) -> None:
    source = loaded(tiny("llama"), STREAMED).base.source
    streamer = source.streamer
    assert streamer is not None
    assert source.ledger.taken["staging"] == 2 * max(streamed.place.nbytes for streamed in streamer.order)
