"""The exit adapter of Kangaroo and CATS (paper section 4.3): two norms, one attention layer, one residual, the base's own head.

    x = h + SelfAttn(RMSNorm_in(h))        h leaves base layer `exit_layer`
    y = RMSNorm_final(x)                   logits = lm_head(y), the head is the base model's

There is no MLP and no post-attention norm. At Vicuna-7B this is 67.1 M parameters. Where the configuration says
`"adapter_block": "decoder"` the layer is a whole Llama decoder block, as the paper's README has it, with three times the
bytes and more:

    x = x + MLP(RMSNorm_post(x))           before the final norm
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Cache, LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from cats.adapter_card import card_of
from cats.calibration import AS_IS, CALIBRATION_FILE, Calibration, calibration_in, save_calibration
from cats.checkpoint import CONFIG_FAULTS, load_strictly, tensor_forms
from cats.dtypes import is_exact, narrowest, weight_dtype
from cats.errors import CatsError
from cats.files import write_atomically
from cats.hub import locate, publish
from cats.kernels import compiled_layers, compiled_norm
from cats.linear import WorkSpace, replace_projections
from cats.rope import RopeTable
from cats.rows import Rows

if TYPE_CHECKING:
    from cats.kernels.layers import CompiledLayers

COPIED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
)


BLOCK_FIELD, BLOCKS = "adapter_block", ("attention", "decoder")
"""The field of an adapter's config.json that chooses its layer, and its values; Kangaroo's, the first, where it is missing."""


class AdapterLayer(nn.Module):
    """`x = h + SelfAttn(RMSNorm_in(h))`, and in a decoder block `x + MLP(RMSNorm_post(x))` after it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx=0)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module | None = None
        if block_of(config) == "decoder":
            self.mlp = LlamaMLP(config)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_BTD),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden_BTD = hidden_BTD + attended
        return hidden_BTD if self.mlp is None else hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


def block_of(config: LlamaConfig) -> str:
    """Which layer an adapter's configuration asks for; an unknown one raises `CatsError`."""
    block = getattr(config, BLOCK_FIELD, BLOCKS[0])
    if block not in BLOCKS:
        raise CatsError(f"{BLOCK_FIELD} is {block!r} in the adapter's configuration; it must be {' or '.join(BLOCKS)}.")
    return str(block)


