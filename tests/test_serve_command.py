"""`python -m cats serve` as a process: it answers over a port of its own, and ends as it is told."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

import cats
from tests.answering_server import ADAPTERS, PATIENCE, TINY, asked, load_tiny

QUESTION = "Tell me a story about two brothers."
COMMAND = [sys.executable, "-m", "cats", "serve", "--port", "0", "--model-path", str(TINY), "--no-fallback"]
COMMAND += ["--draft-adapter-path", str(ADAPTERS["draft"]), "--shallow-adapter-path", str(ADAPTERS["shallow"])]


@contextmanager
def process(*flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address; it is killed where the block leaves it running."""
    given = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    running = subprocess.Popen([*COMMAND, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)
    try:
        assert running.stdout is not None
        told = running.stdout.readline()
        address = re.search(r"http://[\d.]+:\d+", told)
        assert address, told + running.communicate()[1]
        yield running, address.group()
    finally:
        running.kill()
        running.communicate()


def test_sigterm_finishes_the_answer_in_hand_and_ends_with_status_0() -> None:
    expected = load_tiny().chat(QUESTION, cats.CascadeConfig(), max_new_tokens=300).text
    with process("--queue", "2", CATS_API_KEY="secret") as (running, address):
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{address}/v1/models").status_code == 401
        request = asked(QUESTION, stream=True, max_tokens=300)
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=request, headers=headers, timeout=PATIENCE) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            text = json.loads(next(lines))["choices"][0]["delta"]["content"]
            running.send_signal(signal.SIGTERM)
            for line in lines:
                if line != "[DONE]":
                    text += json.loads(line)["choices"][0]["delta"].get("content", "")
        assert text == expected
        assert running.wait(PATIENCE) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)
