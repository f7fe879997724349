"""What is served where: OpenAI's models and chat completions under /v1, the page at /."""

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cats.errors import CatsError
from cats.serve.answering import Answering
from cats.serve.asked import Asked, read_asked
from cats.serve.desk import Desk
from cats.serve.refusals import RequestError

BODY_SECONDS = 30.0
"""In which a request's body must have come."""
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """How a model is offered.

    Attributes:
        name: the model's, that requests must give.
        api_key: that requests must bring; None: none.
        alone: nobody but this machine may ask, so a host of another name is a web page's attempt to get in.
        temperature: where a request gives none.
        max_tokens: of an answer, where a request does not say.
        body_bytes: of a request, at most.
    """

    name: str
    api_key: str | None = None
    alone: bool = True
    temperature: float = 0.0
    max_tokens: int = 1024
    body_bytes: int = 2**20


def build_app(desk: Desk, settings: Settings) -> Starlette:
    """The application."""
    counter = Counter(desk, settings)
    routes = [
        Route("/", page, methods=["GET"]),
        Route("/v1/models", counter.models, methods=["GET"]),
        Route("/v1/models/{name:path}", counter.model, methods=["GET"]),
        Route("/v1/chat/completions", counter.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {RequestError: refused, HTTPException: not_here, ClientDisconnect: gone, Exception: broken}
    return Starlette(routes=routes, exception_handlers=handlers, middleware=[Middleware(Guard, settings)])


async def refused(request: Request, error: RequestError) -> Response:
    return error.response()


async def not_here(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:100]}: {error.detail}."
    return RequestError(
        error.status_code, message, code="not_found" if error.status_code == 404 else None, headers=error.headers
    ).response()


async def gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def broken(request: Request, error: Exception) -> Response:
    return RequestError(500, "an internal error; the server's log has more.", code="internal_error").response()


class Guard:
    """Lets a request in that names an allowed host and, under /v1, brings the key."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal.response() if refusal else self._app)(scope, receive, send)

    def _refusal(self, request: Request) -> RequestError | None:
        key, host = self._settings.api_key, re.sub(r":\d+$", "", request.headers.get("host", ""))
        if self._settings.alone and host.lower() not in OWN_NAMES:
            return RequestError(421, f"this server answers to {', '.join(OWN_NAMES)}.", code="wrong_host")
        if key is None or not request.scope["path"].startswith("/v1"):
            return None
        given = request.headers.get("authorization", "").encode()
        if hmac.compare_digest(given, f"Bearer {key}".encode()):
            return None
        headers = {"WWW-Authenticate": "Bearer"}
        return RequestError(401, "the API key is wrong or missing; send it as a Bearer token.", code="invalid_api_key", headers=headers)


class Counter:
    """Takes requests."""

    def __init__(self, desk: Desk, settings: Settings):
        self._desk, self._settings = desk, settings
        self._model = {"id": settings.name, "object": "model", "created": int(time.time()), "owned_by": "cats", "cats": desk.about()}

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model)

    def _check_name(self, name: str) -> None:
        if name != self._settings.name:
            raise RequestError(404, f"there is no model {name[:100]!r} here, only {self._settings.name!r}.", "model", "model_not_found")

    async def chat(self, request: Request) -> Answering:
        """POST /v1/chat/completions."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "send the request as Content-Type: application/json.", code="unsupported_media_type")
        asked = read_asked(await read_body(request, self._settings.body_bytes), self._settings.temperature, secrets.randbelow(2**31))
        self._check_name(asked.model)
        try:
            ids = await asyncio.to_thread(self._desk.model.text.prompt_ids, asked.messages)
        except CatsError as error:
            raise RequestError(400, str(error), "messages", "invalid_value") from error
        room = self._room(len(ids), asked)
        return Answering(self._desk, self._settings.name, ids, replace(asked, generation=replace(asked.generation, max_new_tokens=room)))

    def _room(self, prompt: int, asked: Asked) -> int:
        """Tokens that the answer may have."""
        context, wanted = self._desk.context, asked.max_tokens or 1
        if prompt + wanted > context:
            answer = f" and its answer {wanted}" if asked.max_tokens else ""
            message = f"the context holds {context} tokens, the answer included; the conversation has {prompt}{answer}."
            param = "messages" if prompt >= context else asked.length_field
            raise RequestError(400, message, param, "context_length_exceeded")
        return asked.max_tokens or min(self._settings.max_tokens, context - prompt)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, of so many bytes at most."""
    too_large = RequestError(413, f"the body is larger than {limit} bytes.", code="request_too_large")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise RequestError(408, f"the body did not come within {BODY_SECONDS:g} s.", code="timeout") from error
    return bytes(body)


PAGE = files("cats.serve").joinpath("page.html").read_text(encoding="utf-8")


def digest(tag: str) -> str:
    """What a Content-Security-Policy calls the page's one element of this tag by."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


POLICY = (
    f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
PAGE_HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


async def page(request: Request) -> Response:
    """GET /."""
    return Response(PAGE, headers=PAGE_HEADERS | {"Cache-Control": "no-cache"}, media_type="text/html")
