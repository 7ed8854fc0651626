"""An application over a scripted engine and the default model's real tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer
from winnow.server.app import create_app
from winnow.server.settings import Settings, load

from .fake_engine import FakeEngine

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings must not change a test."""
    import os

    for name in os.environ:
        if name.startswith("WINNOW_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer("default")


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer)


@pytest.fixture
def settings() -> Settings:
    return load()


@pytest.fixture
def app(settings: Settings, engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    return create_app(settings, (engine, tokenizer))


Connect = Callable[..., Any]


@pytest.fixture
def connect(engine: FakeEngine, tokenizer: Tokenizer) -> Connect:
    """`async with connect(max_n=2) as http`: a client of a server with these settings."""

    @asynccontextmanager
    async def connected(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(load(**options), (engine, tokenizer))
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://w") as http,
        ):
            yield http

    return connected


@pytest.fixture
async def http(connect: Connect) -> AsyncIterator[httpx.AsyncClient]:
    async with connect() as client:
        yield client
