"""Checkpoints in every published layout load to the same model; damaged or foreign ones are refused by a sentence that names the fault."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import cats
from cats.adapter import AdapterModel
from cats.checkpoint import each_tensor, read_tensor
from cats.earlyexit import EarlyExitLlamaForCausalLM
from tests.tiny_models import CONTEXT, DRAFT_EXIT, FAMILIES, LAYERS, SIZES, VOCAB, TinyModel, reload

ROOT = Path(__file__).resolve().parent.parent
Tiny = Callable[[str], TinyModel]
IDS = torch.tensor([[3, 5, 7, 11, 13]])


@pytest.fixture
def base(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a base checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny("llama").base, tmp_path / "base"))


@pytest.fixture
def draft(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of an adapter directory that a test may damage."""
    return Path(shutil.copytree(tiny("llama").draft, tmp_path / "draft"))


def logits(directory: Path, ids: torch.Tensor = IDS, dtype: str = "float64") -> torch.Tensor:
    model = EarlyExitLlamaForCausalLM.from_pretrained(directory, dtype)
    with torch.inference_mode():
        return model.target_logits(model.hidden_states(ids, [LAYERS])[LAYERS])


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def as_shards(directory: Path, suffix: str, save: Callable[[dict[str, torch.Tensor], Path], object]) -> None:
    """Replace model.safetensors by two shards and an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {name: f"{stem}-0000{place % 2 + 1}-of-00002.{suffix}" for place, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save({name: tensors[name] for name in tensors if weight_map[name] == shard}, directory / shard)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("layout", ["bin", "safetensors shards", "bin shards", "old rotary entries"])
def test_every_layout_gives_the_same_model(base: Path, layout: str) -> None:
    expected = logits(base)
    weights = base / "model.safetensors"
    if layout == "bin":
        torch.save(load_file(weights), base / "pytorch_model.bin")
        weights.unlink()
    elif layout == "safetensors shards":
        as_shards(base, "safetensors", lambda tensors, path: save_file(tensors, path))
    elif layout == "bin shards":
        as_shards(base, "bin", torch.save)
    else:
        rewrite(weights, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    torch.testing.assert_close(logits(base), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own(tiny: Tiny, family: str) -> None:
    """At every position of the context, far beyond the one that the ropes of some of these models were first trained to."""
    ids = torch.randint(3, VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(6))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        with torch.inference_mode():
            theirs = reload(tiny(family), dtype)(ids).logits
        ours = logits(tiny(family).base, ids, str(dtype).removeprefix("torch."))
        torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)


def test_snapshots_of_a_hub_cache_are_links_out_of_their_directory(base: Path, tmp_path: Path) -> None:
    expected = logits(base)
    as_shards(base, "safetensors", lambda tensors, path: save_file(tensors, path))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for place, path in enumerate(base.iterdir()):
        blob = path.rename(tmp_path / f"blob{place}")
        (snapshot / path.name).symlink_to(Path("..") / blob.name)
    torch.testing.assert_close(logits(snapshot), expected)


LOADING = """
import json, pathlib, sys
import torch
torch.set_num_threads(1)
import cats

def peak():
    return int(dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())["VmHWM"].split()[0]) * 1024

cats.load(sys.argv[1])  # imports what loading imports
found = {}
for directory in sys.argv[2:]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    model = cats.load(directory, dtype="float32")
    found[directory] = peak() - before
    del model
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak memory of a process in /proc")
def test_loading_takes_one_copy_and_one_shard(tiny: Tiny, tmp_path: Path) -> None:
    """From outside, in a fresh process; shards hold 16 MB each, everything 160 MB."""
    config = LlamaConfig(**(SIZES | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9, "vocab_size": 2000}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "safetensors", max_shard_size="17MB")
    whole = sum(weight.nbytes for weight in model.parameters())
    shutil.copytree(tmp_path / "safetensors", tmp_path / "bin")
    as_pickles(tmp_path / "bin")
    shards = [path.stat().st_size for path in (tmp_path / "bin").glob("*.bin")]
    command = [sys.executable, "-c", LOADING, str(tiny("llama").base), str(tmp_path / "bin"), str(tmp_path / "safetensors")]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout)
    assert len(shards) > 6
    for directory, grown in found.items():
        assert grown < whole + max(shards) + 24 * 10**6, directory


def as_pickles(directory: Path) -> None:
    """The same shards, each as a pickle."""
    index = directory / "model.safetensors.index.json"
    for path in directory.glob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    (directory / "pytorch_model.bin.index.json").write_text(index.read_text().replace(".safetensors", ".bin"))
    index.unlink()


