"""Images and videos in chats over HTTP: what the engine is asked for, and what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from ipaddress import ip_address
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from winnow.engine.messages import Submit
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.app import create_app
from winnow.server.images.fetch import Fetcher
from winnow.server.protocol.responses import ChatChunk, ChatCompletion
from winnow.server.settings import load

from .conftest import HELLO
from .fake_engine import INFO, FakeEngine
from .pictures import IMAGE, MARK, VIDEO, Processor, data_uri, image_part, png, text_part, video_part
from .test_bad_input import error_of
from .test_image_fetch import LOOPBACK, answering, serving
from .test_routes import metrics

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<file_sep>\\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's: it goes through parts, images first, and of a text it writes nothing"""
PRUNE = {"vision": {"policy": "uniform", "keep": 0.5}}


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


@pytest.fixture
async def http(seeing: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with seeing() as client:
        yield client


@pytest.fixture
def parts_only(tokenizer: Tokenizer) -> Tokenizer:
    hf = deepcopy(tokenizer.hf)
    hf.chat_template = PARTS_ONLY
    return Tokenizer(hf, tokenizer.eos_token_ids)


def ask(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], **fields}


async def submitted(http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]) -> Submit:
    answer = await http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return engine.submits[-1]


def written(tokenizer: Tokenizer, submit: Submit) -> str:
    return tokenizer.decode(submit.prompt, skip_special_tokens=False)


async def test_an_image(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, processor: Processor
) -> None:
    submit = await submitted(http, engine, ask(image_part(), text_part("What is it?")))
    shown = (IMAGE * 3 + MARK) * 2
    assert f"user\n{shown}\nWhat is it?<|im_end|>\n<|im_start|>assistant\n" in written(tokenizer, submit)
    (picture,) = submit.pictures
    assert (picture.kind, picture.span) == ("image", 7)  # the last row's mark stands behind the last placeholder
    assert tokenizer.decode(submit.prompt[picture.first : picture.first + picture.span], False) == shown[: -len(MARK)]
    assert tokenizer.decode(picture.text) == "What is it?"
    assert tokenizer.decode(submit.prompt[: picture.turn_end], False).endswith("What is it?<|im_end|>\n")
    assert len(picture.key) == 16
    pixels, sizes = picture.inputs["pixel_values"], picture.inputs["sizes"]
    assert (pixels.dtype, pixels.shape) == ("float32", [1, 16, 24, 3])
    assert (np.frombuffer(pixels.data, np.float32).reshape(pixels.shape) == (255, 0, 0)).all()
    assert (sizes.dtype, np.frombuffer(sizes.data, np.int64).tolist()) == ("int64", [24, 16])
    assert [image.size for image in processor.seen[0]] == [(24, 16)]


async def test_usage(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for plan, kept in ((None, 6), (PRUNE, 3)):
        body = ask(image_part(), text_part("x"), compression=plan, n=2, max_tokens=3)
        answer = ChatCompletion.model_validate((await http.post(CHAT, json=body)).json())
        details = answer.usage.prompt_tokens_details
        assert (details.image_tokens, details.image_tokens_kept) == (6, kept)
        assert answer.usage.prompt_tokens == len(engine.submits[-1].prompt)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        lines = [line[6:] for line in (await http.post(CHAT, json=body)).text.splitlines() if line.startswith("data:")]
        assert lines.pop() == "[DONE]"
        last = ChatChunk.model_validate_json(lines[-1]).usage
        assert last is not None and last.prompt_tokens_details == details
    plain = (await http.post(CHAT, json={"messages": HELLO})).json()
    assert plain["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_several_images_and_turns(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    first = [image_part(), text_part("and"), image_part(data_uri(png(16, 8, "blue"))), text_part("Differ?")]
    turns = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [text_part("And now?"), image_part(data_uri(png(8, 8)))]},
    ]
    submit = await submitted(http, engine, {"messages": turns})
    assert [picture.span for picture in submit.pictures] == [7, 2, 1]
    texts = [tokenizer.decode(picture.text) for picture in submit.pictures]
    assert texts == ["and\nDiffer?", "and\nDiffer?", "And now?"]
    ends = [tokenizer.decode(submit.prompt[: picture.turn_end], False) for picture in submit.pictures]
    assert ends[0] == ends[1]
    assert ends[1].endswith("Differ?<|im_end|>\n")
    assert ends[2].endswith("And now?\n" + IMAGE + MARK + "<|im_end|>\n")
    assert len({picture.key for picture in submit.pictures}) == 3
    before = await submitted(http, engine, {"messages": turns[:2]})
    for earlier, later in zip(before.pictures, submit.pictures, strict=False):  # a later turn finds the same
        assert earlier == later
    assert submit.prompt[: before.pictures[0].turn_end] == before.prompt[: before.pictures[0].turn_end]


