"""Rows of one sequence that go through layers together."""

from dataclasses import dataclass
from typing import Any

import torch

from cats.kv_cache import KVCache
from cats.masks import Sight


@dataclass(slots=True)
class Rows:
    """The nodes of a step, or a stretch of a prompt.

    Attributes:
        hidden_BTD: their states; a layer replaces them.
        rope: cosines and sines of their positions.
        sight: what they see.
        cache: of their sequence.
        slots, end: where `cache` takes their entries, and up to where it is visible; None: as its `writing` block says.
        compiled: the same for compiled layers (cats/kernels), once they have seen them.
    """

    hidden_BTD: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    sight: Sight
    cache: KVCache | None = None
    slots: slice | torch.Tensor | None = None
    end: int = 0
    compiled: Any = None

    def attend(self, layer: Any) -> None:
        """Add the attention of a decoder layer."""
        if self.cache is not None and self.slots is not None:
            self.cache.aim(self.slots, self.end)
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(self.hidden_BTD),
            attention_mask=self.sight.bias(),
            position_embeddings=self.rope,
            past_key_values=self.cache,
        )
        self.hidden_BTD = self.hidden_BTD + attended

    def transform(self, layer: Any) -> None:
        """Add the MLP of a decoder layer."""
        self.hidden_BTD = self.hidden_BTD + layer.mlp(layer.post_attention_layernorm(self.hidden_BTD))
