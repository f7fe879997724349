"""An adapter goes to the hub with its card and comes back: the hub is a server of this process that speaks its protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from cats.adapter import AdapterModel
from cats.calibration import Calibration, calibration_in
from cats.errors import CatsError
from tests.tiny_models import TinyModel

NAME = "some-lab/small-draft"


class Hub(BaseHTTPRequestHandler):
    """Repositories that are made, and files that are committed to them."""

    folder: Path
    repositories: list[dict[str, object]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.repositories.append(json.loads(body))
            self._reply({"url": f"http://{self.headers['Host']}/{NAME}"})
        elif self.path.endswith("/preupload/main"):
            about = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._reply({"files": [{"path": one["path"], **about} for one in json.loads(body)["files"]]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (self.folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            self._reply({"commitOid": "0" * 40, "commitUrl": f"http://{self.headers['Host']}/{NAME}/commit/{'0' * 40}", "hookOutput": ""})
        else:
            self._reply({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self._reply({"siblings": [], "sha": "0" * 40, "id": NAME})

    def _reply(self, fields: dict[str, object]) -> None:
        text = json.dumps(fields).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *about: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Here", (Hub,), {"folder": tmp_path, "repositories": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield handler
        server.shutdown()


def test_there_and_back(speaking: TinyModel, hub: type[Hub]) -> None:
    adapter = AdapterModel.from_pretrained(speaking.draft)
    adapter.calibration = Calibration(3, (0.1, 0.9), (0.2, 0.3, 0.5))
    found = adapter.push_to_hub(NAME, "some-lab/small", description="Trained on nothing.", license_name="mit", private=True, token="hf_x")
    assert found.endswith(f"/{NAME}/commit/{'0' * 40}")
    assert [(one["name"], one["visibility"]) for one in hub.repositories] == [("small-draft", "private")]
    assert {path.name for path in hub.folder.iterdir()} == {"README.md", "config.json", "model.safetensors", "calibration.json"}
    back = AdapterModel.from_pretrained(hub.folder)
    assert (back.exit_layer, back.calibration) == (adapter.exit_layer, adapter.calibration)
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    card = ModelCard.load(hub.folder / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("some-lab/small", "cats", "mit")
    assert f'cats.load("some-lab/small", {{"draft": "{NAME}"}})' in card.text
    assert card.text.rstrip().endswith("Trained on nothing.")


def test_a_saved_adapter_without_a_calibration_leaves_none(speaking: TinyModel, tmp_path: Path) -> None:
    adapter = AdapterModel.from_pretrained(speaking.draft)
    adapter.calibration = Calibration(3)
    adapter.save_pretrained(tmp_path)
    assert calibration_in(tmp_path) == Calibration(3)
    AdapterModel.from_pretrained(speaking.draft).save_pretrained(tmp_path)
    assert not (tmp_path / "calibration.json").exists()


def test_what_cannot_be_pushed_is_said_in_a_sentence(speaking: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CatsError, match=f"cannot push to {NAME}: .*; log in by `hf auth login`"):
        AdapterModel.from_pretrained(speaking.draft).push_to_hub(NAME, "some-lab/small", token="hf_x")