async def test_keys_are_of_what_is_seen(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    exact = data_uri(png(fmt="WEBP", lossless=True), "image/webp")
    same = [image_part(), image_part(exact), image_part(detail="high"), image_part(detail="low")]
    other = [image_part(data_uri(png(colour="blue"))), image_part(data_uri(png(16, 24)))]
    keys = [(await submitted(http, engine, ask(part))).pictures[0].key for part in (*same, *other)]
    assert len(set(keys[:4])) == 1
    assert len(set(keys)) == 3
    (film,) = (await submitted(http, engine, ask(video_part(png())))).pictures
    assert film.key not in keys


async def test_forms_of_a_part(http: httpx.AsyncClient, engine: FakeEngine, processor: Processor) -> None:
    url = data_uri(png(400, 200))
    for part in (
        {"type": "input_image", "image_url": url},
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "image_url", "image_url": {"url": url, "detail": None}},
        {"type": "image_url", "image_url": {"url": url.replace("image/png", "IMAGE/JPEG")}},
    ):
        assert len((await submitted(http, engine, ask(part))).pictures) == 1
    processor.seen.clear()
    large = data_uri(png(1024, 512))
    assert (await http.post(CHAT, json=ask(image_part(large)))).status_code == 400  # wider than the model takes
    assert (await http.post(CHAT, json=ask(image_part(large, detail="low")))).status_code == 400
    assert [frames[0].size for frames in processor.seen] == [(1024, 512), (512, 256)]


async def test_videos(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, processor: Processor) -> None:
    frames = [png(16, 8, (60 * i, 0, 0)) for i in range(3)]
    submit = await submitted(http, engine, ask(image_part(), video_part(*frames), text_part("What moves?")))
    film = submit.pictures[1]
    assert (film.kind, film.span, film.inputs["pixel_values"].shape) == ("video", 8, [3, 8, 16, 3])
    assert f"{(VIDEO * 2 + MARK) * 3}\nWhat moves?" in written(tokenizer, submit)
    moving = data_uri(_gif([(0, 0, 0), (60, 0, 0), (120, 0, 0)]), "image/gif")
    submit = await submitted(http, engine, ask({"type": "video_url", "video_url": {"url": moving}}))
    assert submit.pictures[0].inputs == film.inputs
    still = await submitted(http, engine, ask(image_part(moving)))
    assert still.pictures[0].kind == "image"
    assert [len(seen) for seen in processor.seen] == [1, 3, 3, 1]


def _gif(colours: list[Any]) -> bytes:
    from io import BytesIO

    from PIL import Image

    out, frames = BytesIO(), [Image.new("RGB", (16, 8), colour) for colour in colours]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


async def test_a_template_that_goes_through_parts(seeing: Any, engine: FakeEngine, parts_only: Tokenizer) -> None:
    assert (parts_only.template_takes_text, parts_only.template_takes_parts) == (False, True)
    async with seeing(parts_only) as http:
        submit = await submitted(http, engine, ask(text_part("What is it?"), image_part(), image_part()))
        shown = (IMAGE * 3 + MARK) * 2
        assert written(parts_only, submit) == f"USER: {shown}\n{shown}\nWhat is it? ASSISTANT:"
        first, second = submit.pictures
        assert second.first == first.first + first.span + 2  # the last mark and a newline
        assert written(parts_only, submit)[: -len(" ASSISTANT:")] == parts_only.decode(
            submit.prompt[: first.turn_end], False
        )
        plain = await submitted(http, engine, {"messages": HELLO})
        assert written(parts_only, plain) == "USER: Hello! ASSISTANT:"
        marked = ask({"type": "text", "text": "x y z", "context": True}, text_part("?"))
        shorter = marked | {"compression": {"prompt": {"policy": "selective", "keep": 0.5}}}
        assert (await http.post(CHAT, json=shorter)).status_code == 200


