"""Images that are refused, and the limits on those that are not: over HTTP, nothing wrong reaches the engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from PIL import Image

from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.app import create_app
from winnow.server.settings import load

from .conftest import HELLO
from .fake_engine import INFO, FakeEngine
from .pictures import IMAGE, Processor, ask, data_uri, image_part, png, submitted, text_part, video_part
from .test_bad_input import error_of
from .test_image_decode import encoded
from .test_image_fetch import answering, serving
from .test_routes import metrics

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PRUNE = {"vision": {"policy": "uniform", "keep": 0.5}}


@pytest.fixture
async def http(seeing: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with seeing() as client:
        yield client


BAD: list[tuple[dict[str, Any], str, str]] = [
    (image_part("data:image/png;base64,!!!!"), "image_url", "invalid_base64_image"),
    (image_part("data:image/png;base64,"), "image_url", "empty_image_file"),
    (image_part(data_uri(b"hello")), "image_url", "unsupported_image_media_type"),
    (image_part(data_uri(b"<svg/>", "image/svg+xml")), "image_url", "unsupported_image_media_type"),
    (image_part(data_uri(png()[:60])), "image_url", "image_parse_error"),
    (image_part(data_uri(png(1, 1))), "image_url", "image_too_small"),
    (image_part(data_uri(png(20_000, 1))), "image_url", "image_too_small"),
    (image_part(data_uri(png(20_000, 16))), "image_url", "image_too_large"),
    (image_part(data_uri(png(5000, 5000))), "image_url", "image_too_large"),
    (image_part("http://ok.example/a.png"), "image_url", "invalid_image_url"),
    (image_part("file:///etc/passwd"), "image_url", "invalid_image_url"),
    (image_part(""), "image_url", "invalid_image_url"),
    ({"type": "input_image", "image_url": "x"}, "image_url", "invalid_image_url"),
    ({"type": "video_url", "video_url": {"url": data_uri(png())}}, "video_url", "unsupported_image_media_type"),
    (video_part(png(), png(16, 16)), "video_url", "image_parse_error"),
    (video_part(*[png(8, 8)] * 65), "video_url", "image_too_large"),
]


@pytest.mark.parametrize(("part", "field", "code"), BAD, ids=lambda value: json.dumps(value)[:60])
async def test_bad_images(
    http: httpx.AsyncClient, engine: FakeEngine, part: dict[str, Any], field: str, code: str
) -> None:
    good = {"messages": [*HELLO, *ask(text_part("x"), image_part(), part)["messages"]]}
    for body in (good, good | {"stream": True}):
        error = error_of(await http.post(CHAT, json=body))
        assert (error["param"], error["code"]) == (f"messages[1].content[2].{field}", code)
        assert error["message"].startswith(error["param"])
        assert len(error["message"]) < 200
    assert error_of(await http.post("/tokenize", json=good))["code"] == code
    assert not engine.submits


SHAPES: list[dict[str, Any]] = [
    {"type": "image_url"},
    {"type": "image_url", "image_url": "http://x"},
    {"type": "image_url", "image_url": {}},
    {"type": "image_url", "image_url": {"url": 5}},
    {"type": "image_url", "image_url": {"url": "x", "detail": "huge"}},
    {"type": "image_url", "image_url": {"url": "x", "detail": []}},
    {"type": "image_url", "image_url": {"url": "x", "more": 1}},
    {"type": "image_url", "image_url": {"url": "x"}, "more": 1},
    {"type": "image_url", "video_url": {"url": "x"}},
    {"type": "input_image"},
    {"type": "input_image", "file_id": "f"},
    {"type": "input_image", "image_url": {"url": "x"}},
    {"type": "video_url", "video_url": {"url": "x", "detail": "low"}},
    {"type": "image", "image": "x"},
    {"type": "input_audio", "input_audio": {}},
    {"type": ["image_url"]},
]


@pytest.mark.parametrize("part", SHAPES, ids=json.dumps)
async def test_parts_of_another_shape(http: httpx.AsyncClient, part: dict[str, Any]) -> None:
    error = error_of(await http.post(CHAT, json=ask(text_part("x"), part)))
    assert error["param"] == "messages[0].content"
    assert "part 1" in error["message"]


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
async def test_only_users_show_images(http: httpx.AsyncClient, role: str) -> None:
    messages = [{"role": role, "content": [image_part()]}, *HELLO]
    assert error_of(await http.post(CHAT, json={"messages": messages}))["param"] == "messages[0]"


async def test_models_that_do_not_see(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, processor: Processor
) -> None:
    """One with no processor, and one that sees images only."""
    assert engine.info is not None
    engine.info = msgspec.structs.replace(engine.info, sees={"image": engine.info.sees["image"]})
    assert len((await submitted(http, engine, ask(image_part()))).pictures) == 1
    error = error_of(await http.post(CHAT, json=ask(image_part(), video_part(png()))))
    assert (error["param"], len(processor.seen)) == ("messages[0].content[1].video_url", 1)
    assert "reads no videos" in error["message"]
    assert (await http.get("/v1/models/default")).json()["sees"] == ["image"]

    engine.info = INFO
    app = create_app(load(), (engine, tokenizer))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://w") as blind:
        error = error_of(await blind.post(CHAT, json=ask(text_part("x"), image_part())))
        assert error["param"] == "messages[0].content[1].image_url"
        assert "reads no images" in error["message"]
        assert (await blind.get("/v1/models/default")).json()["sees"] == []
        body = {"messages": HELLO, "compression": PRUNE}
        assert error_of(await blind.post(CHAT, json=body))["param"] == "compression.vision"
        assert (await blind.post(CHAT, json=ask(text_part(IMAGE)))).status_code == 200  # a word like any other


async def test_plans_that_go_by_marked_text(seeing: Any, engine: FakeEngine, processor: Processor) -> None:
    marked = {"type": "text", "text": "a long document", "context": True}
    scope = {"kv": {"evict": {"policy": "knorm", "budget": 0.5}, "scope": "document"}}
    for plan, param in (
        ({"prompt": {"policy": "selective", "keep": 0.5}}, "compression.prompt"),
        (scope, "compression.kv.scope"),
    ):
        async with seeing() as http:
            error = error_of(await http.post(CHAT, json=ask(marked, image_part(), compression=plan)))
            assert (error["param"], processor.seen) == (param, [])
        async with seeing(compression=plan) as http:  # the server's own plan does what it can
            assert (await submitted(http, engine, ask(marked, image_part()))).pictures
        processor.seen.clear()


async def test_plans_that_images_do_not_go_with(seeing: Any, engine: FakeEngine, processor: Processor) -> None:
    """Asked for or the server's own, they are refused before an image is read, and it is said what to do."""
    kvzip = {"kv": {"evict": {"policy": "kvzip", "budget": 0.5}}}
    spec_kv = {"kv": {"evict": {"policy": "spec_kv", "budget": 0.5}}}
    evs = {"vision": {"policy": "evs", "keep": 0.5}}
    for plan, param, why in (
        (kvzip, "compression.kv.evict.policy", "'kvzip' has a model repeat the prompt, and there are images in it"),
        (spec_kv, "compression.kv.evict.policy", "'spec_kv' has a model read ahead of the prompt"),
        (evs, "compression.vision.policy", "'evs' prunes videos, and there are images"),
    ):
        for own, asked in (({}, {"compression": plan}), ({"compression": plan}, {})):
            async with seeing(**own) as http:
                assert engine.info is not None
                engine.info = msgspec.structs.replace(engine.info, draft_max_len=1024)
                error = error_of(await http.post(CHAT, json=ask(image_part(), **asked)))
                assert (error["param"], processor.seen) == (param, [])
                assert why in error["message"]
                assert error["message"].endswith('; ask for another plan; "compression": {} is none')
                assert (await http.post(CHAT, json={"messages": HELLO} | asked)).status_code == 200
                none = await submitted(http, engine, ask(image_part(), compression={}))
                assert none.pictures and none.plan == {}
            processor.seen.clear()


