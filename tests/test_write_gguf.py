"""The GGUF file of a checkpoint holds its numbers under llama.cpp's names, read back by our own reader and by transformers'."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cats.checkpoint import each_tensor
from cats.from_gguf import GgufLlama, tensors_of
from evaluation.benchmarks.write_gguf import main

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"


def opened(path: Path) -> GgufLlama:
    reader = GGUFReader(path)
    return GgufLlama(path, {key: field.contents() for key, field in reader.fields.items()}, reader)


def copy_of_tiny(folder: Path, **fields: object) -> Path:
    """data/tiny under another configuration."""
    folder.mkdir()
    shutil.copyfile(TINY / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | fields))
    return folder


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_numbers_come_back(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.gguf"
    main([str(TINY), str(path), "--type", kind])
    stored, found = dict(each_tensor(TINY)), dict(tensors_of(opened(path)))
    assert found.keys() == stored.keys()
    changed = sum(int((found[name] != tensor.float()).sum()) for name, tensor in stored.items())
    assert f": {changed} of {sum(tensor.numel() for tensor in stored.values())} values differ" in capsys.readouterr().out
    assert changed == 0 or kind == "f16"
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor.float(), rtol=0, atol=2**-25, msg=name)


def test_transformers_own_reader_finds_the_same_model(tmp_path: Path) -> None:
    main([str(TINY), str(tmp_path / "tiny.gguf"), "--type", "bf16"])
    config = AutoConfig.from_pretrained(TINY)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, config=config)
    ours = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


def test_what_float16_cannot_hold_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = copy_of_tiny(tmp_path / "large")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(SystemExit) as ended:
        main([str(model), str(tmp_path / "large.gguf")])
    assert ended.value.code == 2
    assert "model.layers.3.mlp.up_proj.weight has values that float16 cannot hold; use --type bf16" in capsys.readouterr().err
    assert not list(tmp_path.glob("large.gguf*"))


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen3"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_what_the_file_could_not_say_is_refused(fields: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(copy_of_tiny(tmp_path / "other", **fields)), str(tmp_path / "other.gguf")])
    assert ended.value.code == 2
    assert "of another family than Llama, or scales its rope" in capsys.readouterr().err
