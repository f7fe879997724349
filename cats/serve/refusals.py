"""What is not answered, said in the form of OpenAI's errors."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class RequestError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        message: one sentence for whoever wrote the request.
        param: the field of the request that is at fault.
        code: a word for programs.
        kind: OpenAI's "type"; where it is left out, that of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.fields: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """As it goes over the wire."""
        return Response(json.dumps(self.fields), self.status, self.headers, "application/json")
