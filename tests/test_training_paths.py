"""The 7B and 13B paths end to end on narrow random stand-ins of the same depth: states, both ways of training, evaluation.

A stand-in has everything of the published model (layers, heads, vocabulary, context, sharded fp16 `pytorch_model.bin`, no
chat template of its own) but its width: hidden and intermediate size are divided by 64, in the base and in the template.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cats.adapter import AdapterModel
from evaluation import CATS_dynamic
from tests.chats import write
from tests.speaking_model import byte_tokenizer
from training import ge_data, train_finetune

ROOT = Path(__file__).resolve().parent.parent
DIVISOR = 64
LENGTH = "300"


@dataclass(frozen=True)
class Published:
    """A model of the paper: its template, name, depth and the exits that the paper takes."""

    template: str
    name: str
    layers: int
    exits: tuple[int, int]


MODELS = {
    "7B": Published("data/vicuna_7B_config.json", "vicuna-7b-v1.3", 32, (3, 15)),
    "13B": Published("data/vicuna_13B_config.json", "vicuna-13b-v1.3", 40, (3, 20)),
}


def narrow(template: str) -> dict[str, Any]:
    """The fields of a template with the width divided."""
    fields = json.loads((ROOT / template).read_text())
    return fields | {name: fields[name] // DIVISOR for name in ("hidden_size", "intermediate_size")}


def stand_in(directory: Path, model: Published) -> Path:
    """A random checkpoint in the published layout: two fp16 pickles with an index, a tokenizer without a template."""
    torch.manual_seed(0)
    config = LlamaConfig(**narrow(model.template) | {"num_hidden_layers": model.layers})
    tensors = {name: tensor.half() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    base = directory / model.name
    byte_tokenizer(template=None).save_pretrained(base)
    config.save_pretrained(base)
    names, shards = list(tensors), ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    weight_map = {name: shards[place >= len(names) // 2] for place, name in enumerate(names)}
    for shard in shards:
        torch.save({name: tensors[name].clone() for name in names if weight_map[name] == shard}, base / shard)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return base


def losses(outdir: Path, exit_layer: int) -> list[float]:
    log = json.loads((outdir / "training_log.json").read_text())
    return [entry["loss"][str(exit_layer)] for entry in log["steps"]]


@pytest.mark.slow
@pytest.mark.parametrize("size", MODELS)
def test_from_a_checkpoint_and_conversations_to_evaluated_adapters(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = MODELS[size], write(tmp_path / "ShareGPT.json", 6)
    base, exits = stand_in(tmp_path, model), [str(exit_layer) for exit_layer in model.exits]
    template = tmp_path / "template.json"
    template.write_text(json.dumps(narrow(model.template)))
    shared = ["--model-path", str(base), "--exit-layers", *exits, "--length", LENGTH, "--cpu"]
    ge_data.main([*shared, "--data-path", str(data), "--outdir", str(tmp_path / "states"), "--start", "0", "--end", "6"])
    # From a start without fitting, which on so few positions magnifies the differences of half-precision states.
    training = [*shared, "--rows", "3", "--steps", "2", "--warmup", "1", "--validation-rows", "1", "--init", "fresh"]
    training += ["--configpath", str(template), "--bin"]
    stored = ["--data-home", str(tmp_path / "states"), "--outdir", str(tmp_path / "stored")]
    train_finetune.main([*training, *stored])
    fly = ["--data-path", str(data), "--rows-from", "conversations", "--outdir", str(tmp_path / "fly")]
    train_finetune.main([*training, *fly])
    for exit_layer in model.exits:
        assert losses(tmp_path / "stored", exit_layer) == pytest.approx(losses(tmp_path / "fly", exit_layer), abs=0.02)
        adapter = AdapterModel.from_pretrained(tmp_path / "fly" / f"exit{exit_layer}")
        assert (adapter.config.num_attention_heads, adapter.config.vocab_size) == (model.layers, 32000)  # 32 and 40 heads
        assert (tmp_path / "fly" / f"exit{exit_layer}" / "pytorch_model.bin").exists()
    wide = [*training, *fly[:-1], str(tmp_path / "wide"), "--configpath", model.template]
    with pytest.raises(SystemExit) as caught:
        train_finetune.main(wide)
    assert caught.value.code == 2
    assert f"is {128 * model.layers} wide" in capsys.readouterr().err  # 4096 and 5120
    evaluate(model, base, tmp_path, tmp_path / "fly")


def evaluate(model: Published, base: Path, folder: Path, adapters: Path) -> None:
    """The paper's command line over two questions, chain and tree; answers must be those of plain decoding."""
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question_id": n, "category": "x", "turns": [f"Count to {n}."]}) + "\n" for n in (3, 5)))
    draft, shallow = model.exits
    fixed = ["--model-path", str(base), "--draft-adapter-path", str(adapters / f"exit{draft}"), "--draft-layer", str(draft)]
    fixed += ["--shallow-adapter-path", str(adapters / f"exit{shallow}"), "--shallow-layer", str(shallow), "--dtype", "float32"]
    fixed += ["--question-file", str(questions), "--max-new-tokens", "12", "--steps", "5", "--sv-passes", "1", "--device", "cpu"]
    for name, tree in (("chain", ["--tree-topk", "1", "--total-tokens", "-1"]), ("tree", ["--tree-topk", "10", "--total-tokens", "40"])):
        output = folder / name
        CATS_dynamic.main([*fixed, *tree, "--model-id", name, "--output-dir", str(output), "--baseline"])
        answers, plain = (
            [json.loads(line)["choices"] for line in (output / file).read_text().splitlines()] for file in ("0.jsonl", "0.baseline.jsonl")
        )
        assert len(answers) == 2
        assert [choice["turns"] for (choice,) in answers] == [choice["turns"] for (choice,) in plain]
        assert (output / "verification_metrics.json").exists()
