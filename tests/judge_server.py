"""An endpoint that speaks OpenAI's protocol on this machine, in a thread, and misbehaves as it is told to."""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = "It does what was asked.\nRating: 7"
MUMBLE = "I would say seven."


@dataclass
class Script:
    """What the server does, request by request; behind the end of `acts` it answers well.

    Attributes:
        acts: "good", "mumble", "429", "500", "400", "401", "half", "broken", "html", "null", or "slow".
        failing: a request that holds this text gets a 500 each time.
        asked: bodies of the requests; times: when they came.
    """

    acts: list[str] = field(default_factory=list)
    failing: str = ""
    retry_after: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)

    def next_act(self, body: dict[str, Any], key: str) -> str:
        with self.lock:
            self.asked.append(body)
            self.times.append(time.monotonic())
            self.keys.append(key)
            if self.failing and self.failing in json.dumps(body):
                return "500"
            return self.acts.pop(0) if self.acts else "good"


def completion(text: str | None) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}).encode()


class Handler(BaseHTTPRequestHandler):
    """One request, by the server's script."""

    script: Script

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        act = self.script.next_act(body, self.headers.get("Authorization", ""))
        if act == "slow":
            self.script.released.wait(20)
            self.close_connection = True
        elif act in ("400", "401", "429", "500"):
            self.reply(json.dumps({"error": {"message": f"told to say {act}"}}).encode(), status=int(act))
        elif act == "half":
            self.reply(completion(GOOD)[:60], promised=len(completion(GOOD)))
        elif act == "broken":
            self.reply(completion(GOOD)[:60])
        elif act == "html":
            self.reply(b"<html>at your service</html>", kind="text/html")
        else:
            self.reply(completion({"mumble": MUMBLE, "null": None}.get(act, GOOD)))

    def reply(self, content: bytes, status: int = 200, kind: str = "application/json", promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if promised is None else promised))
        if status == 429 and self.script.retry_after is not None:
            self.send_header("Retry-After", self.script.retry_after)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = promised is not None

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serving(acts: Sequence[str] = (), failing: str = "", retry_after: str | None = None) -> Iterator[tuple[str, Script]]:
    """Address and script of a server that runs inside the block."""
    script = Script(list(acts), failing, retry_after)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Scripted", (Handler,), {"script": script}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", script
    finally:
        script.released.set()
        server.shutdown()
        server.server_close()
