"""Keys: asked for on every URL but the probes, before anything else is looked at."""

from __future__ import annotations

import httpx
import pytest

from winnow.server.app import create_app
from winnow.server.auth import OPEN
from winnow.server.protocol.responses import ErrorBody
from winnow.server.settings import load

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_every_route_but_the_probes(connect: Connect, engine: FakeEngine) -> None:
    paths = create_app(load(), (engine, engine.tokenizer)).openapi()["paths"]
    assert "/v1/chat/completions" in paths
    async with connect(api_key=["k1"]) as http:
        for path in [*paths, "/openapi.json", "/docs", "/", "/no/such/url", "/live/", "//live"]:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                answer = await http.request(method, path)
                assert (answer.status_code == 401) == (path not in OPEN), (method, path)
        assert (await http.get("/live")).status_code == 200
    assert not engine.submits


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer k", "Bearer k11", "Bearer K1", "Basic k1", "k1", "Bearer k1 k2", "Bearer k\xff"],
)
async def test_wrong_keys(connect: Connect, header: str) -> None:
    async with connect(api_key=["k1", "k2"]) as http:
        answer = await http.get("/v1/models", headers={"authorization": header.encode("latin-1")})
        assert answer.status_code == 401
        error = ErrorBody.model_validate(answer.json()).error
        assert error.code == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("header", ["Bearer k1", "Bearer k2", "bearer k1", "Bearer  k1 "])
async def test_right_keys(connect: Connect, header: str) -> None:
    async with connect(api_key=["k1", "k2"]) as http:
        assert (await http.get("/v1/models", headers={"authorization": header})).status_code == 200


async def test_a_request_without_key_is_not_read(connect: Connect) -> None:
    async with connect(api_key=["k1"], max_body_bytes=1024) as http:
        answer = await http.post("/v1/chat/completions", content=b"x" * 5000)
        assert answer.status_code == 401


async def test_with_the_key_all_works(connect: Connect) -> None:
    async with connect(api_key=["k1"]) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": HELLO}, headers=bearer("k1"))
        assert answer.status_code == 200


async def test_no_key_configured_means_no_key_asked(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models")).status_code == 200
