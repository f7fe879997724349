"""Adapters at the start of training: fresh, taken from the base model's own attention, or given."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig

from cats.adapter import BLOCKS, AdapterModel
from cats.checkpoint import CONFIG_FAULTS, read_tensor
from cats.cli.progress import live_bar
from cats.earlyexit import read_config
from cats.errors import CatsError
from cats.families import family_of
from training.dataset import Batch
from training.objective import Objective

FITTING_ITERATIONS, FITTING_ROWS = 20, 16
FITTED = {"fitted": False, "fitted-prior": True, "base-fitted": False}
"""Starts that `fit_norms` completes, and whether with a prior."""
ROOT = Path(__file__).resolve().parent.parent


def fresh_adapter(config: LlamaConfig, exit_layer: int, seed: int) -> AdapterModel:
    """A random adapter that starts as `y = norm(h)`: output projections are zero, the other matrices keep variance, norms are one."""
    adapter = AdapterModel(config, exit_layer)
    generator = torch.Generator().manual_seed(seed * 1000 + exit_layer)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "o_proj" in name or "down_proj" in name or name.endswith(".bias"):
                parameter.zero_()
            elif "norm" not in name:
                parameter.normal_(std=config.hidden_size**-0.5, generator=generator)
    return adapter


def fit_norms(objective: Objective, adapters: Mapping[int, AdapterModel], batch: Batch, prior: bool = False) -> None:
    """Fit the gain of the adapters' final norms, the rest as it is, from 0, where every token is equally likely.

    The loss is convex in the gain, so the start is never worse than chance on this batch, however little an early layer's
    states look like what the head expects. A few L-BFGS iterations.

    Args:
        prior: take the gains for normally distributed around 0, as wide as those of the base's own final norm, which keeps
            a batch of few positions from being learnt by heart.
    """
    lesson = objective.learning_target(batch)
    positions, width = len(lesson.target.probabilities), float(objective.head.norm_D.float().square().mean())
    pull = 1 / (max(1, positions) * width) if prior else 0.0
    for exit_layer, adapter in live_bar(adapters.items(), desc="fit norms", unit="exit", leave=False):
        gain = adapter.norm.weight
        with torch.no_grad():
            gain.fill_(1)
            unit_PD = objective.states(adapter, batch.hidden[exit_layer])[lesson.counted_BN].float()
            gain.zero_()
        optimizer = torch.optim.LBFGS([gain], max_iter=FITTING_ITERATIONS, line_search_fn="strong_wolfe")
        optimizer.step(partial(objective.gain_loss, unit_PD, gain, lesson, pull))
        gain.grad = None


def adapter_from_base(config: LlamaConfig, exit_layer: int, model_path: str | Path) -> AdapterModel:
    """An adapter that starts with the attention of base layer `exit_layer` and the base's final norm, read tensor by tensor.

    A layer whose attention has parts that the adapter lacks (biases, norms of the heads) would not be the same attention: `CatsError`.
    """
    adapter = AdapterModel(config, exit_layer)
    left_out = parts_left_out(read_config(model_path), set(adapter.state_dict()))
    if left_out:
        raise CatsError(
            f"the layers of {model_path} have {', '.join(left_out)}, which the block of an adapter does not have, so it cannot start as "
            "one of them; start with --init fitted or --init fresh."
        )
    places = {name: f"model.{name.replace('layers.0', f'layers.{exit_layer}')}" for name in adapter.state_dict()}
    tensors = {name: read_tensor(model_path, place).float() for name, place in places.items()}
    for name, own in adapter.state_dict().items():
        if own.shape != tensors[name].shape:
            raise CatsError(
                f"{places[name]} of {model_path} has shape {list(tensors[name].shape)}, but the adapter template asks for "
                f"{list(own.shape)}; give the template of this model, leave --configpath out, or start at random with --init fresh."
            )
    adapter.load_state_dict(tensors)
    return adapter


def parts_left_out(base: PretrainedConfig, names: set[str]) -> list[str]:
    """Biases and head norms that go with the matrices of an adapter in a layer of `base`, and are not among the adapter's tensors."""
    family = family_of(base.model_type, "the base model")
    parts = [f"{matrix}.bias" for matrix in family.biased(base.to_dict()) if f"layers.0.{matrix}.weight" in names]
    parts += [f"{norm}.weight" for norm in family.head_norms]
    return [part for part in parts if f"layers.0.{part}" not in names]


