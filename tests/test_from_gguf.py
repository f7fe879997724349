"""GGUF files become the same numbers that transformers' own reader finds in them, with a tokenizer that splits digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cats.errors import CatsError
from cats.from_gguf import convert, open_gguf, tensors_of

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 2
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, architecture: str = "llama") -> None:
    """A random little Llama with grouped heads, tied embeddings, quantised matrices and a byte-level tokenizer."""
    writer = GGUFWriter(path, architecture)
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*CONTROL, *bytes_, "he", "hel"]
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(CONTROL) + [TokenType.NORMAL] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["h e", "he l"])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(TEMPLATE)
    numbers = np.random.default_rng(0)
    for name, shape in shapes(len(tokens)).items():
        values = numbers.normal(size=shape).astype(np.float32) * 0.1
        kind = GGMLQuantizationType.Q4_1 if len(shape) == 2 and "ffn_down" not in name else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the file by llama.cpp's names, as rows x columns."""
    kv = WIDTH // HEADS * KV_HEADS
    rows = {"attn_q": WIDTH, "attn_k": kv, "attn_v": kv, "attn_output": WIDTH, "ffn_gate": INNER, "ffn_up": INNER, "ffn_down": WIDTH}
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        found |= {f"blk.{layer}.{name}.weight": (count, INNER if name == "ffn_down" else WIDTH) for name, count in rows.items()}
        found |= {f"blk.{layer}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    return found


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    convert(gguf, directory)
    return directory


def test_the_numbers_are_those_of_transformers_own_reader(gguf: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    ours = dict(tensors_of(open_gguf(gguf)))
    assert set(theirs) - set(ours) <= {"lm_head.weight"}
    for name, numbers in ours.items():
        torch.testing.assert_close(numbers, theirs[name], rtol=0, atol=0, msg=name)


def test_the_checkpoint_loads_and_speaks_like_the_file(gguf: Path, checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0.05)  # ours are rounded to bfloat16
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(checkpoint / "model.safetensors").values())
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["dtype"] == "bfloat16"


def test_the_tokenizer_splits_digits_and_keeps_control_tokens_whole(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "<|im_start|>user\nhello 1234, ünï<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "<|im_start|>"
    assert "<|im_end|>" in pieces
    assert "hel" in pieces
    assert [piece for piece in pieces if piece.isdigit()] == list("1234")
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhello 1234, ünï\n"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode("hello").ids == tokenizer("hello")["input_ids"]


def test_other_architectures_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", "gemma")
    with pytest.raises(CatsError, match=r"general\.architecture 'gemma'"):
        open_gguf(tmp_path / "other.gguf")


def test_a_damaged_file_is_named(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf.read_bytes()[:100])
    with pytest.raises(CatsError, match=r"cut\.gguf"):
        open_gguf(tmp_path / "cut.gguf")

