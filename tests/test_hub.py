"""Checkpoints by hub id: fetched once, found in the cache, refused in one sentence. No network: fakes, and a real cache on disk."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import cats
from cats.errors import CatsError
from cats.hub import locate
from tests.tiny_models import TinyModel

ID = "some-lab/small-model"
HTTP = importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])  # the HTTP library below the hub's client
REQUEST = HTTP.Request("GET", "https://hub.example")


def put_into_cache(cache: Path, hub_id: str, directory: Path) -> Path:
    """A directory as the hub's cache holds it."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    return Path(shutil.copytree(directory, folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_the_cache_is_enough(speaking: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = put_into_cache(cache, ID, speaking.base)
    put_into_cache(cache, "some-lab/draft", speaking.draft)
    assert locate(ID) == kept
    model = cats.load(ID, {"draft": "some-lab/draft", "shallow": speaking.shallow})
    local = cats.load(speaking.base)
    assert model.chat("Hi.", max_new_tokens=8).ids == local.chat("Hi.", "autoregressive", max_new_tokens=8).ids
    with pytest.raises(CatsError, match="some-lab/other, and it is not in the local cache of the hub"):
        locate("some-lab/other")


@pytest.mark.parametrize(
    ("files", "weights"), [(["model-1.safetensors", "pytorch_model.bin"], "model*.safetensors"), ([], "pytorch_model*.bin")]
)
def test_only_one_form_of_the_weights_is_fetched(files: list[str], weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **more: Any) -> str:
        asked.update(more, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, hub_id: ["config.json", *files])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate(ID) == tmp_path
    assert asked["hub_id"] == ID
    patterns = asked["allow_patterns"]
    assert {"config.json", "generation_config.json", "tokenizer*", weights} <= set(patterns)
    assert sum("model" in pattern and not pattern.endswith(".json") for pattern in patterns) == 1


FAULTS: dict[str, tuple[Exception, str]] = {
    "missing, misspelt or private": (
        errors.RepositoryNotFoundError("404", response=HTTP.Response(404, request=REQUEST)),
        "no repository of that name: it is misspelt, or private",
    ),
    "gated": (errors.GatedRepoError("403", response=HTTP.Response(403, request=REQUEST)), "asks for consent"),
    "no network": (HTTP.ConnectError("name resolution failed\nmore"), "cannot be fetched from the hub: name resolution failed$"),
    "a connection that breaks": (ConnectionError("reset"), "cannot be fetched from the hub: reset$"),
    "offline": (errors.OfflineModeIsEnabled("offline"), "not in the local cache"),
    "a name that cannot be": (errors.HFValidationError("no double dots"), "no double dots"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_fetched_is_one_sentence(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, sentence = FAULTS[name]

    def fail(self: object, hub_id: str) -> list[str]:
        raise fault

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    with pytest.raises(CatsError, match=sentence) as caught:
        cats.load(ID)
    assert ID in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_network_an_earlier_copy_is_used(speaking: TinyModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, hub_id: str) -> list[str]:
        raise HTTP.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    kept = put_into_cache(cache, ID, speaking.base)
    assert locate(ID) == kept


@pytest.mark.parametrize("place", ["absent", "./absent/model", "a/b/c", "/absent/model"])
def test_what_is_no_hub_id_is_not_asked_for(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatsError, match=r"there is no directory .*, or a hub id like"):
        locate(place)
