"""A real transformer whose next-token logits are tables that a test writes down.

The weights are chosen, not trained: token embeddings are one-hot, one attention head copies the previous token's one-hot
(its query and key are constants whose rotary phases meet at distance one), MLPs add nothing, and the head reads the
tables off the one-hots. So everything runs through the real layers, caches and masks, while target, draft and shallow
verifier follow three scripts that are known exactly:

    logits(next) = current[last token] + previous[the token before it]

The first token of a prompt counts as its own predecessor. The target copies the previous token in its last layer, the
adapters' copy is made in the first, so a wrong mask or a stale entry on either side of the exits changes the text.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cats.adapter import AdapterModel
from cats.cats_model import MultiAdapterCATSModel
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.planning.plan import COARSE_PRECISION, Demand, MemoryPlan, Piece
from cats.runtime.store import Store

LAYERS, DRAFT_EXIT, SHALLOW_EXIT = 4, 1, 2
SHARPNESS = 500.0
DRAFTS_ITSELF = MemoryPlan(
    Demand(), None, "process", frozenset({Piece(0, "self_attn.q_proj", 0, 0, stands_for=frozenset({COARSE_PRECISION}))}), (), 0, 0
)
"""Everything is resident, and the exact weights are the coarse form, too."""


@dataclass(frozen=True)
class Script:
    """Logits of one predictor, each table of shape [V, V]: row = the token seen, column = the next token."""

    current_VV: np.ndarray
    previous_VV: np.ndarray

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [V] after `tokens`."""
        return self.current_VV[tokens[-1]] + self.previous_VV[tokens[-2] if len(tokens) > 1 else tokens[-1]]


def follow(successors: list[int], margin: float = 8.0) -> Script:
    """A script that always continues token t with `successors[t]`."""
    return Script(margin * np.eye(len(successors))[successors], np.zeros((len(successors), len(successors))))


def random_script(vocabulary: int, seed: int, spread: float = 1.0) -> Script:
    """Random tables; a larger `spread` makes sharper distributions."""
    generator = np.random.default_rng(seed)
    return Script(*(spread * generator.normal(size=(vocabulary, vocabulary)) for _ in range(2)))


def scripted_model(
    target: Script, draft: Script, shallow: Script, context: int = 128, dtype: torch.dtype = torch.float64
) -> MultiAdapterCATSModel:
    """The three scripts as one base model with adapters "draft" and "shallow"."""
    scripts = (target, draft, shallow)
    vocabulary = len(target.current_VV)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=6 * vocabulary,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        head_dim=max(8, vocabulary + vocabulary % 2),
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 3.0},
        attention_bias=True,
        rms_norm_eps=1e-12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    causal_lm = LlamaForCausalLM(config)
    torch.nn.Module.to(causal_lm, dtype)
    _write_weights(causal_lm, scripts)
    model = MultiAdapterCATSModel(EarlyExitLlamaForCausalLM(causal_lm.eval(), config, source=Store(DRAFTS_ITSELF)))
    for name, section, exit_layer in (("draft", 1, DRAFT_EXIT), ("shallow", 2, SHALLOW_EXIT)):
        adapter = AdapterModel(AdapterModel.config_for(config), exit_layer).to(dtype)
        with torch.no_grad():
            adapter.get_parameter("layers.0.self_attn.o_proj.weight").zero_()
            adapter.norm.weight.copy_(_only(section, vocabulary, ones_seen=5))
        model.add_adapter(name, adapter.eval())
    return model


@torch.no_grad()
def _write_weights(causal_lm: LlamaForCausalLM, scripts: tuple[Script, ...]) -> None:
    """Width 6V: one-hots of the last token for target, draft, shallow, then of the token before it, likewise."""
    vocabulary = causal_lm.config.vocab_size
    one_hot = torch.eye(vocabulary, dtype=causal_lm.lm_head.weight.dtype)
    for parameter in causal_lm.parameters():
        parameter.zero_()
    for layer in causal_lm.model.layers:
        layer.input_layernorm.weight.fill_(1.0)
        layer.post_attention_layernorm.weight.fill_(1.0)
    causal_lm.model.embed_tokens.weight[:, : 3 * vocabulary] = one_hot.repeat(1, 3)
    _copy_previous(causal_lm, layer=0, sections=(4, 5), ones_seen=3)
    _copy_previous(causal_lm, layer=LAYERS - 1, sections=(3,), ones_seen=5)
    causal_lm.model.norm.weight.copy_(_only(0, vocabulary, ones_seen=6))
    tables = [script.current_VV for script in scripts] + [script.previous_VV for script in scripts]
    causal_lm.lm_head.weight.copy_(torch.from_numpy(np.concatenate([table.T for table in tables], axis=1)))


def _rms_gain(ones_seen: int, vocabulary: int) -> float:
    """What RMSNorm multiplies a vector of width 6V with, if `ones_seen` entries are one and the rest zero."""
    return (6 * vocabulary / ones_seen) ** 0.5


def _only(section: int, vocabulary: int, ones_seen: int) -> torch.Tensor:
    """Norm weights that undo the norm's gain and hide the one-hots of the other two predictors."""
    weight = torch.zeros(6, vocabulary, dtype=torch.float64)
    weight[[section, section + 3]] = 1 / _rms_gain(ones_seen, vocabulary)
    return weight.flatten()


def _copy_previous(causal_lm: LlamaForCausalLM, layer: int, sections: tuple[int, ...], ones_seen: int) -> None:
    """Let the layer's attention head write the previous token's one-hot into these sections."""
    attention, vocabulary = causal_lm.model.layers[layer].self_attn, causal_lm.config.vocab_size
    phases = causal_lm.model.rotary_emb.inv_freq.to(attention.q_proj.bias.dtype)
    half = len(phases)
    distances = torch.arange(causal_lm.config.max_position_embeddings, dtype=phases.dtype)
    scores = SHARPNESS * torch.cos(phases * (distances[:, None] - 1)).sum(1) / (2 * half) ** 0.5
    assert scores[1] - scores[distances != 1].max() > 40, "attention must see nothing but the previous token"
    attention.q_proj.bias[:half], attention.q_proj.bias[half:] = SHARPNESS * torch.cos(phases), -SHARPNESS * torch.sin(phases)
    attention.k_proj.bias[:half] = 1.0
    attention.v_proj.weight[:vocabulary, :vocabulary] = torch.eye(vocabulary) / _rms_gain(ones_seen, vocabulary)
    for section in sections:
        attention.o_proj.weight[section * vocabulary : (section + 1) * vocabulary, :vocabulary] = torch.eye(vocabulary)
