"""Around every request: its id, its line in the log, its count; a cap on its body; a last net for bugs."""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from winnow.server.errors import ApiError, answer
from winnow.server.metrics import Metrics

logger = logging.getLogger("winnow.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUIET = frozenset({"/live", "/ready", "/health", "/metrics"})
"""Routes that machines ask all the time"""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observe:
    """Outermost. Echoes a caller's X-Request-ID (a well-formed one) or makes one, and answers 500 for bugs.

    The log has the route's pattern, never the URL, and an id of our own: text of callers stays out of it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        metrics: Metrics = scope["app"].state.models.metrics
        own_id, began, status = uuid4().hex, time.monotonic(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        shown_id = given if REQUEST_ID.fullmatch(given) else own_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = shown_id
            await send(message)

        metrics.http_started()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if status:  # too late for another answer: the connection breaks, which the client sees
                answer(error)
                raise ConnectionError("the answer broke off") from None
            await answer(error).response()(scope, receive, send_with_id)
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = getattr(scope.get("route"), "path", "none")
            metrics.http_done(method, route, status)
            level = logging.DEBUG if route in QUIET else logging.INFO
            logger.log(level, "%s %s %d %.3fs %s", method, route, status, time.monotonic() - began, own_id)


class BodyLimit:
    """Counts a body while it is read: what is declared too long is refused at once, the rest when it gets too long."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isascii() and declared.isdecimal() and int(declared[:20]) > self.limit:
            await answer(self._error()).response()(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise self._error()
            return message

        await self.app(scope, counted, send)

    def _error(self) -> ApiError:
        message = f"the body is larger than this server takes ({self.limit} bytes)"
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})
