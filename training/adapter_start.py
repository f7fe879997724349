"""Adapters at the start of training: fresh, taken from the base model's own attention, or given."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig

from cats.adapter import AdapterModel, read_adapter_config
from cats.checkpoint import read_tensor
from cats.earlyexit import read_config
from cats.errors import CatsError


def fresh_adapter(config: LlamaConfig, exit_layer: int, seed: int) -> AdapterModel:
    """A random adapter that starts as `y = norm(h)`: the output projection is zero, the other matrices keep variance, norms are one."""
    adapter = AdapterModel(config, exit_layer)
    generator = torch.Generator().manual_seed(seed * 1000 + exit_layer)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "o_proj" in name or name.endswith(".bias"):
                parameter.zero_()
            elif "norm" not in name:
                parameter.normal_(std=config.hidden_size**-0.5, generator=generator)
    return adapter


def adapter_from_base(config: LlamaConfig, exit_layer: int, model_path: str | Path) -> AdapterModel:
    """An adapter that starts with the attention of base layer `exit_layer` and the base's final norm, read tensor by tensor."""
    adapter = AdapterModel(config, exit_layer)
    places = {name: f"model.{name.replace('layers.0', f'layers.{exit_layer}')}" for name in adapter.state_dict()}
    adapter.load_state_dict({name: read_tensor(model_path, place).float() for name, place in places.items()})
    return adapter


def starting_adapters(
    model_path: str | Path, exits: Sequence[int], init: str, given: Sequence[str], seed: int, config_path: str | None
) -> dict[int, AdapterModel]:
    """One float32 adapter per exit, ready to train.

    Args:
        init: "base" or "fresh", where no directories are given.
        given: adapter directories to start from, one per exit in the same order; empty for none.
        config_path: an adapter template (data/*_config.json) instead of the configuration derived from the base.
    """
    base = read_config(model_path)
    if max(exits) >= base.num_hidden_layers:
        raise CatsError(f"exit {max(exits)} must be below the {base.num_hidden_layers} layers of {model_path}.")
    if given and len(given) != len(exits):
        raise CatsError(f"--init-adapter names {len(given)} directories for {len(exits)} exits; give one per exit, in the same order.")
    adapters = {}
    for place, exit_layer in enumerate(exits):
        if given:
            adapter = AdapterModel.from_pretrained(given[place], exit_layer, dtype="float32")
        elif init == "base":
            adapter = adapter_from_base(_config(base, config_path), exit_layer, model_path)
        else:
            adapter = fresh_adapter(_config(base, config_path), exit_layer, seed)
        if adapter.config.hidden_size != base.hidden_size:
            raise CatsError(
                f"the adapter for exit {exit_layer} is {adapter.config.hidden_size} wide, but {model_path} is {base.hidden_size} wide; "
                "it belongs to another model."
            )
        adapters[exit_layer] = adapter.float().requires_grad_(True)
    return adapters


def _config(base: PretrainedConfig, config_path: str | None) -> LlamaConfig:
    if config_path is None:
        return AdapterModel.config_for(base)
    path = Path(config_path)
    return read_adapter_config(path.parent) if path.name == "config.json" else LlamaConfig.from_json_file(path)
