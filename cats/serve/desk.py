"""One model that answers one request at a time; the others stand in line, and the line is short.

The model runs in a thread of its own, one step at a time; everything else happens in the event loop. The caches of the last answer are
kept: of a conversation's next turn only what is new is read.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import cats
from cats.api import CatsModel
from cats.config import GenerationConfig
from cats.engine import Step
from cats.methods import Method
from cats.runtime.budget import scope
from cats.serve.refusals import RequestError


class Desk:
    """Where answers are made.

    Args:
        method: that makes them.
        places: requests that may stand in line.

    Attributes:
        context: positions that prompt and answer may take.
        closing: set when no answer is begun any more.
    """

    def __init__(self, model: CatsModel, method: Method, places: int):
        self.model, self.method, self._places = model, method, places
        source = model.base.source
        self.context = min(model.base.context, source.plan.demand.positions) if source.one_answer else model.base.context
        self.closing = False
        self._kept = cats.KeptCaches(model)
        self._thread = ThreadPoolExecutor(1, "answers")
        self._turn = asyncio.Lock()
        self._inside = 0
        self._seconds = 1.0

    def about(self) -> dict[str, Any]:
        """How the model runs, for people."""
        source, exits = self.model.base.source, self.model.exits(self.method.adapters)
        plan, link = source.plan, source.streamer.link if source.streamer else None
        budget = "no memory budget" if plan.budget_bytes is None else f"{megabytes(plan.budget_bytes)} for {scope(plan.covers)}"
        slowed = f", {link.label}" if link and link.bytes_per_second else ""
        wire = f"{megabytes(plan.streamed_bytes)} streamed a pass{slowed}" if link else "nothing streamed"
        method = self.method.config.label(tuple(exits.values()))
        return {"method": method, "budget": budget, "wire": wire, "context": self.context}

    @property
    def inside(self) -> int:
        """Requests that are being answered or stand in line."""
        return self._inside

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """First come, first served; `RequestError` where the line is full, or the server goes down."""
        if self.closing:
            raise closed()
        if self._inside > self._places:
            wait = str(math.ceil(self._seconds * self._inside))
            message = f"{self._inside} requests are here already; try again in {wait} s."
            raise RequestError(429, message, code="rate_limit_exceeded", kind="requests", headers={"Retry-After": wait})
        self._inside += 1
        try:
            async with self._turn:
                if self.closing:
                    raise closed()
                began = time.monotonic()
                yield
                self._seconds += 0.3 * (time.monotonic() - began - self._seconds)
        finally:
            self._inside -= 1

    async def steps(self, ids: Sequence[int], config: GenerationConfig, stop: Sequence[str]) -> AsyncGenerator[Step, None]:
        """The steps of an answer; closing this ends it with the step in hand. Within a `turn`."""
        steps = cats.stream(self.model, ids, self.method, config, stop=self.model.text.stop(stop), kept=self._kept)
        try:
            while (step := await asyncio.get_running_loop().run_in_executor(self._thread, next, steps, None)) is not None:
                yield step
        finally:
            self._thread.submit(steps.close)


def closed() -> RequestError:
    """What is said to those who come late."""
    return RequestError(503, "the server is going down.", code="shutting_down")


def megabytes(nbytes: int) -> str:
    """Whole ones."""
    return f"{nbytes / 1e6:.0f} MB"
