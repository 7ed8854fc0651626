"""What is wrong gets a 4xx in OpenAI's shape that names the field, and nothing reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from winnow.engine.errors import EngineDied, RequestError
from winnow.server.protocol.responses import ErrorBody

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EVICT = "compression.kv.evict"
HALF = {"policy": "knorm", "budget": 0.5}


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = ErrorBody.model_validate(answer.json()).error.model_dump()
    return error


def evict(**knobs: Any) -> dict[str, Any]:
    return {"compression": {"kv": {"evict": {"policy": "snapkv", "budget": 0.5, **knobs}}}}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": ["hello"]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    ({"messages": [*HELLO, {"content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
    (user(7), "messages[0].content"),
    (user({"type": "text", "text": "x"}), "messages[0].content"),
    (user([{"type": "text"}]), "messages[0].content"),
    (user([{"type": "text", "text": "x", "more": 1}]), "messages[0].content"),
    (user([{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages[0].content[0].image_url"),
    (user([{"type": "input_audio", "input_audio": {}}]), "messages[0].content"),
    (user([None]), "messages[0].content"),
    (user("x", extra=1), "messages[0].extra"),
    (user("x", tool_calls=[{"id": "1"}]), "messages[0].tool_calls"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": -1}, "n"),
    ({"n": 17}, "n"),
    ({"n": 1000}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 10, "max_tokens": 5}, "min_tokens"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "x" * 2**20}, "stop[0]"),
    ({"stop": ["a", "x" * 2**20]}, "stop[1]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [49152]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"49152": 1}}, "logit_bias.49152"),
    ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"chat_template": "{{ 7*7 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"temprature": 1}, "temprature"),
    ({"temprature": None}, "temprature"),
    ({"prompt": "x"}, "prompt"),
    ({"x" * 5000: 1}, "x" * 100 + "…"),
    ({"compression": 5}, "compression"),
    ({"compression": []}, "compression"),
    ({"compression": "no_such_profile"}, "compression"),
    ({"compression": {"vision": {"policy": "div_prone", "keep": 9}}}, "compression.vision.policy"),
    ({"compression": {"vision": {"policy": "uniform"}}}, "compression.vision.keep"),
    ({"compression": {"prompt": {}}}, "compression.prompt.policy"),
    ({"compression": {"kv": {"read": {"policy": "conquest"}}}}, "compression.kv.read.policy"),
    ({"compression": {"kv": {"read": {"policy": "quest", "tokens": 0}}}}, "compression.kv.read.tokens"),
    ({"compression": {"kv": {"read": {"policy": "quest", "pool": 3}}}}, "compression.kv.read.pool"),
    ({"compression": {"kv": {"read": {"policy": "tidal_decode"}, "evict": HALF}}}, "compression.kv.read.policy"),
    ({"compression": {"kw": {}}}, "compression.kw"),
    ({"compression": {"kv": {"format": "int3"}}}, "compression.kv.format"),
    (evict(policy="h3o"), f"{EVICT}.policy"),
    (evict(policy=None), f"{EVICT}.policy"),
    *((evict(budget=b), f"{EVICT}.budget") for b in (-1, 0, -0.5, 1e9, 10**9, 1.5, "half", True, [])),
    (evict(sinks=-1), f"{EVICT}.sinks"),
    (evict(window=0), f"{EVICT}.window"),
    (evict(no_such_knob=1), f"{EVICT}.no_such_knob"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=lambda value: json.dumps(value)[:60])
async def test_a_bad_chat(http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    for stream in ({}, {"stream": True}):
        if stream and "stream" in "".join(fields):
            continue
        error = error_of(await http.post(CHAT, json={"messages": HELLO, **fields, **stream}))
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 1000
    assert not engine.submits


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [5, "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [[5], [2**40]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": ["x"] * 60, "n": 3}, "n"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "best_of": 3, "n": 2}, "best_of"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "messages": HELLO}, "messages"),
        ({"prompt": "x", "max_completion_tokens": 5}, "max_completion_tokens"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
async def test_a_bad_completion(
    http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    assert error_of(await http.post(COMPLETIONS, json=fields))["param"] == param
    assert not engine.submits


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"messages": [', "invalid_json"),
        (b"{'messages': 1}", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"temperature": -Infinity}', "invalid_json"),
        (b'{"temperature": 1e999}', "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"user": "\xff\xfe"}', "invalid_json"),
        (b'{"user": "\\ud800"}', "invalid_json"),
        ("{}".encode("utf-16"), "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
        (bytes(range(256)) * 64, "invalid_json"),
        (b"[" * 100_000 + b"]" * 100_000, "invalid_json"),
        (b'{"metadata":' * 50_000 + b"1" + b"}" * 50_000, "invalid_json"),
        (b"{} {}", "invalid_json"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'"text"', "invalid_value"),
        (b"5", "invalid_value"),
    ],
    ids=lambda value: repr(value)[:40],
)
async def test_a_body_that_is_no_json_object(http: httpx.AsyncClient, url: str, raw: bytes, code: str) -> None:
    answer = await http.post(url, content=raw, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, None)


@pytest.mark.parametrize("budget", ["NaN", "1e999", "-Infinity"])
async def test_a_budget_that_is_no_number(http: httpx.AsyncClient, budget: str) -> None:
    raw = f'{{"messages": [], "compression": {{"kv": {{"evict": {{"policy": "knorm", "budget": {budget}}}}}}}}}'
    error_of(await http.post(CHAT, content=raw, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "json"]
)
async def test_a_wrong_content_type(http: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    error = error_of(await http.post(CHAT, content=b'{"messages": []}', headers=headers), 415)
    assert error["code"] == "unsupported_media_type"


async def test_content_types_that_are_fine(http: httpx.AsyncClient) -> None:
    raw = json.dumps({"messages": HELLO}).encode()
    for kind in ("application/json;charset=UTF-8", "Application/JSON", 'application/json; charset="utf-8"'):
        assert (await http.post(CHAT, content=raw, headers={"content-type": kind})).status_code == 200


async def test_a_body_that_is_too_large(connect: Connect, engine: FakeEngine) -> None:
    async with connect(max_body_bytes=1024) as http:
        declared = await http.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 2000}]})
        assert error_of(declared, 413)["code"] == "request_too_large"

        sent = 0

        async def chunks() -> Any:
            nonlocal sent
            for _ in range(1000):
                sent += 512
                yield b" " * 512

        chunked = await http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
        assert error_of(chunked, 413)["code"] == "request_too_large"
    assert not engine.submits


async def test_a_prompt_of_100_000_tokens(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for url, body in (
        (CHAT, {"messages": [{"role": "user", "content": "word " * 100_000}]}),
        (COMPLETIONS, {"prompt": [5] * 100_000}),
    ):
        error = error_of(await http.post(url, json=body))
        assert error["code"] == "context_length_exceeded"
        assert "2048" in error["message"]
    assert not engine.submits


@pytest.mark.parametrize(
    ("length", "asked", "fits"), [(2047, 1, True), (2048, None, False), (2000, 48, True), (2000, 49, False)]
)
async def test_the_edge_of_the_context(http: httpx.AsyncClient, length: int, asked: int | None, fits: bool) -> None:
    answer = await http.post(COMPLETIONS, json={"prompt": [5] * length, "max_tokens": asked})
    if fits:
        assert answer.status_code == 200
    else:
        error = error_of(answer)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


async def test_an_unknown_model(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(CHAT, json={"model": "gpt-4", "messages": HELLO}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_unknown_urls_and_methods(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/v2/models"), 404)["code"] == "not_found"
    assert error_of(await http.post("/v1/embeddings", json={}), 404)["code"] == "not_found"
    answer = await http.get(CHAT)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


async def test_what_the_engine_refuses(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.error = RequestError("logit_bias", "no such token", "invalid_value")
    for stream in (False, True):
        answer = await http.post(CHAT, json={"messages": HELLO, "stream": stream})
        assert error_of(answer)["param"] == "logit_bias"


async def test_an_engine_that_dies(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.error = EngineDied("signal 9")
    for stream in (False, True):
        answer = await http.post(CHAT, json={"messages": HELLO, "stream": stream})
        assert error_of(answer, 503)["code"] == "engine_died"
        assert answer.headers["retry-after"] == "5"
        assert "signal" not in answer.text


async def test_a_bug_says_nothing_of_itself(
    http: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = RuntimeError("the secret prompt")
    for stream in (False, True):
        answer = await http.post(CHAT, json={"messages": HELLO, "stream": stream})
        assert error_of(answer, 500)["message"] == "internal error"
    assert "RuntimeError" in caplog.text
    assert "fake_engine.py" in caplog.text
    assert "secret" not in caplog.text


async def test_logs_hold_no_text_of_callers(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, engine: FakeEngine
) -> None:
    caplog.set_level("DEBUG", "winnow")
    secret = "sesame-7"
    await http.post(CHAT, json=user(secret), headers={"x-request-id": secret})
    await http.post(f"/v1/{secret}?key={secret}", json={})
    await http.post(CHAT, json={"messages": HELLO, "compression": secret, "stop": secret})
    metrics = (await http.get("/metrics")).text
    assert "/v1/chat/completions" in caplog.text
    assert secret not in caplog.text + metrics


async def test_request_ids(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 129, "", "a\tb"):
        made = (await http.get("/version", headers={"x-request-id": odd})).headers["x-request-id"]
        assert made
        assert made != odd
