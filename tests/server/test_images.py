"""Images and videos in chats over HTTP: what the engine is asked for, and what is said of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from copy import deepcopy
from io import BytesIO
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from PIL import Image

from winnow.engine.messages import Submit
from winnow.engine.models.tokenizer import Tokenizer
from winnow.engine.vllm.requests import refusals
from winnow.server.protocol.responses import ChatChunk, ChatCompletion

from .conftest import HELLO
from .fake_engine import FakeEngine
from .pictures import IMAGE, MARK, VIDEO, Processor, ask, data_uri, image_part, png, submitted, text_part, video_part
from .test_bad_input import error_of
from .test_routes import metrics

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PRUNE = {"vision": {"policy": "uniform", "keep": 0.5}}
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<file_sep>\\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As LLaVA-1.5's: it goes through parts, images first, and of a text it writes nothing"""


@pytest.fixture
async def http(seeing: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with seeing() as client:
        yield client


@pytest.fixture
def parts_only(tokenizer: Tokenizer) -> Tokenizer:
    hf = deepcopy(tokenizer.hf)
    hf.chat_template = PARTS_ONLY
    return Tokenizer(hf, tokenizer.eos_token_ids)


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


async def test_several_images_and_turns(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, processor: Processor
) -> None:
    first = [image_part(), text_part("and"), image_part(data_uri(png(16, 8, "blue"))), text_part("Differ?")]
    turns = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [text_part("And now?"), image_part(data_uri(png(8, 8)))]},
    ]
    submit = await submitted(http, engine, {"messages": turns})
    assert [picture.span for picture in submit.pictures] == [7, 2, 1]
    assert processor.alone == [False] * 3
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
    assert processor.alone == [True, True]


def _gif(colours: list[Any]) -> bytes:
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


async def test_an_engine_that_prunes_every_video(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """As vLLM does: who asks for no plan is told so, who asks for another is refused."""
    assert engine.info is not None
    engine.info = msgspec.structs.replace(engine.info, refuses=refusals(0.5), video_keep=0.5)
    evs = {"vision": {"policy": "evs", "keep": 0.5, "positions": "original"}}
    for fields in ({}, {"compression": {"vision": {"policy": "evs", "keep": 0.5}}}):
        for parts in ([video_part(png())], [image_part(), video_part(png())]):
            answer = await http.post(CHAT, json=ask(*parts, **fields))
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["compression"]["plan"] == {"kv": {"residual": 32}} | evs
            assert engine.submits[-1].plan["vision"] == {"policy": "evs", "keep": 0.5}
    for plan in ("off", {}, {"vision": {"policy": "evs", "keep": 0.25}}):
        error = error_of(await http.post(CHAT, json=ask(video_part(png()), compression=plan)))
        assert error["param"] == "compression.vision"
        assert '{"policy": "evs", "keep": 0.5}' in error["message"]
    for compression in (None, "off", {}):
        assert not (await submitted(http, engine, ask(image_part(), compression=compression))).plan


async def test_tokenize(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = ask(image_part(), text_part("What is it?"))
    submit = await submitted(http, engine, body)
    answer = (await http.post("/tokenize", json=body)).json()
    assert answer["tokens"] == submit.prompt
    assert answer["count"] == len(submit.prompt)
    plain = (await http.post("/tokenize", json={"prompt": IMAGE})).json()
    assert plain["count"] == 1


async def test_the_schema_has_the_parts(http: httpx.AsyncClient) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    content = json.dumps(schemas["Message"]["properties"]["content"])
    for word in ("image_url", "input_image", "video_url", "detail", "data:image/png;base64"):
        assert word in content
    assert "image_tokens_kept" in schemas["PromptTokensDetails"]["properties"]


async def test_the_context_holds_what_pruning_may_leave(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """400 x 400 pixels are 2,500 placeholders, and the context has 2,048; the engine counts what is left in the end."""
    body = ask(image_part(data_uri(png(400, 400))), text_part("x"))
    for plan, new, is_served in (
        (None, None, False),
        ({"vision": {"policy": "uniform", "keep": 0.1}}, None, True),
        ({"vision": {"policy": "uniform", "keep": 0.1}}, 1700, True),
        ({"vision": {"policy": "uniform", "keep": 0.1}}, 1800, False),
        ({"vision": {"policy": "fast_v", "keep": 0.1}}, None, False),  # within the model
    ):
        engine.submits.clear()
        answer = await http.post(CHAT, json=body | {"compression": plan, "max_tokens": new})
        assert (answer.status_code, len(engine.submits)) == ((200, 1) if is_served else (400, 0))
    assert error_of(answer)["code"] == "context_length_exceeded"


async def test_a_draft_model_that_nobody_asked_for_stands_back(seeing: Any, engine: FakeEngine) -> None:
    async with seeing(draft_model="org/small", speculative="draft") as http:
        assert not (await submitted(http, engine, ask(image_part(), text_part("x")))).speculative
        assert (await submitted(http, engine, ask(text_part("x")))).speculative["method"] == "draft"
