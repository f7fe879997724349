"""Plain greedy decoding by transformers' forward pass and cache, for every engine that runs transformers' own layers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from evaluation.benchmarks.timed_run import Engine, Request, Step


def greedy_loop(model: Any, request: Request, notes: dict[str, Any] | None = None) -> Engine:
    """The engine of a loaded model, whatever brings its weights."""
    torch.set_num_threads(request.threads)

    def steps(prompt: Sequence[int]) -> Iterator[Step]:
        ids, cache = torch.tensor([list(prompt)]), DynamicCache(config=model.config)
        with torch.inference_mode():
            while True:
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
                yield Step([int(ids)])

    return Engine(steps, {"arithmetic": str(model.config.dtype).removeprefix("torch."), **(notes or {})})
