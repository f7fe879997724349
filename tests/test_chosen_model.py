"""Which model and adapters the flags of the evaluation mean: by path, by exit, or the default model's own."""

import argparse
import json
import shutil
from pathlib import Path

import pytest

from cats import CatsError
from cats.hub import locate
from cats.methods import PRESETS
from evaluation import chosen_model
from evaluation.chosen_model import adapters_in, exit_of
from evaluation.options import add_model_flags

FIXTURE = Path(__file__).resolve().parent.parent / "data" / "tiny"
ADAPTERS = FIXTURE / "adapters"


def chosen(flags: str, *methods: str) -> chosen_model.ChosenModel:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    return chosen_model.chosen_model([PRESETS[name] for name in methods], parser.parse_args(flags.split()))


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test model as the default one, with adapters of exits 2 and 6."""
    brought = {"draft": ADAPTERS / "draft_exit2", "shallow": ADAPTERS / "shallow_exit6"}
    monkeypatch.setattr(chosen_model, "default_model", lambda: (FIXTURE, brought))


@pytest.mark.usefixtures("default")
def test_the_default_model_brings_its_adapters_and_lets_exits_be_chosen() -> None:
    found = chosen("", "cascade_chain")
    assert (found.name, found.directory) == ("tiny", FIXTURE)
    assert {name: exit_of(path) for name, (path, _) in found.adapters.items()} == {"draft": 2, "shallow": 6}
    found = chosen("--draft-layer 2 --shallow-layer 8", "kangaroo", "cascade_chain")
    assert found.adapters == {"draft": (ADAPTERS / "draft_exit2", 2), "shallow": (ADAPTERS / "shallow_exit8", 8)}
    assert chosen("--draft-layer 4", "kangaroo").adapters == {"draft": (ADAPTERS / "shallow_exit4", 4)}
    assert chosen("", "prompt_lookup").adapters == {}


def test_adapters_are_chosen_by_exit_from_a_folder() -> None:
    found = chosen(f"--model-path {FIXTURE} --adapters {ADAPTERS} --draft-layer 2 --shallow-layer 4", "cascade_chain")
    assert {name: layer for name, (_, layer) in found.adapters.items()} == {"draft": 2, "shallow": 4}
    one = f"--model-path {FIXTURE} --adapters {ADAPTERS} --draft-adapter-path {ADAPTERS / 'shallow_exit4'} --shallow-layer 8"
    assert chosen(one, "cascade_chain").adapters["draft"] == (ADAPTERS / "shallow_exit4", None)


@pytest.mark.usefixtures("default")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--shallow-layer 7", "holds no adapter of exit 7, only of 2, 4, 6, 8"),
        ("--draft-layer 8 --shallow-layer 4", "--draft-layer 8 is not before --shallow-layer 4"),
        (f"--adapters {ADAPTERS} --draft-layer 2", "say by --shallow-layer which of those in"),
        ("--adapters absent --draft-layer 2", "there is no directory absent"),
        (f"--model-path {FIXTURE}", "needs the draft adapter; give --draft-adapter-path, or --adapters FOLDER with --draft-layer"),
        (f"--model-path {FIXTURE} --draft-layer 2", "needs the draft adapter"),
        ("--model-path absent", "there is no directory absent"),
        (f"--adapters x --draft-adapter-path {ADAPTERS} --shallow-adapter-path {ADAPTERS}", "--adapters does nothing"),
    ],
)
def test_what_is_missing_or_does_nothing_is_refused(flags: str, complaint: str) -> None:
    with pytest.raises(CatsError, match=complaint.replace("(", r"\(")):
        chosen(flags, "cascade_chain")


def test_two_adapters_of_one_exit_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("attention", "decoder"):
        shutil.copytree(ADAPTERS / "draft_exit2", tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert list(adapters_in(tmp_path)) == [2]
    with pytest.raises(CatsError, match=r"several adapters of exit 2 \(attention, decoder\)"):
        chosen(f"--model-path {FIXTURE} --adapters {tmp_path} --draft-layer 2", "kangaroo")


def test_a_hub_id_is_the_name_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(place: str | Path) -> Path:
        return FIXTURE if place == "someone/model" else locate(place)

    monkeypatch.setattr(chosen_model, "locate", fetched)
    found = chosen("--model-path someone/model", "autoregressive")
    assert (found.name, found.directory) == ("someone/model", FIXTURE)
