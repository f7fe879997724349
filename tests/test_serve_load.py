"""200 requests of 16 clients, a third of them bad or given up, under a memory budget: nothing lost, nothing mixed up, memory within it."""

import json
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import cats
from tests.answering_server import PATIENCE, asked, load_tiny
from tests.test_serve_command import COMMAND, process

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
CLIENTS, REQUESTS, TOKENS = 16, 200, 12
SLACK = 16 * 2**20
"""What the interpreter holds differs a little from one process to the next."""
KINDS = {"whole": 4, "stream": 4, "leaves": 1, "bad JSON": 1, "oversized": 1, "another model": 1}
QUESTIONS = [f"Question {number}: what is {number} + {number + 1}, and why?" for number in range(12)]
FLAGS = ("--queue", str(CLIENTS), "--budget-positions", "256", "--max-new-tokens", str(TOKENS), "--no-pinning")


def least_budget() -> int:
    """What a server says that it needs at least."""
    ended = subprocess.run(
        [*COMMAND, *FLAGS, "--method", "cascade", "--memory-budget", "50MB"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    least = re.search(r"needs at least ([\d.]+) (MB|GB)", ended.stderr)
    assert least, ended.stderr
    return int(float(least[1]) * {"MB": 10**6, "GB": 10**9}[least[2]])


def memory_peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Client:
    """Sends one request of a kind, and says what came of it: the text of an answer, or a status."""

    def __init__(self, address: str):
        self._place = f"{address}/v1/chat/completions"
        self._http = httpx.Client(timeout=PATIENCE)

    def send(self, kind: str, question: str) -> str | int | None:
        """None where the client went away."""
        if kind in ("stream", "leaves"):
            return self._streamed(question, leaves=kind == "leaves")
        body = json.dumps(asked(question, max_tokens=TOKENS) | ({"model": "other"} if kind == "another model" else {}))
        body = {"bad JSON": body[:-1], "oversized": body + " " * 2**20}.get(kind, body)
        response = self._http.post(self._place, content=body.encode(), headers={"Content-Type": "application/json"})
        return response.json()["choices"][0]["message"]["content"] if response.status_code == 200 else response.status_code

    def _streamed(self, question: str, leaves: bool) -> str | None:
        text = ""
        with self._http.stream("POST", self._place, json=asked(question, max_tokens=TOKENS, stream=True)) as response:
            for line in filter(None, response.iter_lines()):
                if line == "data: [DONE]":
                    return text
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "")
                if leaves:
                    return None
        raise AssertionError("the stream ended without its end")


def test_many_clients_under_a_memory_budget() -> None:
    model, choices = load_tiny(), random.Random(0)
    texts = {question: model.chat(question, cats.CascadeConfig(), max_new_tokens=TOKENS).text for question in QUESTIONS}
    refused = {"bad JSON": 400, "oversized": 413, "another model": 404, "leaves": None}
    plan = [(choices.choices([*KINDS], [*KINDS.values()])[0], choices.choice(QUESTIONS)) for _ in range(REQUESTS)]
    budget = least_budget() + SLACK
    with process(*FLAGS, "--method", "cascade", "--memory-budget", f"{budget}B") as (running, address):
        about = httpx.get(f"{address}/v1/models").json()["data"][0]["cats"]
        assert about["budget"].endswith("for the whole process")
        assert "streamed a pass" in about["wire"]
        clients = [Client(address) for _ in range(CLIENTS)]

        def work(number: int) -> list[tuple[str, str, str | int | None]]:
            return [(kind, question, clients[number].send(kind, question)) for kind, question in plan[number::CLIENTS]]

        with ThreadPoolExecutor(CLIENTS) as pool:
            results = [result for part in pool.map(work, range(CLIENTS)) for result in part]
        assert len(results) == REQUESTS
        assert [(kind, question, found) for kind, question, found in results if found != refused.get(kind, texts[question])] == []
        assert memory_peak(running.pid) <= budget
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 0