async def test_limits(seeing: Any, engine: FakeEngine, processor: Processor) -> None:
    async with seeing(max_images=2) as http:
        error = error_of(await http.post(CHAT, json=ask(*[image_part()] * 3)))
        assert (error["param"], error["code"]) == ("messages", "limit_exceeded")
        two = {"messages": [*ask(image_part())["messages"], *HELLO, *ask(image_part())["messages"]]}
        assert (await http.post(CHAT, json=two)).status_code == 200
    async with seeing(max_image_bytes=1024) as http:
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
        error = error_of(await http.post(CHAT, json=ask(image_part(data_uri(encoded(Image.fromarray(noise)))))))
        assert error["code"] == "image_too_large"
    async with seeing(max_image_pixels=24 * 16 - 1) as http:
        assert error_of(await http.post(CHAT, json=ask(image_part())))["code"] == "image_too_large"
    async with seeing(max_model_len=None) as http:
        error = error_of(await http.post(CHAT, json=ask(image_part(data_uri(png(400, 400))))))
        assert error["code"] == "context_length_exceeded"
    assert len(engine.submits) == 1


async def test_more_than_a_message_to_the_engine_holds(
    http: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.server.pictures.MAX_INPUT_BYTES", 10_000)
    assert (await http.post(CHAT, json=ask(image_part()))).status_code == 200
    error = error_of(await http.post(CHAT, json=ask(*[image_part()] * 3)))
    assert (error["param"], error["code"]) == ("messages[0].content[2].image_url", "image_too_large")


async def test_bytes_that_wait(seeing: Any, engine: FakeEngine) -> None:
    """A server that holds many images of waiting requests takes no more of them, but text."""
    async with seeing(max_queue_image_bytes=9_000) as http:
        engine.pause_after = 0
        waiting = asyncio.create_task(http.post(CHAT, json=ask(image_part())))
        await engine.paused.wait()
        full = await http.post(CHAT, json=ask(image_part()))
        assert error_of(full, 503)["code"] == "overloaded"
        text = asyncio.create_task(http.post(CHAT, json={"messages": HELLO}))
        engine.go_on()
        assert (await waiting).status_code == (await text).status_code == 200
        assert (await http.post(CHAT, json=ask(image_part()))).status_code == 200


async def test_images_that_are_fetched(seeing: Any, engine: FakeEngine) -> None:
    async with serving(answering("200 OK", body=png())) as port, serving(answering("404 Gone")) as gone:
        domains = (f"ok.example:{port}", f"ok.example:{gone}", f"inside.example:{port}")
        async with seeing(allowed_image_domains=domains) as http:
            submit = await submitted(http, engine, ask(image_part(f"http://ok.example:{port}/a")))
            local = await submitted(http, engine, ask(image_part()))
            assert submit.pictures == local.pictures
            for url, code in (
                (f"http://ok.example:{gone}/", "failed_to_download_image"),
                (f"http://inside.example:{port}/", "invalid_image_url"),
                ("http://else.example/", "invalid_image_url"),
            ):
                error = error_of(await http.post(CHAT, json=ask(image_part(url))))
                assert (error["param"], error["code"]) == ("messages[0].content[0].image_url", code)
                assert url not in error["message"]
            samples = await metrics(http)
            assert samples["winnow:image_fetched_bytes_total", frozenset()] == len(png())
            assert samples["winnow:images_read_total", frozenset([("kind", "image")])] == 2


async def test_a_slow_image_keeps_nobody_waiting(
    http: httpx.AsyncClient, engine: FakeEngine, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, started = threading.Event(), threading.Event()
    plain = processor.image

    def slow(image: Any, is_alone: bool) -> Any:
        started.set()
        assert go.wait(10)
        return plain(image, is_alone)

    monkeypatch.setattr(processor, "image", slow)
    waiting = [asyncio.create_task(http.post(CHAT, json=ask(image_part()))) for _ in range(5)]
    while not started.is_set():
        await asyncio.sleep(0.001)
    assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200
    assert (await http.post(COMPLETIONS, json={"prompt": "x"})).status_code == 200
    assert not any(task.done() for task in waiting)
    waiting.pop().cancel()
    go.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 4


async def test_a_bad_image_beside_good_ones(http: httpx.AsyncClient) -> None:
    bodies = [ask(image_part()), ask(image_part(data_uri(png()[:50]))), ask(text_part("x")), ask(image_part())]
    answers = await asyncio.gather(*(http.post(CHAT, json=body) for body in bodies))
    assert [answer.status_code for answer in answers] == [200, 400, 200, 200]


async def test_logs_hold_no_urls(seeing: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    served = serving(answering("200 OK", body=png()))
    async with served as port, seeing(allowed_image_domains=(f"ok.example:{port}",)) as http:
        answer = await http.post(CHAT, json=ask(image_part(f"http://ok.example:{port}/sesame")))
        assert answer.status_code == 200
    ours = [record for record in caplog.records if "http://w/" not in record.getMessage()]
    assert "sesame" not in "".join(record.getMessage() for record in ours)
