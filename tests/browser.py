"""A headless Chromium, driven by the DevTools protocol over a pipe (chromedevtools.github.io/devtools-protocol)."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
FLAGS += " --disable-sync --remote-debugging-pipe"
PATIENCE = 300.0


class Page:
    """One tab. Commands are sent one at a time, and events are kept until they are asked for."""

    def __init__(self, sending: int, receiving: int):
        self._sending, self._receiving = sending, os.fdopen(receiving, "rb")
        self._session: str | None = None
        self._count = 0
        self.events: list[dict[str, Any]] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._sending, json.dumps({"id": self._count, "method": method, "params": params, **session}).encode() + b"\0")
        while True:
            answer = self._received()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def _received(self) -> dict[str, Any]:
        message = bytearray()
        while (byte := self._receiving.read(1)) != b"\0":
            assert byte, "the browser has gone"
            message += byte
        return dict(json.loads(message))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Put text where the cursor is."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "", shift: bool = False) -> None:
        """Press a key and let it go."""
        pressed = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.command("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
        self.command("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def resize(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Show the page in this size, light or dark."""
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", features=scheme)


@contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A browser with an empty profile in this folder, and a tab in it."""
    assert CHROMIUM is not None
    there, sending = os.pipe()
    receiving, back = os.pipe()
    shell = f'exec "$@" 3<&{there} 4>&{back}'
    command = ["bash", "-c", shell, "chromium", CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"]
    running = subprocess.Popen(command, pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(there)
    os.close(back)
    try:
        yield Page(sending, receiving)
    finally:
        running.kill()
        running.wait()
        os.close(sending)
