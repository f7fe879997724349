"""A synthetic checkpoint loads wherever a published one does, says what it is, and is written piece by piece."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats
from evaluation.benchmarks import make_synthetic_checkpoint as synthetic
from evaluation.benchmarks.make_synthetic_checkpoint import base_config, cut_into_shards, main, missing_shards, tensor_shapes

DATA = Path(__file__).resolve().parent.parent / "data"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write(folder, folder / "model")
    return folder / "model"


def write(folder: Path, outdir: Path, *more: str) -> None:
    flags = f"--config {folder / 'config.json'} --dtype float32 --exits 1 2 --shard-bytes 300000 --outdir {outdir}"
    main([*flags.split(), *more])


@pytest.mark.parametrize(("name", "layers", "gigabytes"), [("vicuna_7B", 32, 13.477), ("vicuna_13B", 40, 26.032)])
def test_the_named_bases_have_their_published_sizes(name: str, layers: int, gigabytes: float) -> None:
    config = base_config(DATA / f"{name}_config.json", None)
    shapes = tensor_shapes(config)
    assert config.num_hidden_layers == layers
    assert sum(math.prod(shape) for shape in shapes.values()) * 2 / 1e9 == pytest.approx(gigabytes, abs=1e-3)
    assert cut_into_shards(shapes, torch.float16, 5 * 10**9)[0].name.startswith("model-00001-of-0000")


def test_transformers_and_we_load_it_and_say_the_same(written: Path) -> None:
    adapters = {"draft": (written / "adapters" / "exit1", None), "shallow": (written / "adapters" / "exit2", None)}
    model = cats.load(written, adapters)
    assert model.base.dtype == torch.float32
    settings = cats.GenerationConfig(max_new_tokens=10, eos_token_ids=())
    ours = cats.generate(model, [1, 5, 9], cats.build_method(cats.CascadeConfig()), settings)
    theirs: Any = AutoModelForCausalLM.from_pretrained(written)
    prompt = torch.tensor([[1, 5, 9]])
    output = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert ours.ids == output[0, 3:].tolist()
    assert AutoTokenizer.from_pretrained(written)("hello")["input_ids"]


def test_weights_are_normal_and_rows_differ(written: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(written).state_dict()
    assert len(list(written.glob("*.safetensors"))) > 2
    assert bool((state["model.norm.weight"] == 1).all())
    embedding = state["model.embed_tokens.weight"]
    assert float(embedding.std()) == pytest.approx(0.02, rel=0.02)
    assert len(torch.unique(embedding, dim=0)) == len(embedding)
    assert not torch.equal(embedding, state["lm_head.weight"])


def test_an_interrupted_run_goes_on_where_it_stopped(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "model"
    shutil.copytree(written, copy)
    first, second = sorted(copy.glob("model-*.safetensors"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    made: list[str] = []
    real = synthetic.write_shard

    def noted(shard: synthetic.Shard, *rest: Any) -> None:
        made.append(shard.name)
        real(shard, *rest)

    monkeypatch.setattr(synthetic, "write_shard", noted)
    write(written.parent, copy)
    assert made == [first.name, second.name]
    assert all(path.read_bytes() == (written / path.name).read_bytes() for path in copy.glob("*.safetensors"))


def test_what_cannot_be_written_is_refused(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = base_config(written.parent / "config.json", None)
    assert missing_shards(cut_into_shards(tensor_shapes(config), torch.float32, 300000), written) == []
    for flags, sentence in (
        (["--seed", "1"], "begun with seed 0, now it is 1"),
        (["--exits", "4"], "exit 4 is none"),
        (["--layers", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            write(written.parent, written, *flags)
        assert sentence in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(cats.CatsError, match="GB free"):
        synthetic.make_checkpoint(config, torch.float32, [1], tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("dear")
    with pytest.raises(cats.CatsError, match="holds other files"):
        synthetic.make_checkpoint(config, torch.float32, [1], tmp_path / "full")
