"""Texts beyond the model's context, which only a plan with compact positions may have; and merging, over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from .fake_engine import INFO, FakeEngine

pytestmark = pytest.mark.anyio
COMPACT = {"policy": "streaming_llm", "budget": 256, "positions": "compact"}


@pytest.fixture(autouse=True)
def streams(engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(INFO, max_stream_len=4096)


async def complete(http: httpx.AsyncClient, tokens: int, evict: dict[str, Any] | None, **fields: Any) -> httpx.Response:
    compression = {} if evict is None else {"kv": {"evict": evict}}
    body = {"prompt": [17] * tokens, "compression": compression} | fields
    return await http.post("/v1/completions", json=body)


async def test_a_prompt_beyond_the_context(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await complete(http, 3000, COMPACT, max_tokens=5)
    assert answer.status_code == 200, answer.text
    plan = answer.json()["usage"]["compression"]["plan"]["kv"]["evict"]
    assert (plan["positions"], plan["during"], plan["block"]) == ("compact", "both", 256)
    assert engine.submits[0].plan == {"kv": {"evict": {"during": "both"} | COMPACT}}
    for evict in (None, {"policy": "streaming_llm", "budget": 256}):
        refused = await complete(http, 3000, evict, max_tokens=5)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "this model's context holds 2048 tokens" in error["message"]


async def test_a_stream_has_a_limit(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    refused = await complete(http, 4090, COMPACT, max_tokens=7)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "a stream holds 4096 tokens" in refused.json()["error"]["message"]
    assert (await complete(http, 4090, COMPACT, max_tokens=6)).status_code == 200
    chat = {"messages": [{"role": "user", "content": "Hello!"}], "compression": {"kv": {"evict": COMPACT}}}
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
    assert engine.submits[-1].sampling.max_tokens == 2048  # given no end, it does not run for ever


async def test_a_window_beyond_the_context(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    refused = await complete(http, 100, COMPACT | {"budget": 1900})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "compression.kv.evict.budget")
    assert error["code"] == "compression_not_supported"
    assert "come to 2156 tokens" in error["message"]
    engine.info = msgspec.structs.replace(INFO, max_stream_len=4096, has_windows=True)
    error = (await complete(http, 100, COMPACT)).json()["error"]
    assert error["param"] == "compression.kv.evict.positions"
    assert not engine.submits


async def test_merging_is_in_the_plan(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    evict = {"policy": "h2o", "budget": 0.3, "merge": {"policy": "kv_merging", "threshold": 0.5}}
    answer = await complete(http, 50, evict)
    merge = answer.json()["usage"]["compression"]["plan"]["kv"]["evict"]["merge"]
    assert merge == {"policy": "kv_merging", "threshold": 0.5, "fraction": 1.0, "proportional": False}
    assert engine.submits[0].plan == {"kv": {"evict": evict}}
    refused = await complete(http, 50, evict | {"policy": "knorm", "merge": {"policy": "ems"}})
    assert refused.json()["error"]["param"] == "compression.kv.evict.merge"
    assert len(engine.submits) == 1
