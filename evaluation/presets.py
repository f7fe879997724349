"""Methods with their settings under short names, for commands that compare several.

A name stands for settings (`cascade_tree`), and may be changed (`cascade_tree:steps=3,sv_passes=2`).
Settings are those of the papers. Knows configurations; knows no model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from cats import (
    AutoregressiveConfig,
    CascadeConfig,
    CatsError,
    EagleSelfConfig,
    KangarooConfig,
    MethodConfig,
    PromptLookupConfig,
)
from cats.settings import settings_of

PRESETS: dict[str, MethodConfig] = {
    "autoregressive": AutoregressiveConfig(),
    "prompt_lookup": PromptLookupConfig(),
    "kangaroo": KangarooConfig(),
    "eagle_self_chain": EagleSelfConfig(steps=5, tree_topk=1),
    "eagle_self_tree": EagleSelfConfig(steps=5, tree_topk=10, total_tokens=60),
    "cascade_chain": CascadeConfig(steps=5),
    "cascade_tree": CascadeConfig(steps=5, tree_topk=10, total_tokens=40),
    "cascade_tree_two_branch_rounds": CascadeConfig(steps=5, tree_topk=10, total_tokens=40, branch_rounds=2),
    "cascade_tree_60_nodes_five_branch_rounds": CascadeConfig(steps=5, tree_topk=10, total_tokens=60, branch_rounds=5),
    "cascade_chain_two_rounds": CascadeConfig(steps=5, sv_passes=2),
    "cascade_tree_two_rounds": CascadeConfig(steps=5, tree_topk=10, total_tokens=40, sv_passes=2),
}
TITLES = {
    "autoregressive": "plain decoding",
    "prompt_lookup": "prompt lookup",
    "kangaroo": "Kangaroo",
    "eagle_self_chain": "EAGLE-self chain",
    "eagle_self_tree": "EAGLE-self tree, 60 nodes",
    "cascade_chain": "CATS chain",
    "cascade_tree": "CATS tree, 40 nodes",
    "cascade_tree_two_branch_rounds": "CATS tree, 40 nodes, 2 branch rounds",
    "cascade_tree_60_nodes_five_branch_rounds": "CATS tree, 60 nodes, 5 branch rounds",
    "cascade_chain_two_rounds": "CATS chain, 2 rounds",
    "cascade_tree_two_rounds": "CATS tree, 40 nodes, 2 rounds",
}
"""What tables call them."""
PRESET_HELP = f"NAME or NAME:setting=value,...; names: {', '.join(PRESETS)}"


def parse_preset(text: str) -> tuple[str, MethodConfig]:
    """A label and the configuration it stands for; an unknown name or setting, or a value of the wrong type, raises `CatsError`."""
    name, _, changes = text.partition(":")
    if name not in PRESETS:
        raise CatsError(f"unknown method {name!r}; known are {', '.join(PRESETS)}, changed by NAME:setting=value,... if need be.")
    config = PRESETS[name]
    known = settings_of(type(config))
    changed: dict[str, Any] = {}
    for change in changes.split(",") if changes else []:
        setting, _, value = change.partition("=")
        setting = setting.replace("-", "_")
        if setting not in known:
            raise CatsError(f"{text!r} sets {setting!r}, which {name} has not; its settings are {', '.join(known) or 'none'}.")
        try:
            changed[setting] = known[setting].parse(value)
        except ValueError as error:
            raise CatsError(f"{text!r} gives {setting} the value {value!r}; it must be {known[setting].wants}.") from error
    return text, dataclasses.replace(config, **changed)


def title_of(label: str) -> str:
    """What a table calls the method of a label, changed settings included."""
    name, _, changes = label.partition(":")
    return ", ".join([TITLES[name], *(change.replace("=", " ") for change in changes.split(",") if change)])


def parse_presets(texts: Sequence[str]) -> dict[str, MethodConfig]:
    """Configurations by label, in the order given; none twice."""
    return dict(parse_preset(text) for text in texts)
