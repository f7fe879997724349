"""A model served in a thread of this process, on a port of its own."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn

import cats
from cats.methods import Method
from cats.serve.app import Settings, build_app
from cats.serve.desk import Desk

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
ADAPTERS: dict[str, Any] = {"draft": TINY / "adapters" / "draft_exit2", "shallow": TINY / "adapters" / "shallow_exit6"}
NAME = TINY.name
PATIENCE = 300.0
"""Seconds without a byte after which a test gives up."""


def asked(question: str, **fields: Any) -> dict[str, Any]:
    """A request with one question."""
    return {"model": NAME, "messages": [{"role": "user", "content": question}], **fields}


@dataclass
class Served:
    """A running server.

    Attributes:
        address: like http://127.0.0.1:1234.
    """

    address: str
    desk: Desk

    def client(self, key: str = "none") -> openai.OpenAI:
        """The client of OpenAI's own library; it does not try again, so that every refusal shows."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def post(self, body: Any = None, **request: Any) -> httpx.Response:
        """A request for an answer, of this JSON or as it is given."""
        given = request if body is None else {"json": body, **request}
        return httpx.post(f"{self.address}/v1/chat/completions", timeout=PATIENCE, **given)

    def connect(self) -> socket.socket:
        """A connection."""
        host, port = self.address.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=PATIENCE)


def load_tiny(**settings: Any) -> cats.CatsModel:
    """The test model with its adapters."""
    return cats.load(TINY, ADAPTERS, dtype="float32", plan=None, **settings)


class Gate:
    """Holds every cycle of a method until it is let through; counts those that began."""

    def __init__(self, propose: Callable[..., Any]):
        self.propose, self.begun, self.permits = propose, 0, threading.Semaphore(0)

    def __call__(self, *given: Any) -> Any:
        self.begun += 1
        assert self.permits.acquire(timeout=PATIENCE)
        return self.propose(*given)

    def open(self) -> None:
        self.permits.release(10_000)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def serving(model: cats.CatsModel, method: Method | None = None, places: int = 8, **settings: Any) -> Iterator[Served]:
    """Serve the model inside the block."""
    method = method or cats.build_method(cats.CascadeConfig(), model)
    listener = socket.create_server(("127.0.0.1", 0))
    desk = Desk(model, method, places)
    app = build_app(desk, Settings(NAME, **settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))

    def run() -> None:
        torch.set_num_threads(1)
        asyncio.run(server.serve([listener]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", desk)
    finally:
        server.should_exit = True
        thread.join()