def starting_adapters(
    model_path: str | Path,
    exits: Sequence[int],
    init: str,
    given: Sequence[str],
    seed: int,
    config_path: str | None,
    block: str | None = None,
) -> dict[int, AdapterModel]:
    """One float32 adapter per exit, ready to train.

    Args:
        init: where no directories are given, "base" or "base-fitted" for parts of the base, else random; `fit_norms` completes
            those in `FITTED`.
        given: adapter directories to start from, one per exit in the same order; empty for none.
        config_path: an adapter template (data/*_config.json) instead of the configuration derived from the base; one of
            another width is refused.
        block: "attention" (where None) or "decoder", see cats/adapter.py; directories and templates bring their own.
    """
    base = read_config(model_path)
    if max(exits) >= base.num_hidden_layers:
        raise CatsError(f"exit {max(exits)} must be below the {base.num_hidden_layers} layers of {model_path}.")
    if given and len(given) != len(exits):
        raise CatsError(f"--init-adapter names {len(given)} directories for {len(exits)} exits; give one per exit, in the same order.")
    if given and config_path is not None:
        raise CatsError("--init-adapter brings its own configuration, so --configpath would do nothing; leave one of them out.")
    if block is not None and (given or config_path is not None):
        raise CatsError("--init-adapter and --configpath bring their own kind of block, so --block would do nothing; leave one out.")
    template = None if given else adapter_config(base, config_path, block or BLOCKS[0])
    if template is not None:
        check_width(template, base, f"the adapter template {config_path}", model_path)
    adapters = {}
    for place, exit_layer in enumerate(exits):
        if template is None:
            adapter = AdapterModel.from_pretrained(given[place], exit_layer, dtype="float32")
            check_width(adapter.config, base, f"the adapter in {given[place]}", model_path)
        elif init.startswith("base"):
            adapter = adapter_from_base(template, exit_layer, model_path)
        else:
            adapter = fresh_adapter(template, exit_layer, seed)
        adapter.cover_positions(base.max_position_embeddings)
        adapters[exit_layer] = adapter.float().requires_grad_(True)
    return adapters


def check_width(config: PretrainedConfig, base: PretrainedConfig, what: str, model_path: str | Path) -> None:
    """Refuse an adapter whose states the base cannot give or whose output its head cannot read."""
    if config.hidden_size != base.hidden_size:
        raise CatsError(f"{what} is {config.hidden_size} wide, but {model_path} is {base.hidden_size} wide; it belongs to another model.")


def adapter_config(base: PretrainedConfig, config_path: str | None, block: str) -> LlamaConfig:
    """The configuration of new adapters: derived from the base, or read from a template.

    A template is looked for from the current directory, then from the repository's root. One that is missing, unreadable
    or of another kind of model raises `CatsError`.
    """
    if config_path is None:
        return AdapterModel.config_for(base, block)
    path = next((place for place in (Path(config_path), ROOT / config_path) if place.is_file()), None)
    if path is None:
        known = ", ".join(sorted(f"data/{place.name}" for place in (ROOT / "data").glob("*_config.json")))
        raise CatsError(f"there is no adapter template {config_path}; give a Llama config.json or one of {known}.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or fields.get("model_type", "llama") != "llama":
            raise CatsError(f"the adapter template {config_path} is not a Llama configuration; adapters are Llama layers.")
        return LlamaConfig.from_dict(fields)
    except CONFIG_FAULTS as error:
        raise CatsError(f"cannot read the adapter template {config_path}: {str(error).splitlines()[0]}.") from error
