"""A prompt of any length reads each streamed matrix once, and several answers share one stream; what comes out is what one would give.

Bytes are counted where they are taken from the ring, and once by a reader that stands in for the disk.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import cats
import cats.state
from cats.acceptance import build_acceptance
from cats.checkpoint import locate_tensors
from cats.engine import Limits, Sequenced, decode_together, read_prompt
from cats.planning.plan import PREFILL_ROWS
from cats.runtime.direct_file import window_bytes
from cats.state import DecodeState
from tests.methods import SHAPES
from tests.test_streaming import assert_equal, plan_of
from tests.test_streaming import run as short_answer
from tests.tiny_models import EOS, SHALLOW_EXIT, SIZES, TinyModel, build, prompts
from tests.weight_kinds import of_kind, views_of

Tiny = Callable[[str], TinyModel]
STREAMED = cats.MemoryOptions(pinning=False)
NARROW = cats.MemoryOptions(pinning=False, ring_buffers=1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny model with a context of 4,200 positions."""
    return build(tmp_path_factory.mktemp("long"), LlamaConfig(**(SIZES | {"max_position_embeddings": 4200})))


@cache
def loaded(model: TinyModel, memory: cats.MemoryOptions | None, kind: str = "plain") -> cats.MultiAdapterCATSModel:
    memory = None if memory is None else replace(memory, views=views_of(kind))
    return cats.load(of_kind(model.base, kind), model.adapters, memory=memory)


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    """No reader of this module's models outlives it."""
    yield
    loaded.cache_clear()
    gc.collect()