def test_one_tensor_is_read_alone_or_named_as_missing(base: Path) -> None:
    torch.testing.assert_close(read_tensor(base, "lm_head.weight"), dict(each_tensor(base))["lm_head.weight"])
    with pytest.raises(cats.CatsError, match=r"no tensor lm_tail\.weight"):
        read_tensor(base, "lm_tail.weight")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def escape(base: Path, shard: object) -> None:
    """An index whose shard can be reached, but not by a name inside the directory."""
    names = load_file(base / "model.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


BASE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nowhere": (shutil.rmtree, "there is no directory"),
    "no weights": (lambda base: (base / "model.safetensors").unlink(), "holds no weights"),
    "cut short": (lambda base: cut(base / "model.safetensors"), "cut short"),
    "a tensor less": (
        lambda base: rewrite(base / "model.safetensors", lambda t: t.pop("model.norm.weight")),
        r"lacks the tensor model\.norm",
    ),
    "a tensor more": (lambda base: rewrite(base / "model.safetensors", lambda t: t.update(x=torch.ones(1))), "has a tensor x"),
    "another shape": (
        lambda base: rewrite(base / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        r"model\.norm\.weight has shape \[3\]",
    ),
    "another family": (lambda base: change_config(base, model_type="gpt2"), "type 'gpt2'"),
    "broken config": (lambda base: (base / "config.json").write_text("{"), "cannot read"),
    "no config": (lambda base: (base / "config.json").unlink(), "cannot read"),
    "no integers": (lambda base: change_config(base, hidden_size="wide"), "cannot read"),
    "broken index": (lambda base: (base / "model.safetensors.index.json").write_text("[]"), "not a shard index"),
    "missing shard": (
        lambda base: (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        r"names the shard gone\.safetensors",
    ),
    "a shard outside": (lambda base: escape(base, "../base/model.safetensors"), "'../base/model.safetensors', which is no file inside"),
    "an absolute shard": (lambda base: escape(base, str(base / "model.safetensors")), "which is no file inside its directory"),
    "a shard by number": (lambda base: escape(base, 7), "the shard 7, which is no file inside its directory"),
}


@pytest.mark.parametrize("fault", BASE_FAULTS)
def test_a_faulty_base_is_refused_by_name(base: Path, fault: str) -> None:
    damage, sentence = BASE_FAULTS[fault]
    damage(base)
    with pytest.raises(cats.CatsError, match=sentence):
        cats.load(base)


ADAPTER_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nowhere": (shutil.rmtree, "there is no directory"),
    "cut short": (lambda draft: cut(draft / "model.safetensors"), "cut short"),
    "a tensor less": (lambda draft: rewrite(draft / "model.safetensors", lambda t: t.pop("norm.weight")), r"lacks the tensor norm\.weight"),
    "a tensor more": (lambda draft: rewrite(draft / "model.safetensors", lambda t: t.update(x=torch.ones(1))), "has a tensor x"),
    "another exit": (lambda draft: change_config(draft, exit_layer=DRAFT_EXIT + 1), f"trained at exit {DRAFT_EXIT + 1}"),
    "no JSON": (lambda draft: (draft / "config.json").write_text("no"), "cannot read"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_faulty_adapter_is_refused_by_name(base: Path, draft: Path, fault: str) -> None:
    damage, sentence = ADAPTER_FAULTS[fault]
    damage(draft)
    with pytest.raises(cats.CatsError, match=sentence):
        cats.load(base, {"draft": (draft, DRAFT_EXIT)})


def test_an_adapter_of_another_width_is_refused(tiny: Tiny, base: Path, tmp_path: Path) -> None:
    config = AdapterModel.config_for(cats.load(base).base.config)
    config.hidden_size, config.head_dim = 16, 4
    AdapterModel(config, 1).save_pretrained(tmp_path / "narrow")
    with pytest.raises(cats.CatsError, match="belongs to another model"):
        cats.load(base, {"draft": (tmp_path / "narrow", 1)})


@pytest.mark.parametrize("exit_layer", [0, LAYERS, 99])
def test_exits_out_of_range_are_refused(base: Path, draft: Path, exit_layer: int) -> None:
    change_config(draft, exit_layer=None)
    with pytest.raises(cats.CatsError, match=f"exits of this base model are 1 to {LAYERS - 1}"):
        cats.load(base, {"draft": (draft, exit_layer)})


def test_exits_out_of_order_are_refused(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, {"draft": tiny("llama").adapters["shallow"], "shallow": tiny("llama").adapters["draft"]})
    with pytest.raises(cats.CatsError, match="not before the shallow exit"):
        cats.generate(model, [3, 4], cats.build_method(cats.CascadeConfig()), cats.GenerationConfig(max_new_tokens=4))


def test_a_missing_adapter_is_named(base: Path) -> None:
    with pytest.raises(cats.CatsError, match="needs the adapter 'draft'"):
        cats.generate(cats.load(base), [3, 4], cats.build_method(cats.KangarooConfig()), cats.GenerationConfig(max_new_tokens=4))


def test_upstream_adapter_directories_load(tiny: Tiny, draft: Path) -> None:
    """`config.json` without an exit, `pytorch_model.bin`: the exit is then given, and must be."""
    ours = AdapterModel.from_pretrained(draft, dtype="float64")
    ours.save_pretrained(draft, also_bin=True)
    (draft / "model.safetensors").unlink()
    change_config(draft, exit_layer=None)
    with pytest.raises(cats.CatsError, match="does not say the exit layer"):
        AdapterModel.from_pretrained(draft)
    theirs = AdapterModel.from_pretrained(draft, DRAFT_EXIT)
    hidden = torch.randn(1, 4, ours.config.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(theirs(hidden), ours(hidden))


def test_a_base_is_loaded_once_and_its_head_is_shared(tiny: Tiny) -> None:
    model = cats.load(tiny("llama").base, tiny("llama").adapters)
    heads = [name for name, _ in model.named_parameters() if "lm_head" in name]
    assert heads == ["base.lm_head.weight"]
