"""Every error's way to HTTP, once: status, OpenAI's body, headers.

To the tree of `winnow.engine.errors` the server adds its own leaf:

WinnowError
└── ApiError                     what only HTTP knows: 401, 404, 408, 413, 415, 504 …

Messages of these errors are written for the caller. Anything else that is raised is a bug: it is logged by its type
and its place, never by its text (which may quote a prompt), and the caller reads "internal error".
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from winnow.engine.errors import EngineDied, Overloaded, RequestError, WinnowError

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"


class ApiError(WinnowError):
    """An answer that only HTTP knows."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """The client closed its connection."""


@dataclass(frozen=True)
class ErrorAnswer:
    """What the caller of a failed request reads."""

    status: int
    message: str
    type: str
    param: str | None
    code: str | None
    headers: Mapping[str, str]

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body),
            status_code=self.status,
            headers=dict(self.headers),
            media_type="application/json",
        )


def answer(error: BaseException) -> ErrorAnswer:
    """The one mapping."""
    match error:
        case ApiError():
            return ErrorAnswer(error.status, error.message, error.type, error.param, error.code, error.headers)
        case RequestError():
            return ErrorAnswer(400, error.message, INVALID, error.param, error.code, {})
        case Overloaded():
            retry = {"Retry-After": str(error.retry_after_s)}
            return ErrorAnswer(503, str(error), "service_unavailable_error", None, "overloaded", retry)
        case EngineDied():
            message = "the engine lost this request; it can be sent again"
            return ErrorAnswer(503, message, "server_error", None, "engine_died", {"Retry-After": "5"})
        case ClientGone():
            return ErrorAnswer(499, "the client closed the connection", INVALID, None, "client_closed_request", {})
        case HTTPException():
            return _of_framework(error)
    log_bug(error)
    return ErrorAnswer(500, "internal error", "server_error", None, "internal_error", {})


def _of_framework(error: HTTPException) -> ErrorAnswer:
    """404, 405 and whatever else routing says."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    kind = INVALID if error.status_code < 500 else "server_error"
    message = {
        404: "there is no such URL",
        405: "this URL does not take that method",
    }.get(error.status_code, "the request was refused")
    return ErrorAnswer(error.status_code, message, kind, None, code, error.headers or {})


def log_bug(error: BaseException) -> None:
    """Type and stack of an unexpected error, and of its causes; not their messages."""
    chain: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        chain.append(f"{type(seen).__name__} at\n" + "".join(traceback.format_tb(seen.__traceback__)))
        seen = seen.__cause__ or seen.__context__
    logger.error("unexpected %s", "caused by ".join(chain))


async def handle(request: Request, error: Exception) -> Response:
    """Exception handler of the application."""
    return answer(error).response()


def json_path(location: Sequence[str | int], body: Any) -> str | None:
    """`messages[0].role` of a pydantic location.

    Pydantic adds the names of union members to its locations; what is not in the body is left out, except the last
    part, which may name a field that is missing.
    """
    path = ""
    for i, part in enumerate(location):
        if isinstance(part, int):
            if not isinstance(body, list) or part >= len(body):
                continue
            path += f"[{part}]"
            body = body[part]
        elif isinstance(body, dict) and (part in body or i == len(location) - 1):
            path += f".{part}" if path else part
            body = body.get(part)
    return path or None


def from_pydantic(errors: Sequence[Mapping[str, Any]], body: Any) -> RequestError:
    """The first thing that pydantic found wrong, said with the field's name and without the value."""
    first = errors[0]
    param = json_path(first["loc"], body)
    name = param or "the body"
    match first["type"]:
        case "extra_forbidden":
            message = f"unknown field: {_short(param)}"
            return RequestError(_short(param), message, "unknown_field")
        case "missing":
            return RequestError(param, f"{name} is required", "missing_field")
        case "value_error":
            why = str(first["ctx"]["error"])
        case _:
            why = str(first["msg"])
            why = why[0].lower() + why[1:]
    return RequestError(param, f"{name}: {why}", "invalid_value")


def _short(param: str | None) -> str:
    """A name that the caller made up, at a length that fits an error."""
    name = param or ""
    return name if len(name) <= 100 else name[:100] + "…"
