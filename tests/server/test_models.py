"""Two models in one server, each with an engine of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from winnow.engine.errors import ModelError
from winnow.engine.messages import EngineStats
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.app import create_app
from winnow.server.lifecycle import Server
from winnow.server.models import Models
from winnow.server.settings import SettingsError, load

from .asgi import Call
from .conftest import HELLO
from .fake_engine import INFO, FakeEngine
from .pictures import IMAGE, Processor, image_part, text_part

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


@pytest.fixture
def second(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, "The second model speaks.")


@pytest.fixture
def both(engine: FakeEngine, second: FakeEngine, tokenizer: Tokenizer) -> FastAPI:
    settings = load(vision_model="default", vision_model_name=["second", "2nd"], max_queue_requests=1)
    return create_app(settings, (engine, tokenizer), (second, tokenizer))


@asynccontextmanager
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://w") as http:
        yield http


@pytest.fixture
async def http(both: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client(both) as connected:
        yield connected


@pytest.mark.parametrize(
    ("asked", "name", "is_second"),
    [
        ({}, "SmolLM2-135M-Instruct", False),
        ({"model": "default"}, "default", False),
        ({"model": "second"}, "second", True),
        ({"model": "2nd"}, "2nd", True),
    ],
)
async def test_the_request_chooses(
    http: httpx.AsyncClient, engine: FakeEngine, second: FakeEngine, asked: dict[str, str], name: str, is_second: bool
) -> None:
    answer = (await http.post(CHAT, json={"messages": HELLO} | asked)).json()
    assert answer["model"] == name
    assert ("second" in answer["choices"][0]["message"]["content"]) is is_second
    completion = (await http.post("/v1/completions", json={"prompt": "x"} | asked)).json()
    assert completion["model"] == name
    assert [len(engine.submits), len(second.submits)] == ([0, 2] if is_second else [2, 0])


async def test_no_such_model(http: httpx.AsyncClient) -> None:
    for url, body in (
        (CHAT, {"messages": HELLO}),
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        answer = await http.post(url, json=body | {"model": "third"})
        assert answer.status_code == 404
        message = answer.json()["error"]["message"]
        assert message.endswith("it has SmolLM2-135M-Instruct, default, second, 2nd")


async def test_images_go_to_the_one_that_sees(engine: FakeEngine, second: FakeEngine, tokenizer: Tokenizer) -> None:
    second.info = msgspec.structs.replace(INFO, sees={"image": tokenizer.encode(IMAGE, False)[0]})
    settings = load(vision_model="default", vision_model_name=["second"])
    app = create_app(settings, (engine, tokenizer), (second, tokenizer, Processor({"image": IMAGE})))
    pictured = {"messages": [{"role": "user", "content": [image_part(), text_part("What is it?")]}]}
    async with client(app) as http:
        for url in (CHAT, "/tokenize"):
            answers = [await http.post(url, json=pictured | asked) for asked in ({}, {"model": "second"})]
            assert [answer.status_code for answer in answers] == [200, 200]
            refused = await http.post(url, json=pictured | {"model": "default"})
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert error["param"] == "messages[0].content[0].image_url"
            assert error["message"].endswith("this model reads no images")
        assert (await http.post(CHAT, json=pictured)).json()["model"] == "second"
        assert (await http.post(CHAT, json={"messages": HELLO})).json()["model"] == "SmolLM2-135M-Instruct"
        cards = (await http.get("/v1/models")).json()["data"]
        assert [card["sees"] for card in cards] == [[], [], ["image"]]
    assert [len(submit.pictures) for submit in second.submits] == [1, 1, 1]
    assert len(engine.submits) == 1


async def test_all_are_listed(http: httpx.AsyncClient, second: FakeEngine) -> None:
    second.info = None
    cards = (await http.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == ["SmolLM2-135M-Instruct", "default", "second", "2nd"]
    assert [card["root"] for card in cards] == ["SmolLM2-135M-Instruct"] * 2 + ["second"] * 2
    assert [card["max_model_len"] for card in cards] == [2048, 2048, None, None]
    assert (await http.get("/v1/models/2nd")).json()["id"] == "2nd"


async def test_metrics_name_the_model(http: httpx.AsyncClient, engine: FakeEngine, second: FakeEngine) -> None:
    engine.stats, second.stats = EngineStats(running=3), EngineStats(running=5)
    await http.post(CHAT, json={"messages": HELLO, "model": "2nd"})
    second.restarts, second.info = 2, None
    text = (await http.get("/metrics")).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    values: dict[str, dict[Any, float]] = {}
    for family in families:
        for sample in family.samples:
            values.setdefault(sample.name, {})[sample.labels.get("model_name")] = sample.value
    first = "SmolLM2-135M-Instruct"
    assert values["winnow:num_requests_running"] == {first: 3, "second": 5}
    assert values["winnow:engine_restarts_total"] == {first: 0, "second": 2}
    assert values["winnow:time_to_first_token_seconds_count"] == {first: 0, "second": 1}
    assert values["winnow:request_success_total"] == {"second": 1}
    assert set(values["winnow:engine_info"]) == {first}


async def test_one_full_queue_is_not_the_others(both: FastAPI, engine: FakeEngine) -> None:
    engine.pause_after = 0
    waiting = Call(both, CHAT, {"messages": HELLO})
    await engine.paused.wait()
    refused = Call(both, CHAT, {"messages": HELLO})
    await refused.end()
    assert refused.status == 503
    other = Call(both, CHAT, {"messages": HELLO, "model": "second"})
    await other.end()
    assert other.status == 200
    engine.go_on()
    await waiting.end()


async def test_probes_are_of_all(http: httpx.AsyncClient, second: FakeEngine) -> None:
    async def answers() -> list[int]:
        return [(await http.get(url)).status_code for url in ("/live", "/ready", "/health")]

    assert await answers() == [200, 200, 200]
    second.is_ready = False
    assert await answers() == [200, 503, 503]
    assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200  # the first one works on
    assert (await http.post(CHAT, json={"messages": HELLO, "model": "second"})).status_code == 503
    second.is_ready, second.heartbeat_age_s = True, 999.0
    assert await answers() == [503, 503, 503]


async def test_the_drain_is_of_all(both: FastAPI, engine: FakeEngine, second: FakeEngine) -> None:
    models: Models = both.state.models
    engine.pause_after = second.pause_after = 1
    running = [Call(both, CHAT, {"messages": HELLO, "model": name}) for name in ("default", "second")]
    await asyncio.gather(engine.paused.wait(), second.paused.wait())
    assert models.running == 2
    draining = asyncio.create_task(models.drain(30))
    await asyncio.sleep(0)
    engine.go_on()
    await running[0].end()
    assert not draining.done()
    second.go_on()
    await running[1].end()
    await asyncio.wait_for(draining, 10)
    assert [call.status for call in running] == [200, 200]


async def test_one_that_cannot_start_ends_the_server(both: FastAPI, engine: FakeEngine, second: FakeEngine) -> None:
    server = Server(uvicorn.Config(both, port=0, log_config=None, lifespan="on"), both.state.models)
    serving = asyncio.create_task(server.serve())
    while second.failed is None:
        await asyncio.sleep(0.01)
    second.failed.set_result(ModelError("no such model"))
    await asyncio.wait_for(serving, 10)
    assert isinstance(server.failure, ModelError)
    assert engine.calls == second.calls == ["start", "stop"]


async def test_a_gpu_is_shared_one_by_one(engine: FakeEngine, second: FakeEngine, tokenizer: Tokenizer) -> None:
    """The first model takes what the other leaves, so it comes last."""
    second.is_ready = False
    settings = load(device="cuda", vision_model="default", vision_model_name=["second"])
    async with client(create_app(settings, (engine, tokenizer), (second, tokenizer))):
        while second.failed is None:
            await asyncio.sleep(0)
        assert (second.calls, engine.calls) == (["start"], [])
        second.is_ready = True
        while engine.failed is None:
            await asyncio.sleep(0.01)
        assert engine.calls == ["start"]


def test_settings_of_the_second() -> None:
    settings = load(
        model="org/model", vision_model="org/eyes", vision_memory_gib=0.5, kv_memory_gib=3, max_model_len=512,
        speculative="draft", draft_model="org/draft",
    )  # fmt: skip
    first, second = settings.of_models
    assert first is settings
    assert (second.model_names, second.kv_memory_gib, second.weights) == (("org/eyes",), 0.5, "int8")
    assert second.of_engine.draft_model is second.of_engine.max_model_len is None
    assert len(load().of_models) == len(load(vision_model="").of_models) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vision_weights": "f32"}, "no effect without vision_model"),
        ({"vision_model": "m", "vision_weights": "bf16"}, "vision_weights: bf16 is not for device cpu"),
        ({"vision_model": "m", "engine": "vllm"}, "vision_model has no effect with engine: vllm"),
    ],
)
def test_wrong_settings(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load(**options)


def test_two_models_of_one_name(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingsError, match="two models are called SmolLM2-135M-Instruct; vision_model_name"):
        create_app(load(vision_model="default"), (engine, tokenizer), (engine, tokenizer))
