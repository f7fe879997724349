"""The method of docs/adding_a_method.md does what the page says, as it stands there."""

import argparse
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

import cats
from cats.cli.method_flags import add_method_flags, chosen_method
from cats.methods import CLASSES, METHODS, PRESETS, TITLES
from tests.scripted_model import follow, scripted_model
from tests.test_house_rules import ROOT

PAGE = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")


@pytest.fixture
def page() -> Iterator[ModuleType]:
    """The page's code, run; what it registers is forgotten afterwards."""
    registries: list[dict[str, object]] = [METHODS, CLASSES, PRESETS, TITLES]  # type: ignore[list-item]
    before = [dict(known) for known in registries]
    module = ModuleType("page")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, module.__dict__)
    yield module
    for known, kept in zip(registries, before, strict=True):
        known.clear()
        known.update(kept)


def test_the_page_is_short() -> None:
    assert len(PAGE.splitlines()) <= 60


def test_the_pages_method_decodes_with_a_flag_of_its_own(page: ModuleType) -> None:
    circle = follow([(token + 1) % 8 for token in range(8)])
    model = scripted_model(circle, circle, circle)
    parser = argparse.ArgumentParser()
    add_method_flags(parser)
    config = chosen_method("follower", parser.parse_args(["--length", "4"]))
    assert config == page.FollowerConfig(4)
    answer = cats.generate(model, [0, 1], config, cats.GenerationConfig(max_new_tokens=15, eos_token_ids=()))
    assert answer.ids == [(token + 2) % 8 for token in range(15)]
    assert [trace.committed for trace in answer.traces] == [1, 5, 5, 4]
    with pytest.raises(cats.CatsError, match="length is 0; it must be at least 1"):
        page.FollowerConfig(length=0)


def test_nothing_of_it_is_left() -> None:
    assert "follower" not in METHODS
