"""The response to a request for an answer: as a whole, or as server-sent events while it grows. A client that goes away ends it."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from cats.serve.asked import Asked
from cats.serve.desk import Desk
from cats.serve.reply import Piece, Reply

SEND_SECONDS = 60.0
"""In which a client must take what it is sent; it would keep the others waiting."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and drop it when the client goes away; the request's body must have been read."""

    async def leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaves = asyncio.ensure_future(work), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({working, leaves}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaves.cancel()
        working.cancel()
        await asyncio.wait({working})
    if not working.cancelled():
        working.result()


class Answering:
    """The response to a request: waits for its turn, then sends the answer as a whole or as it grows."""

    def __init__(self, desk: Desk, name: str, ids: Sequence[int], asked: Asked):
        self._desk, self._ids, self._asked = desk, ids, asked
        self._reply = Reply(desk.model.text, asked.stop, len(ids), desk.method.config)
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI; a client that goes away ends its answer. `TimeoutError` where one stays and does not read."""

        async def send_soon(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        await while_there(receive, self._send(scope, receive, send_soon))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._desk.turn(), aclosing(self._desk.steps(self._ids, self._asked.generation, self._asked.stop)) as steps:
            parts = (self._reply.take(step) async for step in steps)
            if self._asked.stream:
                await self._send_stream(parts, send)
                return
            async for _ in parts:
                pass
        await JSONResponse(self._whole())(scope, receive, send)

    def _whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._reply.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reply.finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._reply.usage()}

    async def _send_stream(self, parts: AsyncIterator[list[Piece]], send: Send) -> None:
        """Events of one chunk each. The status goes out with the first tokens, so that an error before them has its own."""
        begun = False
        async for pieces in parts:
            if not begun:
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send(event(self._chunk([], {"role": "assistant", "content": ""})))
                begun = True
            await send(event(self._chunk(pieces, {"content": "".join(piece.text for piece in pieces)})))
        await send(event(self._chunk([], {}, self._reply.finish_reason)))
        if self._asked.include_usage:
            await send(event({**self._chunk([], {}), "choices": [], "usage": self._reply.usage()}))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _chunk(self, pieces: Sequence[Piece], delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        extension = {"pieces": [piece._asdict() for piece in pieces], **self._reply.figures()}
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage, "cats": extension}


def event(fields: dict[str, Any]) -> dict[str, Any]:
    """A server-sent event as a message of ASGI."""
    return {"type": "http.response.body", "body": b"data: " + json.dumps(fields).encode() + b"\n\n", "more_body": True}
