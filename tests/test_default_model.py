"""The model that commands use where none is named: the fetched one with its adapters, the checkout's without a network, none elsewhere."""

import json
import shutil
from pathlib import Path

import pytest

from cats import smollm2
from cats.cli import ask, default_model
from cats.cli.default_model import TEST_ADAPTERS, TEST_MODEL
from cats.records import sha256
from tests.tiny_models import TinyModel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cached(cache: Path, speaking: TinyModel) -> Path:
    """A little model where the fetched one would be."""
    directory = Path(shutil.copytree(speaking.base, cache / smollm2.NAME))
    (directory / "PROVENANCE.json").write_text("{}")
    return directory


@pytest.fixture
def shipped(tmp_path: Path, speaking: TinyModel, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Its adapters where the shipped ones would be."""
    monkeypatch.setattr(default_model, "SHIPPED", tmp_path / "adapters")
    for name, exit_layer in default_model.EXITS.items():
        shutil.copytree(getattr(speaking, name), tmp_path / "adapters" / f"exit{exit_layer}")
    return {name: tmp_path / "adapters" / f"exit{exit_layer}" for name, exit_layer in default_model.EXITS.items()}


def test_the_fetched_model_and_the_shipped_adapters_come_first(
    cached: Path, shipped: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = default_model.default_model()
    assert (chosen.path, chosen.adapters) == (cached, shipped)
    assert capsys.readouterr().err == ""


def test_a_model_that_is_not_there_is_fetched(cache: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ready = cached.rename(tmp_path / "ready")

    def fetch(report: smollm2.Report) -> Path:
        report("fetching", 0.5)
        return Path(shutil.copytree(ready, cached))

    monkeypatch.setattr(smollm2, "fetch", fetch)
    assert default_model.default_model().path == cached


def test_without_a_network_the_checkouts_test_model_answers(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask.main(["Hello", "--max-new-tokens", "4"])
    said = capsys.readouterr()
    assert "token" in said.out
    lines = said.err.strip().replace("\r", "\n").splitlines()
    sentences = [line for line in lines if "cannot be fetched" in line]
    assert len(sentences) == 1
    assert "HF_HUB_OFFLINE is set" in sentences[0]
    assert "small test model answers in its place" in sentences[0]
    chosen = default_model.default_model()
    assert (chosen.path, chosen.adapters) == (TEST_MODEL, TEST_ADAPTERS)


def test_without_network_and_checkout_it_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(default_model, "TEST_MODEL", tmp_path / "nowhere")
    with pytest.raises(SystemExit) as leaving:
        ask.main(["Hello"])
    assert leaving.value.code == 2
    assert "error: there is no model here" in capsys.readouterr().err


def test_without_adapters_it_says_how_it_drafts(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(default_model, "SHIPPED", tmp_path / "nowhere")
    ask.main(["Hello", "--max-new-tokens", "4"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "so it drafts by prompt lookup" in said
    ask.main(["Hello", "--max-new-tokens", "4", "--method", "autoregressive"])
    assert "drafts by" not in capsys.readouterr().err


def test_with_adapters_the_cascade_answers(cached: Path, shipped: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    ask.main(["Hello", "--max-new-tokens", "4"])
    said = capsys.readouterr()
    assert "token" in said.out
    assert said.err.count("\n") == 0, "nothing but bars that were wiped away"


def test_shipped_adapters_say_what_they_were_trained_for() -> None:
    for directory in sorted(default_model.SHIPPED.glob("exit*")):
        provenance = json.loads((directory / "PROVENANCE.json").read_text(encoding="utf-8"))
        assert provenance["arguments"]["model_path"] == smollm2.NAME
        assert provenance["sha256"]["model.safetensors"] == sha256(directory / "model.safetensors")
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        assert f"exit{config['exit_layer']}" == directory.name
        assert config["hidden_size"] == 576
