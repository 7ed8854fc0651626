"""Who may ask: a Bearer key for every URL but the probes. With no key configured, everybody may."""

from __future__ import annotations

from collections.abc import Sequence
from hmac import compare_digest

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from winnow.server.errors import ApiError, ErrorAnswer, answer

OPEN = frozenset({"/live", "/ready", "/health"})


class Auth:
    """Refuses before routing and before a byte of the body is read. URLs that do not exist are refused too."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]):
        self.app = app
        self.keys = [key.get_secret_value().encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN and not self._is_known(scope):
            await self._refusal(scope).response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1", "replace")
        # Every key is compared, whether or not one matched: time tells nothing.
        matches = [compare_digest(key, known) for known in self.keys]
        return kind.lower() == "bearer" and any(matches)

    def _refusal(self, scope: Scope) -> ErrorAnswer:
        is_missing = "authorization" not in Headers(scope=scope)
        message = "an API key is needed: 'Authorization: Bearer KEY'" if is_missing else "the API key is not valid"
        headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
        return answer(ApiError(401, message, type="authentication_error", code="invalid_api_key", headers=headers))
