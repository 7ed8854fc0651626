"""Clients that go away, requests that take too long, and the drain before an exit."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from winnow.engine.errors import ModelError
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.app import create_app
from winnow.server.lifecycle import Server
from winnow.server.models import Models
from winnow.server.settings import load

from .asgi import Call
from .conftest import HELLO
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def ask(app: FastAPI, stream: bool = False) -> Call:
    return Call(app, CHAT, {"messages": HELLO, "stream": stream})


def models(app: FastAPI) -> Models:
    found: Models = app.state.models
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 3])
async def test_a_disconnect_aborts(app: FastAPI, engine: FakeEngine, stream: bool, after: int) -> None:
    engine.pause_after = after
    call = ask(app, stream)
    await engine.paused.wait()
    call.disconnect()
    await call.end()
    assert engine.aborted == [engine.submits[0].request_id]
    assert not models(app).running
    assert call.status in (None, 200, 499)


async def test_a_disconnect_aborts_every_prompt(app: FastAPI, engine: FakeEngine) -> None:
    engine.pause_after = 1
    call = Call(app, COMPLETIONS, {"prompt": ["a", "b", "c"], "max_tokens": 5})
    await engine.paused.wait()
    call.disconnect()
    await call.end()
    assert sorted(engine.aborted) == sorted(submit.request_id for submit in engine.submits)
    assert len(engine.aborted) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_takes_too_long(engine: FakeEngine, tokenizer: Tokenizer, stream: bool) -> None:
    app = create_app(load(request_timeout_s=0.05), (engine, tokenizer))
    engine.pause_after = 0
    call = ask(app, stream)
    await call.end()
    assert call.status == 504
    assert json.loads(call.text)["error"]["code"] == "timeout"
    assert engine.aborted


async def test_one_that_gets_stuck_on_the_way(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(load(request_timeout_s=0.2), (engine, tokenizer))
    engine.pause_after = 2
    call = ask(app, stream=True)
    await call.end()
    assert call.status == 200
    assert '"code":"timeout"' in call.text
    assert "[DONE]" not in call.text


async def test_a_body_that_does_not_come(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(load(body_timeout_s=0.05), (engine, tokenizer))
    call = ask(app)
    call.inbox.get_nowait()
    call.inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    await call.end()
    assert call.status == 408


async def test_a_client_that_leaves_while_it_sends(app: FastAPI) -> None:
    call = ask(app)
    call.inbox.get_nowait()
    call.disconnect()
    await call.end()
    assert call.status == 499


async def test_a_drain_lets_requests_finish(app: FastAPI, engine: FakeEngine) -> None:
    engine.pause_after = 2
    running = [ask(app, stream=True), ask(app)]
    await engine.paused.wait()
    await running[0].until("capital")
    while len(engine.submits) < 2:
        await asyncio.sleep(0)
    draining = asyncio.create_task(models(app).drain(30))
    await asyncio.sleep(0)

    late = ask(app)
    await late.end()
    assert late.status == 503
    assert dict(late.sent[0]["headers"])[b"retry-after"] == b"5"
    assert not models(app).is_ready
    assert models(app).is_alive

    engine.go_on()
    for call in running:
        await call.end()
    await draining
    assert running[0].text.endswith("data: [DONE]\n\n")
    assert running[1].status == 200
    assert not engine.aborted


async def test_a_drain_cuts_what_does_not_finish(app: FastAPI, engine: FakeEngine) -> None:
    engine.pause_after = 2
    stream, whole = ask(app, stream=True), ask(app)
    await engine.paused.wait()
    await stream.until("capital")
    while len(engine.submits) < 2:
        await asyncio.sleep(0)
    await models(app).drain(0.01)
    for call in (stream, whole):
        await call.end()
    assert '"code":"overloaded"' in stream.text
    assert whole.status == 503
    assert len(engine.aborted) == 2


async def test_signals_under_uvicorn(app: FastAPI, engine: FakeEngine) -> None:
    """The first signal keeps listening while requests finish; the second one cuts them."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on", ws="none")
    server = Server(config, models(app))
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    engine.pause_after = 2
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        running = asyncio.create_task(http.post(CHAT, json={"messages": HELLO}))
        await engine.paused.wait()
        server.handle_exit(15, None)
        while not models(app).is_draining:
            await asyncio.sleep(0.01)
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/live")).status_code == 200
        refused = await http.post(CHAT, json={"messages": HELLO})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert not running.done()
        server.handle_exit(15, None)
        assert (await running).status_code == 503
    await asyncio.wait_for(serving, 10)
    assert engine.calls == ["start", "stop"]
    assert server._captured_signals == []  # uvicorn raises those again: the process would not end with status 0


async def test_an_engine_that_never_starts_ends_the_server(app: FastAPI, engine: FakeEngine) -> None:
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on", ws="none")
    server = Server(config, models(app))
    serving = asyncio.create_task(server._serve())
    while engine.failed is None:
        await asyncio.sleep(0.01)
    engine.failed.set_result(ModelError("no such model"))
    await asyncio.wait_for(serving, 10)
    assert isinstance(server.failure, ModelError)


async def test_a_full_queue(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(load(max_queue_requests=2), (engine, tokenizer))
    engine.pause_after = 0
    waiting = [ask(app), ask(app)]
    while len(engine.submits) < 2:
        await asyncio.sleep(0)
    for stream in (False, True):
        refused = ask(app, stream)
        await refused.end()
        assert refused.status == 503
        assert dict(refused.sent[0]["headers"])[b"retry-after"] == b"1"
        assert json.loads(refused.text)["error"]["code"] == "overloaded"
    engine.go_on()
    for call in waiting:
        await call.end()
        assert call.status == 200
    again = ask(app)
    await again.end()
    assert again.status == 200


async def test_running_requests_do_not_fill_the_queue(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(load(max_queue_requests=1), (engine, tokenizer))
    engine.pause_after = 1
    first = ask(app, stream=True)
    await first.until("The")  # it has a token: it waits no more
    second = ask(app, stream=True)
    await second.until("The")
    engine.go_on()
    await first.end()
    await second.end()


async def test_a_queue_full_of_tokens(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(load(max_queue_tokens=1000), (engine, tokenizer))
    engine.pause_after = 0
    # Alone a prompt may be larger than the queue.
    first = Call(app, COMPLETIONS, {"prompt": [5] * 1500})
    while not engine.submits:
        await asyncio.sleep(0)
    refused = Call(app, COMPLETIONS, {"prompt": [5]})
    await refused.end()
    assert refused.status == 503
    engine.go_on()
    await first.end()
    assert first.status == 200


async def test_prompts_count_one_by_one(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = create_app(load(max_queue_requests=4), (engine, tokenizer))
    engine.pause_after = 0
    first = Call(app, COMPLETIONS, {"prompt": ["a"] * 3})
    while len(engine.submits) < 3:
        await asyncio.sleep(0)
    refused = Call(app, COMPLETIONS, {"prompt": ["a"] * 2})
    await refused.end()
    assert refused.status == 503
    engine.go_on()
    await first.end()


async def test_an_engine_that_is_not_up(app: FastAPI, engine: FakeEngine) -> None:
    engine.is_ready = False
    call = ask(app)
    await call.end()
    assert call.status == 503
    assert json.loads(call.text)["error"]["message"] == "the engine is starting"