def prompt_of(length: int) -> list[int]:
    return torch.randint(EOS + 1, 48, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def started(model: cats.MultiAdapterCATSModel, prompt: list[int], shape: str, new: int) -> tuple[Sequenced, cats.Step]:
    """An answer whose prompt has been read."""
    method, config = cats.build_method(SHAPES[shape], model), cats.GenerationConfig(max_new_tokens=new, eos_token_ids=(EOS,))
    limits, acceptance = Limits(config, len(prompt), model.base.context, None), build_acceptance(config, model.base.device)
    state = DecodeState(model, prompt, method.adapters, len(prompt) + limits.room, method.max_nodes)
    first = read_prompt(state, acceptance, limits)
    method.start(state)
    return Sequenced(state, method, acceptance, limits), first


def streamed_set(model: cats.MultiAdapterCATSModel, base: Path) -> int:
    """Bytes of one stream: the windows of all that is streamed."""
    places, names = locate_tensors(base), model.base.source.names
    return sum(window_bytes(places[names[piece]]) for piece in plan_of(model).streamed)


def taken(model: cats.MultiAdapterCATSModel) -> int:
    streamer = model.base.source.streamer
    assert streamer is not None
    return streamer.bytes_taken


@pytest.mark.parametrize(
    ("kind", "length", "memory"),
    [
        *(("plain", length, STREAMED) for length in (100, 600, 1600)),
        pytest.param("plain", 4000, STREAMED, marks=pytest.mark.slow),
        *(("plain", 1600, NARROW), ("sum", 600, STREAMED), ("copy", 600, STREAMED)),
    ],
)
@torch.inference_mode()
def test_a_prompt_streams_each_matrix_once(long: TinyModel, kind: str, length: int, memory: cats.MemoryOptions) -> None:
    """And gives, bit for bit, what the resident model gives. A ring that cannot keep a sublayer streams once per group, as planned."""
    model, resident, prompt = loaded(long, memory, kind), loaded(long, None), prompt_of(length)
    groups = -(-length // PREFILL_ROWS)
    streams = 1 if memory is STREAMED else groups
    assert plan_of(model).streams(groups) == streams
    before = taken(model)
    (found, step), (expected, _) = started(model, prompt, "cascade-tree", 4), started(resident, prompt, "cascade-tree", 4)
    assert taken(model) - before == streams * streamed_set(model, of_kind(long.base, kind))
    assert step.trace.layer_passes == model.base.layer_count * streams
    assert torch.equal(found.state.cache.storage[..., :length, :], expected.state.cache.storage[..., :length, :])
    for name, adapter in found.state.adapters.items():
        assert torch.equal(adapter.cache.storage, expected.state.adapters[name].cache.storage)
    assert torch.equal(found.state.final_hidden_1D, expected.state.final_hidden_1D)


@pytest.mark.parametrize("ring_buffers", [2, 3, 4, 9])
@pytest.mark.parametrize(("family", "kind"), [("llama", "plain"), ("llama", "sum"), ("llama-grouped", "copy"), ("qwen2", "plain")])
def test_answers_after_a_prompt_in_groups(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, family: str, kind: str, ring_buffers: int) -> None:
    """The ring is met at every place that the passes before have left it at."""
    monkeypatch.setattr(cats.state, "PREFILL_ROWS", 3)
    model = loaded(tiny(family), cats.MemoryOptions(pinning=False, ring_buffers=ring_buffers), kind)
    expected = short_answer(loaded(tiny(family), None), "cascade-tree")
    for _ in range(3):
        assert_equal(short_answer(model, "cascade-tree"), expected)


@pytest.mark.parametrize(("memory", "said"), [(STREAMED, "1"), (NARROW, f"1 every {PREFILL_ROWS} tokens")])
def test_streams_per_prompt_are_printed(long: TinyModel, memory: cats.MemoryOptions, said: str) -> None:
    report = dict(line.split("  ", 1) for line in loaded(long, memory).base.source.report() if line.count("  "))
    assert report["streams per prompt"].strip() == said


def together(model: cats.MultiAdapterCATSModel, asked: list[list[int]], shapes: list[str]) -> tuple[list[list[int]], list[int]]:
    """Answers made together, and the bytes that each target pass took."""
    started_answers = [started(model, prompt, shape, 12) for prompt, shape in zip(asked, shapes, strict=True)]
    found, passes = [list(step.tokens) for _, step in started_answers], []
    open_answers = {place: answer for place, (answer, step) in enumerate(started_answers) if step.finish is None}
    while open_answers:
        before = taken(model)
        steps = decode_together(list(open_answers.values()))
        passes.append(taken(model) - before)
        for (place, _), step in zip(list(open_answers.items()), steps, strict=True):
            found[place] += step.tokens
            if step.finish is not None:
                del open_answers[place]
    return found, passes


MIXED = ["cascade-chain", "autoregressive", "kangaroo", "eagle-tree"]


@pytest.mark.parametrize("kind", ["plain", "sum"])
@pytest.mark.parametrize("shapes", [["cascade-tree"] * 4, ["autoregressive"] * 4, MIXED], ids=["trees", "plain", "mixed"])
@torch.inference_mode()
def test_four_answers_share_one_stream(tiny: Tiny, kind: str, shapes: list[str]) -> None:
    model, resident, asked = loaded(tiny("llama"), STREAMED, kind), loaded(tiny("llama"), None), prompts(4, 20, seed=11)
    config = cats.GenerationConfig(max_new_tokens=12, eos_token_ids=(EOS,))
    alone = [
        cats.generate(resident, prompt, SHAPES[shape], config).ids for prompt, shape in zip(asked, shapes, strict=True)
    ]
    found, passes = together(model, asked, shapes)
    assert found == alone
    assert set(passes) == {streamed_set(model, of_kind(tiny("llama").base, kind))}


@torch.inference_mode()
def test_answers_that_the_ring_cannot_serve_together_stream_in_turns(tiny: Tiny) -> None:
    model, asked = loaded(tiny("llama"), NARROW), prompts(4, 20, seed=11)
    found, passes = together(model, asked, ["cascade-chain"] * 4)
    assert found == together(loaded(tiny("llama"), STREAMED), asked, ["cascade-chain"] * 4)[0]
    assert max(passes) == 4 * streamed_set(model, tiny("llama").base)


def test_a_failure_while_a_sublayer_is_kept_leaves_the_stream_usable(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cats.state, "PREFILL_ROWS", 3)
    model = loaded(tiny("llama"), STREAMED)
    with monkeypatch.context() as patched:
        patched.setattr(model.base, "_transform", lambda group, layer: 1 / (layer - SHALLOW_EXIT))
        with pytest.raises(ZeroDivisionError):
            short_answer(model, "cascade-chain")
    assert_equal(short_answer(model, "cascade-chain"), short_answer(loaded(tiny("llama"), None), "cascade-chain"))