class AdapterModel(nn.Module):
    """A one-layer exit adapter.

    Args:
        config: shapes, rope and biases; `num_hidden_layers` is not read.
        exit_layer: the adapter reads the state that leaves base layers `[0, exit_layer)`; None where not known yet.
    """

    def __init__(self, config: LlamaConfig, exit_layer: int | None = None):
        super().__init__()
        config._attn_implementation = "sdpa"
        self.config, self.exit_layer = config, exit_layer
        self.layers = nn.ModuleList([AdapterLayer(config)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.compiled: CompiledLayers | None = None
        self.calibration: Calibration = AS_IS
        self.cover_positions(config.max_position_embeddings)

    def cover_positions(self, context: int) -> None:
        """Make the rotary embeddings reach `context` positions (the base's context may be longer than the adapter's configuration)."""
        with torch.device("cpu"):
            self.rope = RopeTable(LlamaRotaryEmbedding(self.config), self.config, context)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        weight: torch.Tensor = self.norm.weight
        return weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, as resident."""
        return sum(weight.nbytes for weight in self.parameters())

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes of the weights once the arithmetic is `dtype`."""
        return sum(weight.numel() * self._resting(weight, dtype).itemsize for weight in self.parameters())

    @staticmethod
    def _resting(weight: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
        return dtype if weight.dim() == 1 or not is_exact(weight.dtype, dtype) else weight.dtype

    def compute_in(self, dtype: torch.dtype, work: WorkSpace) -> None:
        """Make the arithmetic `dtype`, as the base's is; matrices stay as they are, unless `dtype` would round them in every product."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self._resting(parameter, dtype))
        replace_projections(self, work)

    def compile(self, dtype: torch.dtype, beside: "CompiledLayers | None") -> None:
        """From now on `read` runs compiled, where the kernels cover the layer; see `cats.kernels.compiled_layers`."""
        self.compiled = compiled_layers(self.layers, self.config, dtype, beside)
        if self.compiled is not None:
            self.norm = compiled_norm(self.norm)

    def read(self, rows: Rows) -> torch.Tensor:
        """States [1, T, D] for the base's lm_head; the rows' keys and values go to their cache."""
        if self.compiled is not None:
            self.compiled.run(rows, 0, 1)
        else:
            layer: AdapterLayer = self.layers[0]  # type: ignore[assignment]
            rows.attend(layer)
            if layer.mlp is not None:
                rows.transform(layer)
        states: torch.Tensor = self.norm(rows.hidden_BTD)
        return states

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        positions_T: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """States [B, T, D] at the exit -> states [B, T, D] for the base's lm_head.

        Without positions, mask and cache this is one causal pass from position 0, as training uses it.
        """
        if positions_T is None:
            positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        position_embeddings = self.rope.rows(positions_T, hidden_BTD.dtype)
        states: torch.Tensor = self.norm(self.layers[0](hidden_BTD, position_embeddings, attention_mask, past_key_values))
        return states

    @staticmethod
    def config_for(base: PretrainedConfig, block: str = BLOCKS[0]) -> LlamaConfig:
        """The configuration of a fresh adapter for `base`: same width, heads, rope and epsilon, one layer, no bias.

        Raises:
            CatsError: the width is no multiple of the heads, which Llama layers ask for.
        """
        if base.hidden_size % base.num_attention_heads:
            raise CatsError(
                f"adapters are Llama layers, which need a width that is a multiple of the heads; this base model is {base.hidden_size} "
                f"wide and has {base.num_attention_heads} heads, so it takes methods without adapters only."
            )
        fields = {name: getattr(base, name) for name in COPIED_FIELDS if getattr(base, name, None) is not None}
        if block != BLOCKS[0]:
            fields[BLOCK_FIELD] = block
        return LlamaConfig(num_hidden_layers=1, attention_bias=False, mlp_bias=False, **fields)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        exit_layer: int | None = None,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        sparing: bool = False,
    ) -> "AdapterModel":
        """Load `config.json` and the weights, of a directory or a hub id, strictly. A given `exit_layer` must agree with the one in the
        configuration, if any.

        Args:
            dtype: of the weights in memory (cats/dtypes.py).
            sparing: leave matrices as they are stored where that takes less memory and has the same values.
        """
        directory = locate(directory)
        config = read_adapter_config(directory)
        recorded = getattr(config, "exit_layer", None)
        if exit_layer is not None and recorded is not None and exit_layer != recorded:
            raise CatsError(
                f"the adapter in {directory} was trained at exit {recorded}, not {exit_layer}; give --{{draft,shallow}}-layer {recorded}."
            )
        exit_layer = recorded if exit_layer is None else exit_layer
        if exit_layer is None:
            raise CatsError(f"{Path(directory) / 'config.json'} does not say the exit layer of the adapter; give it explicitly.")
        with torch.device("meta"):
            adapter = cls(config, exit_layer)
        adapter.calibration = calibration_in(directory)
        forms = tensor_forms(directory)
        weights = weight_dtype(dtype, config, forms)

        def place(tensor: torch.Tensor) -> torch.Tensor:
            resting = narrowest(tensor.dtype, weights) if sparing and tensor.dim() == 2 else weights
            return tensor.to(device=device, dtype=resting, copy=True)

        load_strictly(adapter, directory, forms, f"the adapter in {directory}", place)
        return adapter.eval()

    def save_pretrained(self, directory: str | Path, also_bin: bool = False, dtype: torch.dtype | None = None) -> None:
        """Write `config.json`, `model.safetensors` (and `pytorch_model.bin` on request), each atomically, in `dtype` if given; and the
        calibration, where there is one."""
        directory, dtype = Path(directory), dtype or self.dtype
        fields = {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}
        fields |= {"num_hidden_layers": 1, "exit_layer": self.exit_layer, "dtype": str(dtype).removeprefix("torch.")}
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(directory / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))
        if also_bin:
            write_atomically(directory / "pytorch_model.bin", lambda part: torch.save(tensors, part))
        write_atomically(directory / "config.json", lambda part: part.write_text(json.dumps(fields, indent=1) + "\n"))
        if self.calibration != AS_IS:
            save_calibration(self.calibration, directory, {})
        else:
            (directory / CALIBRATION_FILE).unlink(missing_ok=True)  # of the weights that were here

    def push_to_hub(
        self,
        hub_id: str,
        base_model: str,
        *,
        description: str = "",
        license_name: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Put the adapter with a model card on the Hugging Face hub, from where `from_pretrained` and `cats.load` fetch it.

        Args:
            base_model: hub id of the model that it belongs to.
            description: Markdown at the end of the card: what it was trained on, what it accepts.
            license_name: as the hub writes it, such as "apache-2.0".

        Returns:
            the commit's address.

        Raises:
            CatsError: the hub cannot be reached, or does not let this user.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            card = card_of(
                hub_id, base_model, int(self.exit_layer or 0), block_of(self.config), self.config.hidden_size, license_name, description
            )
            card.save(Path(folder) / "README.md")
            return publish(Path(folder), hub_id, private, token)


def read_adapter_config(directory: str | Path) -> LlamaConfig:
    """The `config.json` of an adapter directory, upstream's or ours."""
    path = Path(directory) / "config.json"
    try:
        return LlamaConfig.from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CatsError(f"cannot read {path}: {error}; an adapter directory holds config.json beside its weights.") from error
    except CONFIG_FAULTS as error:
        raise CatsError(f"{path} is not a Llama configuration: {str(error).splitlines()[0]}.") from error