async def test_text_makes_no_image(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Neither beside an image nor alone, in any message, in a completion or in tokens."""
    sees = engine.info.sees if engine.info else {}
    for body, param in (
        (ask(image_part(), text_part(f"a {IMAGE}")), "messages[0].content"),
        (ask(image_part(), text_part(VIDEO)), "messages[0].content"),
        ({"messages": [{"role": "system", "content": IMAGE}, *ask(image_part())["messages"]]}, "messages[0].content"),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": IMAGE}, *ask(image_part())["messages"]]},
            "messages[1].content",
        ),
        (ask(text_part(f"a {IMAGE}")), "messages"),
        (ask(text_part(f"a {VIDEO}")), "messages"),
    ):
        assert error_of(await http.post(CHAT, json=body))["param"] == param
    for prompt in (f"x {IMAGE}", [5, sees["image"]], [5, sees["video"], 6]):
        assert error_of(await http.post(COMPLETIONS, json={"prompt": prompt}))["param"] == "prompt"
    assert not engine.submits
    split = ask(text_part(IMAGE[:5]), text_part(IMAGE[5:]), image_part())  # a line break stands between them
    assert len((await submitted(http, engine, split)).pictures) == 1


async def test_a_template_that_reads_variables_as_images(seeing: Any, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    hf = deepcopy(tokenizer.hf)
    hf.chat_template = "{{ extra }}" + PARTS_ONLY
    async with seeing(Tokenizer(hf, tokenizer.eos_token_ids)) as http:
        for extra in (IMAGE, VIDEO):
            body = ask(image_part(), chat_template_kwargs={"extra": extra})
            assert error_of(await http.post(CHAT, json=body))["param"] == "messages"
        unknown = ask(video_part(png()))  # this template writes nothing for a video
        assert "one mark for each image" in error_of(await http.post(CHAT, json=unknown))["message"]
    assert not engine.submits


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
    scope = {"kv": {"evict": {"policy": "kvzip", "budget": 0.5}, "scope": "document"}}
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


async def test_limits(seeing: Any, engine: FakeEngine, processor: Processor) -> None:
    async with seeing(max_images=2) as http:
        error = error_of(await http.post(CHAT, json=ask(*[image_part()] * 3)))
        assert (error["param"], error["code"]) == ("messages", "limit_exceeded")
        two = {"messages": [*ask(image_part())["messages"], *HELLO, *ask(image_part())["messages"]]}
        assert (await http.post(CHAT, json=two)).status_code == 200
    async with seeing(max_image_bytes=1024) as http:
        noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
        from PIL import Image

        from .test_image_decode import encoded

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


async def test_metrics(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json=ask(image_part(), video_part(png(), png()), n=2, compression=PRUNE))
    await http.post(CHAT, json=ask(image_part()))
    samples = await metrics(http)

    def value(name: str, **labels: str) -> float:
        return samples[f"winnow:{name}", frozenset(labels.items())]

    assert value("images_read_total", kind="image") == 2
    assert value("images_read_total", kind="video") == 1
    assert value("image_decode_seconds_count") == 3
    assert value("image_tokens_total", policy="uniform") == 18
    assert value("image_tokens_kept_total", policy="uniform") == 9
    assert value("image_tokens_total", policy="none") == value("image_tokens_kept_total", policy="none") == 6


async def test_tokenize(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = ask(image_part(), text_part("What is it?"))
    submit = await submitted(http, engine, body)
    answer = (await http.post("/tokenize", json=body)).json()
    assert answer["tokens"] == submit.prompt
    assert answer["count"] == len(submit.prompt)
    plain = (await http.post("/tokenize", json={"prompt": IMAGE})).json()
    assert plain["count"] == 1


async def test_a_slow_image_keeps_nobody_waiting(
    http: httpx.AsyncClient, engine: FakeEngine, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, started = threading.Event(), threading.Event()
    plain = processor.image

    def slow(image: Any) -> Any:
        started.set()
        assert go.wait(10)
        return plain(image)

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


async def test_the_schema_has_the_parts(http: httpx.AsyncClient) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    content = json.dumps(schemas["Message"]["properties"]["content"])
    for word in ("image_url", "input_image", "video_url", "detail", "data:image/png;base64"):
        assert word in content
    assert "image_tokens_kept" in schemas["PromptTokensDetails"]["properties"]


def test_frames_are_base64_each() -> None:
    url = video_part(b"ab", b"cd")["video_url"]["url"]
    assert url == f"data:video/jpeg;base64,{b64encode(b'ab').decode()},{b64encode(b'cd').decode()}"
