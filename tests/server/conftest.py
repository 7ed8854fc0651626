"""An application over a scripted engine and the default model's real tokenizer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer
from winnow.server.app import create_app
from winnow.server.images.fetch import Fetcher
from winnow.server.settings import Settings, load

from .fake_engine import INFO, FakeEngine
from .pictures import IMAGE, LOOPBACK, VIDEO, Processor

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


@pytest.fixture
def processor() -> Processor:
    return Processor()


@pytest.fixture
def seeing(engine: FakeEngine, tokenizer: Tokenizer, processor: Processor) -> Any:
    """`async with seeing(max_images=2) as http`: a client of a server whose model sees images and videos."""

    @asynccontextmanager
    async def connected(reads: Tokenizer = tokenizer, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        sees = {kind: tokenizer.encode(mark, False)[0] for kind, mark in (("image", IMAGE), ("video", VIDEO))}
        engine.info = msgspec.structs.replace(INFO, sees=sees)
        app = create_app(load(**options), (engine, reads, processor))
        (service,) = app.state.models.services
        fetcher = Fetcher(service.settings, _loopback, lambda address: address == LOOPBACK)
        service.images.fetcher = fetcher
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://w") as http,
        ):
            yield http

    return connected


async def _loopback(host: str, port: int) -> list[Any]:
    return [LOOPBACK if host == "ok.example" else ip_address("10.0.0.1")]
