"""Settings of every kind become flags that work, or are refused by name; records hold them as JSON."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

import pytest

import cats
from cats.cli.method_flags import add_method_flags, chosen_method, every_setting
from cats.errors import ContractError
from cats.methods import METHODS, PRESETS
from cats.planning.plan import View
from cats.settings import as_record, settings_of
from evaluation.presets import parse_presets
from evaluation.subject import memory_record


@dataclass(frozen=True)
class EveryKind:
    """One field of each kind."""

    fast: bool = field(default=True, metadata={"help": "go fast, 100% of the time"})
    store: Path | None = field(default=None, metadata={"help": "datastore"})
    ratio: Optional[float] = field(default=None, metadata={"help": "a share"})  # noqa: UP045 - both spellings must work
    layers: tuple[int, ...] = field(default=(1, 2), metadata={"help": "layers to skip"})
    pair: "tuple[float, float]" = field(default=(0.0, 1.0), metadata={"help": "a range"})
    pool: Literal["lru", "all"] = field(default="lru", metadata={"help": "what is kept"})
    label: str = field(default="x", metadata={"help": "any text"})
    name: ClassVar[str] = "every_kind"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Adds a configuration to the methods."""

    def register(config_class: type) -> None:
        monkeypatch.setitem(METHODS, config_class.name, config_class)  # type: ignore[attr-defined]

    return register


def parsed(*flags: str) -> Any:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_method_flags(parser)
    return chosen_method("every_kind", parser.parse_args(flags))


def test_every_kind_of_setting_has_a_flag(registered: Callable[[type], None], capsys: pytest.CaptureFixture[str]) -> None:
    registered(EveryKind)
    assert parsed() == EveryKind()
    flags = "--no-fast --store a/b --ratio 0.5 --layers 3 4 5 --pair 0.25 0.75 --pool all --label y"
    assert parsed(*flags.split()) == EveryKind(False, Path("a/b"), 0.5, (3, 4, 5), (0.25, 0.75), "all", "y")
    assert parsed("--fast").fast is True
    for bad, complaint in (("--pool some", "invalid choice"), ("--pair 1", "expected 2 arguments"), ("--ratio x", "invalid float value")):
        with pytest.raises(SystemExit):
            parsed(*bad.split())
        assert complaint in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "go fast, 100% of the time (default: every_kind True)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", [dict, list[int], int | str, tuple[int, str], tuple[bool, ...], Literal[1, "a"], bytes, Any])
def test_a_setting_that_no_flag_can_carry_is_refused_by_name(kind: Any, registered: Callable[[type], None]) -> None:
    odd = dataclasses.make_dataclass("OddConfig", [("oddity", kind, None)], frozen=True, namespace={"name": "odd"})
    registered(odd)
    with pytest.raises(ContractError, match=r"the setting oddity of OddConfig has the type .* which no flag can carry"):
        every_setting()


def test_one_name_means_one_thing(registered: Callable[[type], None]) -> None:
    registered(dataclasses.make_dataclass("OtherConfig", [("steps", str, "x")], frozen=True, namespace={"name": "other"}))
    with pytest.raises(ContractError, match="the setting steps of the method other is not what another method calls so"):
        every_setting()


def test_presets_change_settings_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = PRESETS
    monkeypatch.setitem(known, "every", EveryKind())
    text = "every:fast=false,store=a/b,ratio=0.5,layers=3+4,pair=0+1,pool=all"
    changed: Any = parse_presets([text])[text]
    assert changed == EveryKind(False, Path("a/b"), 0.5, (3, 4), (0.0, 1.0), "all")
    for change, wanted in (("pool=some", "one of lru, all"), ("pair=1", "2 values joined by +, each a float"), ("fast=1", "a bool")):
        with pytest.raises(cats.CatsError, match=f"it must be {wanted}".replace("+", r"\+")):
            parse_presets([f"every:{change}"])


def test_records_hold_settings_as_json() -> None:
    record = as_record(EveryKind(store=Path("a/b")))
    assert json.loads(json.dumps(record)) == record
    assert (record["name"], record["store"], record["layers"]) == ("every_kind", "a/b", [1, 2])


def test_records_hold_what_a_method_asks_of_memory_as_json() -> None:
    record = memory_record(cats.MemoryOptions(views=(View(mlp=frozenset({3, 1})),), method_bytes=8))
    assert json.loads(json.dumps(record))["views"] == [{"precision": "exact", "attention": [], "mlp": [1, 3]}]
    assert "method_bytes" not in record, "it follows from the method, and older records lack it"


def test_the_methods_own_settings_keep_their_order_and_help() -> None:
    assert list(settings_of(cats.CascadeConfig)) == ["steps", "threshold", "tree_topk", "total_tokens", "sv_passes", "verifier"]
    assert settings_of(cats.CascadeConfig)["threshold"].kind is float
    assert "drafted in a round" in settings_of(cats.KangarooConfig)["steps"].help
