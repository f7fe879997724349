"""The base model, run layer by layer: any range `[start, end)`, or a part of it, over a shared cache.

The layers are transformers' own, so every checkpoint of a family in `cats/families.py` works: an embedding, equal decoder
layers, a final norm and a head. A layer is called with hidden states, a 4-D bias, rotary embeddings and a cache, and nothing
else. Where the weights of its projections lie, in memory or in a stream, is known to the projections (`cats/linear.py`) and to
the model's `source` (`cats/runtime/store.py`) alone.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from cats.checkpoint import CONFIG_FAULTS
from cats.errors import CatsError
from cats.families import check_layers, check_rope, family_of, usable_context
from cats.kernels import compiled_layers, compiled_norm, leading
from cats.kv_cache import KVCache
from cats.linear import WorkSpace
from cats.masks import Sight
from cats.planning.plan import EXACT, View
from cats.rope import RopeTable
from cats.rows import Rows
from cats.runtime.store import AT_ONCE, Store
from cats.turns import Turns

if TYPE_CHECKING:
    from cats.kernels.layers import CompiledLayers


class EarlyExitLlamaForCausalLM(nn.Module):
    """A causal language model with an exit after every layer.

    Attributes:
        config: the transformers configuration.
        layer_count: decoder layers L.
        context: positions the model can see.
        embed_tokens: token ids [..] -> states [.., D].
        lm_head: hidden states [.., D] -> logits [.., V]; shared by every adapter.
        dtype: of the arithmetic, states and caches (the compute dtype of cats/dtypes.py).
        weight_dtype: that the weights' values are rounded to; `dtype` has every one of them.
        source: where the weights come from, and what that has cost.
        work: where projections upcast weights, those of the adapters too.
        turns: one step at a time, since steps share work space, ring and tables.
    """

    embed_tokens: nn.Module
    norm: nn.Module
    lm_head: nn.Module

    def __init__(
        self,
        causal_lm: Any,
        config: PretrainedConfig,
        dtype: torch.dtype | None = None,
        source: Store | None = None,
        work: WorkSpace | None = None,
        weight_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.config = config
        decoder = causal_lm.model
        self.embed_tokens, self.norm, self.lm_head = decoder.embed_tokens, decoder.norm, causal_lm.lm_head
        self.layers = decoder.layers
        self.layer_count, self.context = len(decoder.layers), usable_context(config)
        self.source = source or Store()
        self.dtype: torch.dtype = dtype or causal_lm.lm_head.weight.dtype
        self.weight_dtype: torch.dtype = weight_dtype or self.dtype
        self.work = work or WorkSpace()
        self.turns = Turns(self.source.one_answer)
        with torch.device("cpu"):
            rotary = type(decoder.rotary_emb)(config=config)
        self.rope = RopeTable(rotary, config, self.context, self.source.ledger.holder("rotary tables"))
        self.compiled: CompiledLayers | None = None

    def compile(self) -> None:
        """From now on run layers and the final norm compiled, where the kernels cover them (cats/kernels)."""
        self.compiled = compiled_layers(self.layers, self.config, self.dtype, source=self.source)
        if self.compiled is not None:
            self.norm = compiled_norm(self.norm)

    def stepping(self) -> AbstractContextManager[None]:
        """Around a step: whose threads they are, torch's or the kernels'."""
        return AT_ONCE if self.compiled is None else leading()

    @property
    def device(self) -> torch.device:
        """Compute device."""
        weight: torch.Tensor = self.norm.weight  # type: ignore[assignment]
        return weight.device

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: str = "auto", device: str | torch.device = "cpu", compute_dtype: str = "auto"
    ) -> "EarlyExitLlamaForCausalLM":
        """Load a checkpoint directory, strictly; nothing is initialised at random. Raises `CatsError` on any fault.

        Args:
            dtype: of the weights in memory. "auto" takes no more memory than the checkpoint is made for: half precision stays so, and
                is upcast in every product. "float32" holds an upcast copy: twice the memory, the same text; faster only where nothing is
                compiled.
            compute_dtype: of arithmetic, states and caches; "auto" is float32 on a CPU, so that nothing is rounded, elsewhere `dtype`.
        """
        from cats.loading import load_base  # which builds this class

        return load_base(directory, dtype, compute_dtype, device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "EarlyExitLlamaForCausalLM":
        """What `.to`, `.float`, `.half`, `.cuda` go through: `CatsError` unless the model is that already, since caches, work space and
        streams follow the dtype and device that it was loaded with."""
        parts = {(weight.dtype, weight.device) for weight in self.parameters() if not weight.is_meta}
        for dtype, device in parts:
            probe = torch.empty(0, dtype=dtype, device=device)
            if fn(probe) is not probe:
                raise CatsError("a loaded model keeps its dtype and device; load it again with another dtype, compute_dtype or device.")
        return self

    def forward_draft_or_large_model(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        start_layer: int = 0,
        end_layer: int | None = None,
        past_key_values: KVCache | None = None,
        attention_mask: torch.Tensor | None = None,
        positions_T: torch.Tensor | None = None,
        view: View = EXACT,
    ) -> torch.Tensor:
        """Run layers `[start_layer, end_layer)` on rows of one sequence; the one-group case of `run_layers`.

        Args:
            input_ids: token ids [B, T], to be embedded (only with `start_layer` 0), or
            hidden_states: states [B, T, D] that left layer `start_layer - 1`.
            end_layer: L where not given.
            past_key_values: entries are written and read at the slots that the cache's `writing` block says.
            attention_mask: additive bias [1, 1, T, S + T]; None means causal (no cache) or everything visible (one query).
            positions_T: position of each query; 0, 1, .. where not given.
            view: the form of the model that runs.

        Returns:
            hidden states [B, T, D] that leave layer `end_layer - 1` (before the final norm).
        """
        if (input_ids is None) == (hidden_states is None):
            raise ValueError("give either input_ids or hidden_states")
        hidden_BTD: torch.Tensor = self.embed_tokens(input_ids) if hidden_states is None else hidden_states
        if positions_T is None:
            positions_T = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        rows = Rows(hidden_BTD, self.rope.rows(positions_T, hidden_BTD.dtype), Sight(lambda: attention_mask), past_key_values)
        self.run_layers([rows], start_layer, self.layer_count if end_layer is None else end_layer, view)
        return rows.hidden_BTD

    def run_layers(self, groups: Sequence[Rows], start: int, end: int, view: View = EXACT) -> int:
        """Take every group through layers `[start, end)`; the one loop behind prompts, drafts, target passes and batches.

        All groups go through a layer before the next one, so that they share one stream of its weights. What a group gives does not
        depend on the others: products are made group by group. Groups of one sequence come in the order of their positions. Where the
        ring cannot keep what a sublayer streams, each group goes through all layers alone.

        Returns:
            how many layers were run.
        """
        several, source = len(groups) > 1, self.source
        if several and not source.holds_sublayers:
            return sum(self.run_layers([group], start, end, view) for group in groups)
        passes, index = 0, start
        with source.running(view):
            while groups and index < end:
                stretch = self._stretch(groups, index, end, view)
                if stretch > index:
                    passes, index = passes + view.layers_run(index, stretch), stretch
                    continue
                attends, transforms = index not in view.attention, index not in view.mlp
                passes += attends or transforms
                if attends:
                    with source.keeping(index, "self_attn") if several else AT_ONCE:
                        for group in groups:
                            self._attend(group, index)
                if transforms:
                    with source.keeping(index, "mlp") if several else AT_ONCE:
                        for group in groups:
                            self._transform(group, index)
                index += 1
        return passes

    def _stretch(self, groups: Sequence[Rows], start: int, end: int, view: View) -> int:
        """Take every group through the layers that begin at `start`, compiled, in one call each; returns where they end.

        They end at the first layer that streams, since several groups share its stream; a single group goes on.
        """
        compiled = self.compiled
        if compiled is None or not all(compiled.takes(group) for group in groups):
            return start
        stop = end if len(groups) == 1 else compiled.stretch(start, end)
        for group in groups if stop > start else ():
            compiled.run(group, start, stop, view)
        return stop

    def _attend(self, group: Rows, index: int) -> None:
        """Add the attention of a layer."""
        if self.compiled is not None and self.compiled.takes(group):
            self.compiled.attend(group, index)
        else:
            group.attend(self.layers[index])

    def _transform(self, group: Rows, index: int) -> None:
        """Add the MLP of a layer."""
        if self.compiled is not None and self.compiled.takes(group):
            self.compiled.transform(group, index)
        else:
            group.transform(self.layers[index])

    def hidden_states(self, input_ids: torch.Tensor, exits: Sequence[int]) -> dict[int, torch.Tensor]:
        """States [B, N, D] leaving layers `[0, exit)` for each exit (0: the embeddings), by one causal pass without a cache."""
        states = {}
        hidden, reached = self.embed_tokens(input_ids), 0
        for exit_layer in sorted(set(exits)):
            hidden = self.forward_draft_or_large_model(hidden_states=hidden, start_layer=reached, end_layer=exit_layer)
            states[exit_layer], reached = hidden, exit_layer
        return states

    def target_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States [.., D] leaving the last layer -> logits [.., V]: final norm, then the head."""
        logits: torch.Tensor = self.lm_head(self.norm(hidden))
        return logits

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for all layers with `capacity` slots."""
        return KVCache(self.config, self.layer_count, capacity, self.dtype, self.device, self.source.one_answer)


def read_config(directory: str | Path) -> PretrainedConfig:
    """The model configuration of a checkpoint directory; raises `CatsError` where the family is not supported."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CatsError(f"there is no directory {directory}; give the path of a checkpoint directory.")
    try:
        family = json.loads((directory / "config.json").read_text()).get("model_type")
        family_of(family, str(directory))
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True)
    except CatsError:
        raise
    except CONFIG_FAULTS as error:
        raise CatsError(f"cannot read {directory / 'config.json'}: {str(error).splitlines()[0]}; fetch the checkpoint again.") from error
    check_rope(config)
    check_layers(config, str(directory))
    return config
