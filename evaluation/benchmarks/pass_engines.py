"""Engines that run the same model, all in memory, behind one face: milliseconds of a pass over so many rows, and greedy decoding.

`llama-cpp-python` is an extra of the benchmarks; without it, or without GGUF files, its rows are missing.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import cats
from cats.state import Cycle, DecodeState

NODES = 64
FILLER = 100
"""Token of rows whose content does not matter."""


class PassEngine(ABC):
    """A model behind a prompt."""

    name: str

    @abstractmethod
    def begin(self, prompt: list[int]) -> None:
        """Read a prompt; later passes come behind it."""

    @abstractmethod
    def run(self, rows: int) -> None:
        """One pass over `rows` tokens, logits of each; what it cached is forgotten."""

    @abstractmethod
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The next `count` tokens, no end token minded."""


class Ours(PassEngine):
    """This engine: half-precision weights as published, or the given dtype; float32 arithmetic."""

    def __init__(self, model: cats.MultiAdapterCATSModel, name: str):
        self.model, self.name = model, name
        self._state: DecodeState | None = None

    @torch.inference_mode()
    def begin(self, prompt: list[int]) -> None:
        """See `PassEngine`."""
        if self._state is not None:
            self._state.close()
        self._state = DecodeState(self.model, prompt, (), len(prompt) + 1, NODES)
        with self.model.base.stepping():
            self._state.read_prompt()
        self._state.tokens.append(FILLER)

    @torch.inference_mode()
    def run(self, rows: int) -> None:
        """See `PassEngine`; the rows are a chain of tree nodes."""
        if self._state is None:
            raise RuntimeError("begin with a prompt")
        cycle = Cycle(self._state, depth_limit=rows)
        node = 0
        for place in range(1, rows):
            node = cycle.tree.add(node, FILLER + place, "trunk")
        with self.model.base.stepping():
            cycle.target_logits(range(rows))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """See `PassEngine`."""
        config = cats.GenerationConfig(max_new_tokens=count, eos_token_ids=())
        return cats.generate(self.model, prompt, cats.build_method(cats.AutoregressiveConfig()), config).ids


class Transformers(PassEngine):
    """transformers' own model in float32."""

    name = "transformers, float32"

    def __init__(self, directory: Path):
        self._model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self._cache = DynamicCache()

    @torch.inference_mode()
    def begin(self, prompt: list[int]) -> None:
        """See `PassEngine`."""
        self._cache = DynamicCache()
        self._model(input_ids=torch.tensor([prompt]), past_key_values=self._cache)

    @torch.inference_mode()
    def run(self, rows: int) -> None:
        """See `PassEngine`."""
        self._model(input_ids=torch.arange(FILLER, FILLER + rows)[None], past_key_values=self._cache)
        self._cache.crop(-rows)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """See `PassEngine`."""
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = self._model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
        return list(output[0, len(prompt) :].tolist())


class LlamaCpp(PassEngine):
    """llama.cpp on a GGUF file, through llama-cpp-python."""

    def __init__(self, gguf: Path, threads: int):
        llama_cpp = import_llama_cpp()
        self.name = f"llama.cpp {llama_cpp.__version__} ({gguf.stem})"
        self._llama: Any = llama_cpp.Llama(
            str(gguf), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )
        self._past = 0

    def begin(self, prompt: list[int]) -> None:
        """See `PassEngine`."""
        self._llama.reset()
        self._llama._ctx.kv_cache_clear()
        self._past = 0
        self._decode(prompt)
        self._past = len(prompt)

    def _decode(self, tokens: Sequence[int]) -> None:
        self._llama._batch.set_batch(batch=list(tokens), n_past=self._past, logits_all=True)
        self._llama._ctx.decode(self._llama._batch)
        llama_cpp = import_llama_cpp()
        llama_cpp.llama_synchronize(self._llama._ctx.ctx)

    def run(self, rows: int) -> None:
        """See `PassEngine`."""
        self._decode(range(FILLER, FILLER + rows))
        self._llama._ctx.kv_cache_seq_rm(-1, self._past, -1)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """See `PassEngine`; the choice of the best token is NumPy's, over the logits where llama.cpp left them."""
        self.begin(prompt)
        llama_cpp, vocabulary = import_llama_cpp(), self._llama.n_vocab()
        tokens: list[int] = []
        while len(tokens) < count:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._llama._ctx.ctx, -1), (vocabulary,))
            tokens.append(int(logits.argmax()))
            if len(tokens) < count:
                self._decode(tokens[-1:])
                self._past += 1
        return tokens


def import_llama_cpp() -> Any:
    """The module; `CatsError` where it is not installed."""
    try:
        import llama_cpp
    except ImportError as error:
        raise cats.CatsError(
            "llama-cpp-python is not installed; install it (pip install llama-cpp-python), or leave --gguf out."
        ) from error
    return llama_cpp
