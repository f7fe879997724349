"""The dtype of weights and that of the arithmetic: one rule for resident and streamed weights and for adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cats
import cats.linear
from cats.adapter import AdapterModel
from cats.checkpoint import TensorForm
from cats.dtypes import compute_dtype, is_exact, narrowest, weight_dtype
from cats.earlyexit import EarlyExitLlamaForCausalLM
from tests.methods import SHAPES, memory_for
from tests.test_streaming import assert_equal, run
from tests.tiny_models import TinyModel

Tiny = Callable[[str], TinyModel]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
STREAMED = cats.MemoryOptions(pinning=False, ring_buffers=2)
RESIDENT = cats.MemoryOptions(10**9, "weights")


class Named:
    """A configuration."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


def mix(directory: Path, target: Path, named: str | None, order: tuple[torch.dtype, ...] = (SINGLE, BRAIN, BRAIN)) -> Path:
    """A checkpoint again, its tensors in these dtypes in turns; config.json names `named`."""
    tensors = load_file(directory / "model.safetensors")
    target.mkdir()
    mixed = {name: tensors[name].to(order[place % len(order)]) for place, name in enumerate(sorted(tensors))}
    save_file(mixed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config.pop("dtype")
    (target / "config.json").write_text(json.dumps(config | ({} if named is None else {"dtype": named})))
    return target


@pytest.mark.parametrize("source", [HALF, BRAIN, SINGLE, DOUBLE, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("target", [HALF, BRAIN, SINGLE, DOUBLE])
def test_exactness_is_true_of_every_value_of_a_narrow_dtype(source: torch.dtype, target: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(HALF if source == HALF else BRAIN)
    if source.itemsize == 1:
        every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(source).to(DOUBLE)
    elif source.itemsize > 2:
        every = torch.tensor([1 / 3, 1e30, 1e-42], dtype=SINGLE if source == SINGLE else DOUBLE) * (1 + torch.finfo(source).eps)
    every = every[every.to(DOUBLE).isfinite()].to(source)
    kept = torch.equal(every.to(target).to(DOUBLE), every.to(DOUBLE))
    assert is_exact(source, target) == kept


def test_what_auto_means() -> None:
    few, many = TensorForm(SINGLE, (4, 4)), TensorForm(HALF, (8, 8))
    stored = {"lm_head.weight": TensorForm(DOUBLE, (90, 90)), "model.layers.0.a.weight": few, "model.layers.0.b.weight": many}
    assert weight_dtype("auto", Named(BRAIN), stored) == BRAIN
    assert weight_dtype("auto", Named(None), stored) == HALF
    assert weight_dtype("float32", Named(BRAIN), stored) == SINGLE
    assert [compute_dtype("auto", weights, CPU) for weights in (HALF, BRAIN, SINGLE, DOUBLE)] == [SINGLE, SINGLE, SINGLE, DOUBLE]
    assert [compute_dtype("auto", weights, CUDA) for weights in (HALF, BRAIN, SINGLE)] == [HALF, BRAIN, SINGLE]
    assert narrowest(HALF, SINGLE) == HALF
    assert narrowest(SINGLE, HALF) == narrowest(BRAIN, HALF) == HALF


@pytest.mark.parametrize(("weights", "asked"), [(SINGLE, "bfloat16"), (HALF, "bfloat16"), (BRAIN, "float16"), (DOUBLE, "float32")])
def test_arithmetic_that_would_round_weights_is_refused(weights: torch.dtype, asked: str) -> None:
    with pytest.raises(cats.CatsError, match=f"the compute dtype {asked} would round weights"):
        compute_dtype(asked, weights, CPU)


@pytest.mark.parametrize("block", [1 << 21, 256], ids=["whole", "blocks"])
@pytest.mark.parametrize("family", ["llama-grouped", "llama-biases", "qwen2-tied"])
@pytest.mark.parametrize(
    ("named", "dtype", "computed"),
    [
        *((None, "auto", "auto"), ("bfloat16", "auto", "auto"), ("float16", "auto", "auto"), ("float32", "auto", "float64")),
        *((None, "float16", "auto"), (None, "float16", "float16"), (None, "bfloat16", "bfloat16"), (None, "float32", "auto")),
    ],
)
def test_a_mixed_checkpoint_is_the_same_resident_planned_and_streamed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, named: str | None, dtype: str, computed: str, block: int
) -> None:
    monkeypatch.setattr(cats.linear, "BLOCK", block)
    source = tiny(family)
    base = mix(source.base, tmp_path / "base", named)
    adapters = {name: (mix(path, tmp_path / name, named), layer) for name, (path, layer) in source.adapters.items()}
    resident = run(cats.load(base, adapters, dtype, compute_dtype=computed), "cascade-chain")
    for memory in (RESIDENT, STREAMED):
        assert_equal(run(cats.load(base, adapters, dtype, memory=memory, compute_dtype=computed), "cascade-chain"), resident)


def test_half_precision_is_resident_once_and_computed_exactly(tiny: Tiny, tmp_path: Path) -> None:
    """`auto` takes the memory that config.json names; float32 holds an upcast copy and gives the same logits."""
    base = mix(tiny("llama").base, tmp_path / "base", "bfloat16", (BRAIN,))
    narrow, wide = cats.load(base), cats.load(base, dtype="float32")
    assert {weight.dtype for weight in narrow.parameters() if weight.dim() > 1} == {BRAIN}
    assert {weight.dtype for weight in wide.parameters()} == {narrow.base.dtype} == {SINGLE}
    assert (narrow.base.weight_dtype, wide.base.weight_dtype) == (BRAIN, SINGLE)
    assert_equal(run(narrow, "autoregressive"), run(wide, "autoregressive"))


def test_adapters_take_what_their_configuration_names_not_their_first_tensor(tiny: Tiny, tmp_path: Path) -> None:
    for named, expected in (("float16", HALF), (None, BRAIN)):
        path = mix(tiny("llama").draft, tmp_path / str(named), named, (SINGLE, BRAIN, BRAIN))
        assert {weight.dtype for weight in AdapterModel.from_pretrained(path).parameters()} == {expected}


@pytest.mark.parametrize("memory", [None, STREAMED])
def test_a_loaded_model_keeps_its_dtype(tiny: Tiny, memory: cats.MemoryOptions | None) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters, memory=memory)
    before = run(model, "cascade-chain")
    for change in (torch.nn.Module.half, torch.nn.Module.double, lambda module: module.to(BRAIN), lambda module: module.to("meta")):
        for part in (model, model.base):
            with pytest.raises(cats.CatsError, match="keeps its dtype and device; load it again"):
                change(part)
    assert model.float().to("cpu") is model
    assert_equal(run(model, "cascade-chain"), before)


def test_weights_given_in_half_precision_are_upcast_for_the_embedding_too(tiny: Tiny) -> None:
    base = EarlyExitLlamaForCausalLM.from_pretrained(tiny("llama").base, "float16")
    assert base.embed_tokens(torch.tensor([3])).dtype == SINGLE
    assert base.embed_tokens.weight.dtype == HALF


def test_every_method_runs_on_half_precision_weights(tiny: Tiny) -> None:
    """The adapters' biases and norms are computed in the compute dtype as well."""
    for memory in set(map(memory_for, SHAPES)):
        model = cats.load(tiny("qwen2").base, tiny("qwen2").adapters, "bfloat16", memory=memory)
        for shape in (shape for shape in SHAPES if memory_for(shape) == memory):
            assert run(model, shape)[0]
