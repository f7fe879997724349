"""Methods with their settings under short names, for commands that compare several.

A name stands for settings (`cascade_tree`), and may be changed (`cascade_tree:steps=3,sv_passes=2`).
The presets are the methods' own (`cats.methods.base.Method.presets`). Loads no model.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats import CatsError, MethodConfig
from cats.earlyexit import read_config
from cats.methods import CLASSES, PRESETS, TITLES
from cats.settings import settings_of

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
    """What a table calls the method of a label, changed settings included; of a path its last part."""
    name, _, changes = label.partition(":")
    pairs = [change.partition("=") for change in changes.split(",") if change]
    return ", ".join([TITLES[name], *(f"{setting} {value.rpartition('/')[2]}" for setting, _, value in pairs)])


def parse_presets(texts: Sequence[str]) -> dict[str, MethodConfig]:
    """Configurations by label, in the order given; none twice."""
    return dict(parse_preset(text) for text in texts)


def runnable_presets(directory: Path, coarse: str | None = None) -> dict[str, MethodConfig]:
    """All names, but for those that lack something to run with the checkpoint in `directory`, which standard error tells.

    Args:
        coarse: the copy that loading will make (`MemoryOptions.coarse`).
    """
    base, runnable = read_config(directory), {}
    for name, config in PRESETS.items():
        lacking = CLASSES[config.name].lacks(config, base, coarse)
        if lacking is None:
            runnable[name] = config
        else:
            sys.stderr.write(f"{name} is left out: {lacking}\n")
    return runnable
