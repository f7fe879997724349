"""The base model's final norm and lm_head, read from its shards without loading the model. Frozen, shared by every adapter."""

from pathlib import Path

import torch

from cats.checkpoint import read_tensor
from cats.earlyexit import read_config


class FrozenHead:
    """`norm_D` with its epsilon and `lm_head_VD`; turns states into logits."""

    def __init__(self, norm_D: torch.Tensor, epsilon: float, lm_head_VD: torch.Tensor):
        self.norm_D, self.epsilon, self.lm_head_VD = norm_D, epsilon, lm_head_VD

    @classmethod
    def read(cls, model_path: str | Path, dtype: torch.dtype, device: torch.device | str) -> "FrozenHead":
        """Read two tensors of a checkpoint directory; tied embeddings serve as the lm_head."""
        config = read_config(model_path)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = read_tensor(model_path, name).to(device, dtype)
        norm = read_tensor(model_path, "model.norm.weight").to(device, dtype)
        return cls(norm, config.rms_norm_eps, head)

    @torch.no_grad()
    def normed(self, final_PD: torch.Tensor) -> torch.Tensor:
        """What enters the head, from the output of the last layer: the final norm, in float32."""
        return torch.nn.functional.rms_norm(final_PD.float(), self.norm_D.shape, self.norm_D.float(), self.epsilon)

    @torch.no_grad()
    def target_logits(self, final_PD: torch.Tensor) -> torch.Tensor:
        """The base model's own logits from the output of its last layer, before the final norm. Shape [P, V]."""
        return self.normed(final_PD).to(self.lm_head_VD.dtype) @ self.lm_head_VD.T

    def logits(self, y_PD: torch.Tensor) -> torch.Tensor:
        """Logits of adapter outputs; gradients reach `y_PD` only. Shape [P, V]."""
        return y_PD.to(self.lm_head_VD.dtype) @ self.lm_head_VD.T
