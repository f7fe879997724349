"""A tiny random model that can be spoken to: a byte-level tokenizer and the Vicuna template on top of `tiny_models`.

What it says is noise, but it says it through the same files, template and commands as a real checkpoint.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests import tiny_models
from tests.tiny_models import EOS, SIZES, TinyModel

CONTEXT = 1024
VICUNA_JINJA = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ (' ' if loop.first else '') + 'USER: ' + message['content'] }}"
    "{% else %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def byte_tokenizer(template: str | None = VICUNA_JINJA) -> PreTrainedTokenizerFast:
    """One token per byte, behind `<unk> <s> </s>`; puts `<s>` in front."""
    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: place for place, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT, chat_template=template
    )


def build(directory: Path, seed: int = 0) -> TinyModel:
    """Write model, adapters and tokenizer under `directory`."""
    tokenizer = byte_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "num_key_value_heads": 2}
    tiny = tiny_models.build(directory, LlamaConfig(**sizes), seed)
    tokenizer.save_pretrained(tiny.base)
    assert tokenizer.eos_token_id == EOS
    return tiny
