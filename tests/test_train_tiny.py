"""The trainer of the fixture data/tiny, on a corpus of a few lines: it trains, resumes, and exports what transformers loads."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cats.text import VICUNA, render
from training import train_tiny
from training.conversations import read_sharegpt
from training.muon import Muon, orthogonalise

CHATS = [
    {
        "id": str(number),
        "conversations": [
            {"from": "human", "value": f"What comes after {number}?"},
            {"from": "gpt", "value": f"After {number} comes {number + 1}, and then {number + 2}."},
        ],
    }
    for number in range(60)
]


def command(directory: Path, tokens: int) -> list[str]:
    corpus = directory / "corpus.json"
    corpus.write_text(json.dumps(CHATS))
    paths = ["--corpus", str(corpus), "--heldout", str(corpus), "--work-dir", str(directory / "work"), "--out", str(directory / "out")]
    sizes = ["--vocab", "300", "--layers", "2", "--width", "32", "--heads", "2", "--kv-heads", "1", "--mlp", "48", "--context", "64"]
    return [*paths, *sizes, "--sequence", "32", "--batch-tokens", "256", "--tokens", str(tokens), "--threads", "1", "--no-compile"]


def test_trains_resumes_and_exports_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    train_tiny.main(command(tmp_path, 4096))
    first = json.loads((tmp_path / "out" / "PROVENANCE.json").read_text())
    train_tiny.main(command(tmp_path, 16384))
    second = json.loads((tmp_path / "out" / "PROVENANCE.json").read_text())
    assert first["tokens_seen"] == 4096
    assert second["tokens_seen"] == 16384
    assert second["heldout_bits_per_byte"] < first["heldout_bits_per_byte"] < math.log2(300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    text = "def f(x):\n    return x + 12"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id


def test_the_chat_template_is_the_one_it_was_trained_in(tmp_path: Path) -> None:
    train_tiny.main(command(tmp_path, 256))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = read_sharegpt(tmp_path / "corpus.json")[0]
    messages = [{"role": ("user", "assistant")[turn.role], "content": turn.text} for turn in chat.turns]
    templated = tokenizer.apply_chat_template(messages, tokenize=False)
    assert templated == tokenizer.bos_token + render(VICUNA, chat.messages)
    question = str(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
    assert str(templated).startswith(question)


def test_shapes_that_do_not_divide_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_tiny.main([*command(tmp_path, 256), "--heads", "3"])
    assert stopped.value.code == 2
    assert "must divide" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 12, 12), (3, 8, 24), (3, 24, 8)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices.to(dtype), iterations=8).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_treats_each_matrix_alone() -> None:
    """Batching matrices of one shape must not mix them."""
    start = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    together = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    for parameters in (together, *([parameter] for parameter in alone)):
        optimizer = Muon(parameters, lr=0.1)
        for parameter in parameters:
            parameter.grad = parameter.detach() ** 2
        optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
