"""A request's JSON body, read strictly: content type, size (see BodyLimit), UTF-8, JSON, then the model's fields."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from winnow.server.errors import ApiError, ClientGone, RequestError, from_pydantic
from winnow.server.settings import Settings

Model = TypeVar("Model", bound=BaseModel)


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that yields the body as `model`. Use with `body_docs(model)` as the route's `openapi_extra`."""

    async def read(request: Request) -> Model:
        require_json(request.headers.get("content-type"))
        settings: Settings = request.app.state.models.settings
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                data = decode(await request.body())
        except TimeoutError as error:
            close = {"Connection": "close"}
            raise ApiError(408, "the body did not arrive in time", code="body_timeout", headers=close) from error
        except ClientDisconnect as error:
            raise ClientGone from error
        try:
            return model.model_validate(data)
        except ValidationError as error:
            raise from_pydantic(error.errors(include_url=False, include_input=False), data) from error

    return read


def body_docs(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of such a body."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def require_json(content_type: str | None) -> None:
    kind, _, options = (content_type or "").partition(";")
    charset = options.lower().replace(" ", "").replace('"', "").partition("charset=")[2].partition(";")[0]
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        message = "the body must be JSON in UTF-8, with the header 'Content-Type: application/json'"
        raise ApiError(415, message, code="unsupported_media_type")


def decode(raw: bytes) -> Any:
    """JSON by the letter: no NaN, no infinities, no lone surrogates, no numbers out of range."""
    try:
        return msgspec.json.decode(raw)
    except UnicodeDecodeError as error:
        raise RequestError(None, "the body is not valid UTF-8", "invalid_json") from error
    except RecursionError as error:
        raise RequestError(None, "the body is nested too deeply", "invalid_json") from error
    except (msgspec.DecodeError, ValueError) as error:
        message = "the body is not valid JSON" + (f": {error}" if raw else ": it is empty")
        raise RequestError(None, message, "invalid_json") from error
