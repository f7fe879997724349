"""Tiny checkpoints as the families publish them: BPE tokenizer with their special tokens, their form of chat template, several ends.

What such a model says is noise, but to `QUESTION` its answer ends with an end token that only generation_config.json lists.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from tests import tiny_models
from tests.tiny_models import SIZES, TinyModel

CONTEXT = 512
QUESTION = "What is two and three?"
ANSWER_TOKENS = 8
TEXT = ("the sum of two and three is five because counting on from two gives four then five. What is it? ") * 3

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_CHATML = (  # thoughts stay with the last answer and are dropped from those before it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3_ROPE: dict[str, Any] = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Published:
    """One family's files.

    Attributes:
        config: sizes -> configuration.
        specials: special tokens, in the order of their ids.
        eos: the tokenizer's end token.
        ends: the end tokens of generation_config.json; an answer of the model to `QUESTION` ends with the last of them.
        added: tokens of their own that are not special.
        bos: put in front by tokenizer and template; None where the family has none.
    """

    config: Callable[[dict[str, Any]], PreTrainedConfig]
    template: str
    specials: tuple[str, ...]
    eos: str
    ends: tuple[str, ...]
    bos: str | None = None
    added: tuple[str, ...] = ()


QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PUBLISHED: dict[str, Published] = {
    "llama-3": Published(
        lambda sizes: LlamaConfig(**(sizes | {"num_key_value_heads": 2, "rope_parameters": LLAMA_3_ROPE})),
        LLAMA_3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
        "<|begin_of_text|>",
    ),
    "qwen2": Published(
        lambda sizes: Qwen2Config(**(sizes | {"num_key_value_heads": 2})), CHATML, QWEN, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")
    ),
    "qwen3": Published(
        lambda sizes: Qwen3Config(**(sizes | {"num_key_value_heads": 2, "head_dim": 12})),
        THINKING_CHATML,
        QWEN,
        "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
        added=("<think>", "</think>"),
    ),
    "mistral": Published(
        lambda sizes: MistralConfig(**(sizes | {"num_key_value_heads": 2, "sliding_window": None})),
        INSTRUCT,
        ("<unk>", "<s>", "</s>"),
        "</s>",
        ("</s>",),
        "<s>",
    ),
}


@dataclass(frozen=True)
class FamilyCheckpoint:
    """A checkpoint on disk, and what any user of it must agree on for `QUESTION`."""

    tiny: TinyModel
    prompt_ids: list[int]
    end_ids: tuple[int, ...]


def build(directory: Path, name: str) -> FamilyCheckpoint:
    """Write model, adapters, tokenizer and generation settings of a family under `directory`."""
    row = PUBLISHED[name]
    tokenizer = tokenizer_of(row)
    ids = {token: place for place, token in enumerate(row.specials)}
    assert all(tokenizer.convert_tokens_to_ids(token) == place for token, place in ids.items())
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "eos_token_id": ids[row.eos]}
    tiny = tiny_models.build(directory, row.config(sizes | {"bos_token_id": ids.get(row.bos or "")}), seed=1)
    tokenizer.save_pretrained(tiny.base)
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True))
    prompt_ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ends = [ids[end] for end in row.ends]
    (tiny.base / "generation_config.json").write_text(json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]}))
    end_answer_with(tiny, prompt_ids, ends[-1])
    return FamilyCheckpoint(tiny, prompt_ids, tuple(sorted(ends)))


def tokenizer_of(row: Published) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, the family's special tokens in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(row.specials) + 24, special_tokens=list(row.specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if row.bos:
        mark = (row.bos, row.specials.index(row.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{row.bos} $A", special_tokens=[mark])
    tokenizer.add_tokens(list(row.added))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=row.bos,
        eos_token=row.eos,
        model_max_length=CONTEXT,
        chat_template=row.template,
        additional_special_tokens=[token for token in row.specials if token not in (row.bos, row.eos)],
    )


def end_answer_with(tiny: TinyModel, prompt_ids: list[int], end: int) -> None:
    """Exchange two rows of the head, so that the greedy answer is as before up to a token in its middle, and then `end`."""
    answer = greedy(tiny, prompt_ids, ANSWER_TOKENS, eos_token_id=None)
    late = next(place for place in range(ANSWER_TOKENS // 2, ANSWER_TOKENS) if answer[place] not in answer[:place])
    tensors = load_file(tiny.base / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[[answer[late], end]] = head[[end, answer[late]]]
    save_file(tensors, tiny.base / "model.safetensors", metadata={"format": "pt"})


def greedy(tiny: TinyModel, prompt_ids: list[int], length: int, **settings: Any) -> list[int]:
    """transformers' greedy answer, by default under the checkpoint's own generation settings.

    With a mask: without one, transformers takes every token of the prompt that equals the padding token for padding.
    """
    prompt = torch.tensor([prompt_ids])
    model = tiny_models.reload(tiny, torch.float32)
    ids = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False, pad_token_id=0, **settings
    )
    answer: list[int] = ids[0, len(prompt_ids) :].tolist()
    return answer
