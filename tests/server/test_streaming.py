"""Server-sent events: framing, chunks, pings, errors on the way."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from winnow.engine.errors import EngineDied
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.app import create_app
from winnow.server.protocol.responses import ChatChunk, Completion, ErrorBody
from winnow.server.settings import load

from .asgi import Call
from .conftest import HELLO
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
REPLY = "The capital of France is Paris."


def events(text: str) -> list[Any]:
    """Data of the events; checks the framing."""
    assert text.endswith("\n\n")
    frames = text.removesuffix("\n\n").split("\n\n")
    assert all(frame.startswith(("data: ", ": ")) and "\n" not in frame for frame in frames)
    data = [frame.removeprefix("data: ") for frame in frames if not frame.startswith(": ")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def stream(http: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await http.post(URL, json={"messages": HELLO, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "content-length" not in answer.headers
    *chunks, last = events(answer.text)
    assert last == "[DONE]"
    for chunk in chunks:
        ChatChunk.model_validate(chunk)
    return chunks


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)


async def test_the_order_of_chunks(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    chunks = await stream(http)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert text_of(chunks) == REPLY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(engine.reply) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk or "compression" in chunk for chunk in chunks)


async def test_a_usage_chunk_when_asked(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    chunks = await stream(http, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == len(engine.reply)
    assert usage["compression"]["bytes_held"] == 255


async def test_each_choices_last_chunk_reports_its_compression(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, n=2, compression={"kv": {"format": "int4"}})
    reporting = [chunk for chunk in chunks if "compression" in chunk]
    assert [chunk["choices"][0]["index"] for chunk in reporting] == [0, 1]
    for chunk in reporting:
        assert chunk["choices"][0]["finish_reason"] == "length"
        assert chunk["compression"]["sequences"] == 1
        assert chunk["compression"]["plan"]["kv"]["format"] == "int4"


async def test_several_choices(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, n=3)
    assert [text_of(chunks, index) for index in range(3)] == [REPLY] * 3
    openings = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["delta"].get("role")]
    assert sorted(openings) == [0, 1, 2]


async def test_characters_are_never_cut(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    text = "naïve 😀👩‍🚀 日本語"
    engine.reply = tokenizer.encode(text, False)
    chunks = await stream(http)
    assert text_of(chunks) == text
    assert not any("\ufffd" in text_of([chunk]) for chunk in chunks)


async def test_a_character_that_stays_cut(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.reply = tokenizer.encode("a😀", False)[:-1]
    assert text_of(await stream(http)) == "a\ufffd"


async def test_logprobs_cover_the_text(http: httpx.AsyncClient) -> None:
    chunks = await stream(http, logprobs=True, top_logprobs=1)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert "".join(entry["token"] for item in logprobs for entry in item["content"]) == REPLY


async def test_a_streamed_completion(http: httpx.AsyncClient) -> None:
    fields = {"prompt": ["A: ", "B: "], "stream": True, "echo": True, "stream_options": {"include_usage": True}}
    *chunks, last = events((await http.post("/v1/completions", json=fields)).text)
    assert last == "[DONE]"
    for chunk in chunks:
        Completion.model_validate(chunk)
    for index, prompt in enumerate(("A: ", "B: ")):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices) == prompt + REPLY
    assert chunks[-1]["usage"]["completion_tokens"] == 14


async def test_streamed_completion_offsets(http: httpx.AsyncClient) -> None:
    fields = {"prompt": "x", "stream": True, "logprobs": 1, "max_tokens": 3}
    chunks = events((await http.post("/v1/completions", json=fields)).text)[:-1]
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 3, 11]


async def test_an_error_on_the_way(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.error, engine.error_after = EngineDied("gone"), 3
    answer = await http.post(URL, json={"messages": HELLO, "stream": True})
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert text_of(chunks) == "The capital of"
    assert ErrorBody.model_validate(last).error.code == "engine_died"


async def test_a_bug_on_the_way(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.error, engine.error_after = ZeroDivisionError("secret"), 3
    last = events((await http.post(URL, json={"messages": HELLO, "stream": True})).text)[-1]
    assert last["error"]["message"] == "internal error"


@pytest.fixture
def impatient(engine: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    return create_app(load(ping_s=0.01), (engine, tokenizer))


async def test_pings_fill_a_long_prefill(impatient: FastAPI, engine: FakeEngine) -> None:
    engine.pause_after = 0
    call = Call(impatient, URL, {"messages": HELLO, "stream": True})
    await call.until(": ping\n\n: ping\n\n")
    assert call.status == 200
    engine.go_on()
    await call.end()
    assert text_of(events(call.text)[:-1]) == REPLY


async def test_an_error_after_a_ping_is_an_event(impatient: FastAPI, engine: FakeEngine) -> None:
    engine.pause_after, engine.error = 0, EngineDied("gone")
    call = Call(impatient, URL, {"messages": HELLO, "stream": True})
    await call.until(": ping")
    engine.go_on()
    await call.end()
    (only,) = events(call.text)
    assert only["error"]["code"] == "engine_died"
