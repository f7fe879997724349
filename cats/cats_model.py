"""One base model, one head, any number of named exit adapters."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import nn

from cats import kernels
from cats.adapter import AdapterModel
from cats.config import MemoryOptions
from cats.earlyexit import EarlyExitLlamaForCausalLM
from cats.errors import CatsError
from cats.loading import load_base
from cats.planning.plan import BY_METHODS
from cats.resources import Resources
from cats.runtime.budget import give_back_freed_memory, interpreter_bytes


class MultiAdapterCATSModel(nn.Module):
    """The base is loaded once; adapters read its exits and share its `lm_head`.

    Attributes:
        base: the target model.
        adapters: name -> adapter; "draft" and "shallow" are the names that the methods ask for.
        resources: what methods keep with the model.
        end_token_ids: the tokens that end an answer; None where the model does not know.
    """

    end_token_ids: tuple[int, ...] | None = None

    def __init__(self, base: EarlyExitLlamaForCausalLM):
        super().__init__()
        self.base = base
        self.adapters: dict[str, AdapterModel] = {}
        self.resources = Resources(base.source.ledger.holder(BY_METHODS))

    @classmethod
    def from_pretrained(
        cls,
        base_path: str | Path,
        adapters: Mapping[str, tuple[str | Path, int | None]] | None = None,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        memory: MemoryOptions | None = None,
        compute_dtype: str = "auto",
    ) -> Self:
        """Load a base checkpoint and adapters `{name: (directory, exit layer or None)}` on one device.

        Args:
            dtype: of the weights in memory; "auto" is what each `config.json` names, else what most of the layers are stored in. On a CPU
                "float32" holds half-precision checkpoints upcast: twice the memory, the same text; faster only where nothing is compiled.
                Under `memory`, weights lie in memory as stored where `dtype` has the same values, and rounded to `dtype` where it has not.
            memory: a budget for what is resident; what does not fit is streamed from the checkpoint. None holds everything.
            compute_dtype: of arithmetic, states and caches; "auto" is float32 on a CPU (float64 where weights are that), elsewhere `dtype`.
        """
        if memory is not None and memory.budget_bytes is not None and memory.covers == "process":
            give_back_freed_memory()
        kernels.why_not()  # so that what they hold counts as the interpreter's
        before, places = interpreter_bytes(), (adapters or {}).items()
        loaded = {
            name: AdapterModel.from_pretrained(directory, exit_layer, dtype, device, sparing=memory is not None)
            for name, (directory, exit_layer) in places
        }
        model = cls(load_base(base_path, dtype, compute_dtype, device, memory, list(loaded.values()), before))
        for name, (directory, _) in places:
            model.add_adapter(name, loaded[name], f"the adapter in {directory}")
        return model

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """See `EarlyExitLlamaForCausalLM`."""
        self.base._apply(fn)
        return self

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """What its tokenizer is told from others by; None where it knows none."""
        return None

    def close(self) -> None:
        """Close what methods hold and end the stream of weights; a model whose layers are streamed cannot decode afterwards."""
        self.resources.close()
        self.base.source.close()

    def add_adapter(self, name: str, adapter: AdapterModel, what: str = "the adapter") -> None:
        """Attach an adapter under `name`; raises `CatsError` where it does not fit this base."""
        if adapter.config.hidden_size != self.base.config.hidden_size:
            raise CatsError(
                f"{what} has width {adapter.config.hidden_size}, the base model has {self.base.config.hidden_size}; "
                "it belongs to another model."
            )
        if adapter.exit_layer is None or not 0 < adapter.exit_layer < self.base.layer_count:
            raise CatsError(f"{what} reads exit {adapter.exit_layer}; exits of this base model are 1 to {self.base.layer_count - 1}.")
        adapter.cover_positions(self.base.context)
        adapter.compute_in(self.base.dtype, self.base.work)
        adapter.compile(self.base.dtype, self.base.compiled)
        ledger = self.base.source.ledger
        ledger.charge("adapters", adapter.nbytes)
        adapter.rope.charge = ledger.holder("rotary tables")
        self.adapters[name] = adapter
        self.add_module(f"adapter_{name}", adapter)

    def exits(self, names: tuple[str, ...]) -> dict[str, int]:
        """Exit layer of each named adapter; raises `CatsError` naming one that is not attached."""
        for name in names:
            if name not in self.adapters:
                raise CatsError(
                    f"this method needs the adapter {name!r}, and none was given; attached are {sorted(self.adapters) or 'none'}."
                )
        exits = {name: int(self.adapters[name].exit_layer or 0) for name in names}
        if {"draft", "shallow"} <= exits.keys() and exits["draft"] >= exits["shallow"]:
            raise CatsError(
                f"the draft exit {exits['draft']} is not before the shallow exit {exits['shallow']}; exchange or replace the adapters."
            )
        return exits
