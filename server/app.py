"""The ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from winnow.engine.errors import WinnowError
from winnow.server import __version__
from winnow.server.auth import Auth
from winnow.server.client import Client
from winnow.server.errors import ClientGone, handle
from winnow.server.images.reader import Processor
from winnow.server.metrics import Metrics
from winnow.server.middleware import BodyLimit, Observe
from winnow.server.models import Models
from winnow.server.protocol.chat import ChatRequest
from winnow.server.protocol.completions import CompletionRequest
from winnow.server.protocol.responses import ErrorBody
from winnow.server.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from winnow.server.routes import chat, completions, probes, tokenize
from winnow.server.routes import models as listing
from winnow.server.service import Service
from winnow.server.settings import Settings

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer

BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)


def create_app(settings: Settings, *served: tuple[Client, Tokenizer] | tuple[Client, Tokenizer, Processor]) -> FastAPI:
    """The application; it starts its engines when it is started itself, and `app.state.models` is what it works with.

    Args
        served: for tests, what stands for engine, tokenizer and image processor of each of `settings.of_models`
    Raises
        SettingsError: a profile is wrong
        ModelError: a tokenizer or an image processor cannot be loaded
    """
    metrics = Metrics()
    services = [Service(of, metrics, *(parts or _load(of))) for of, parts in zip_longest(settings.of_models, served)]
    models = Models(settings, services, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await models.start()
        try:
            yield
        finally:
            await models.stop()

    # The documentation pages would load scripts from elsewhere; /openapi.json is there.
    app = FastAPI(title="Winnow", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    app.state.models = models
    for routes in (chat, completions, listing, tokenize, probes):
        app.include_router(routes.router, responses={"default": {"model": ErrorBody}})
    for error in (WinnowError, ClientGone, HTTPException, RequestValidationError):
        app.add_exception_handler(error, handle)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Auth, keys=settings.api_key)
    app.add_middleware(Observe)
    _describe(app, bool(settings.api_key))
    return app


def _load(settings: Settings) -> tuple[Client, Tokenizer, Processor | None]:
    from winnow.engine.client import EngineClient
    from winnow.engine.models.tokenizer import load_tokenizer
    from winnow.engine.models.vision.processor import load_processor

    tokenizer = load_tokenizer(settings.model)
    return EngineClient(settings.of_engine), tokenizer, load_processor(settings.model, tokenizer)


def _describe(app: FastAPI, needs_key: bool) -> None:
    """OpenAPI with the bodies that routes read themselves (see body.py)."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            template = "#/components/schemas/{model}"
            _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template=template)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(bodies["$defs"])
            if needs_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
