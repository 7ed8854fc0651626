"""Models, tokens, probes, metrics."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.registry import EVICTION, MERGE
from winnow.engine.compression.vision.registry import VISION
from winnow.engine.messages import EngineStats, FrontierPoint
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server import __version__

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def test_models(http: httpx.AsyncClient) -> None:
    body = (await http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["SmolLM2-135M-Instruct", "default"]
    model = body["data"][0]
    assert (model["object"], model["max_model_len"], model["weights"]) == ("model", 2048, "int8")
    assert model["kv"]["page_bytes"] == 8192
    compression = model["compression"]
    assert set(compression["policies"]) == set(EVICTION)
    assert set(compression["merges"]) == set(MERGE)
    assert set(compression["vision"]) == set(VISION)
    assert compression["vision"]["vision_zip"]["properties"]["contextual"]["exclusiveMaximum"] == 1
    assert compression["policies"]["snapkv"]["properties"]["window"]["maximum"] == 1024
    assert compression["formats"] == FORMATS
    assert compression["profiles"]["light"]["kv"]["format"] == "int8"
    assert compression["schema"]["properties"]["kv"]


async def test_a_format_that_the_engine_lacks(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    request = {"messages": HELLO, "compression": {"kv": {"format": "mustafar50"}}}
    assert (await http.post("/v1/chat/completions", json=request)).status_code == 200
    engine.info = msgspec.structs.replace(engine.info, formats=("f32", "int4"))
    answer = await http.post("/v1/chat/completions", json=request)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "compression.kv.format"
    assert "no pages in 'mustafar50'; it has f32, int4" in error["message"]


async def test_a_method_whose_profile_is_missing(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    """The answer names the command that makes it; with the profile there the same request is served."""
    evict = {"policy": "tri_attention", "budget": 0.5}
    request = {"messages": HELLO, "compression": {"kv": {"evict": evict}}}
    answer = await http.post("/v1/chat/completions", json=request)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("compression.kv.evict.policy", "compression_not_supported")
    assert "`winnow calibrate --model default --method tri_attention`" in error["message"]
    assert engine.submits == []
    assert engine.info is not None
    engine.info = msgspec.structs.replace(engine.info, profiles=("tri_attention",))
    assert (await http.post("/v1/chat/completions", json=request)).status_code == 200
    assert engine.submits[0].plan["kv"]["evict"] == evict
    card = (await http.get("/v1/models/default")).json()
    assert card["compression"]["calibrated"] == ["tri_attention"]


async def test_a_quality_instead_of_a_plan(connect: Connect, engine: FakeEngine) -> None:
    """The answer says which plan it became; a server's maximum holds for that one."""
    request = {"messages": HELLO, "compression": {"quality": 0.9}}
    int8 = {"kv": {"format": "int8"}}
    async with connect(max_compression={"format": "int8"}, compression=int8) as http:
        answer = await http.post("/v1/chat/completions", json=request)
        assert answer.status_code == 400
        assert "`winnow calibrate --model default --frontier`" in answer.json()["error"]["message"]
        assert engine.info is not None
        points = (FrontierPoint("off", {}, 1.0, 0.0, 1.0), FrontierPoint("int8", int8, 0.98, 0.01, 0.3))
        engine.info = msgspec.structs.replace(engine.info, frontier=points)
        answer = await http.post("/v1/chat/completions", json=request)
        assert answer.status_code == 200
        assert engine.submits[-1].plan == int8
        assert answer.json()["usage"]["compression"]["plan"]["kv"]["format"] == "int8"
        answer = await http.post("/v1/chat/completions", json=request | {"compression": {"quality": 0.99}})
        assert answer.status_code == 400  # only the uncompressed model is that good
        assert answer.json()["error"]["param"] == "compression.kv.format"


async def test_one_model(connect: Connect) -> None:
    async with connect(served_model_name=["org/name", "short"]) as http:
        assert (await http.get("/v1/models/org/name")).json()["id"] == "org/name"
        assert (await http.get("/v1/models/short")).json()["root"] == "org/name"
        missing = await http.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


async def test_models_while_the_engine_loads(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.info, engine.is_ready = None, False
    model = (await http.get("/v1/models/default")).json()
    assert (model["max_model_len"], model["max_stream_len"], model["kv"]) == (None, None, None)


async def test_tokenize_and_back(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    text = "naïve 12 <|im_end|>"
    body = (await http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert body["tokens"] == tokenizer.encode(text)
    assert body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 2048
    assert "".join(body["token_strs"]) == text
    assert (await http.post("/detokenize", json={"tokens": body["tokens"]})).json() == {"prompt": text}


async def test_tokenize_a_chat(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await http.post("/v1/chat/completions", json={"messages": HELLO})
    body = (await http.post("/tokenize", json={"messages": HELLO})).json()
    assert body["tokens"] == engine.submits[0].prompt
    assert body["token_strs"] is None
    without = (await http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False})).json()
    assert without["count"] < body["count"]


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "more": 1}, "more"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, "tokens[0]"),
    ],
)
async def test_bad_tokens(http: httpx.AsyncClient, url: str, fields: dict[str, Any], param: str) -> None:
    answer = await http.post(url, json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_version(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": __version__}


@pytest.mark.parametrize(
    ("is_ready", "age", "expected"),
    [
        (True, 0.1, (200, 200, 200)),
        (False, 0.1, (200, 503, 503)),  # loading
        (False, 999.0, (200, 503, 503)),  # being started again: no reason to kill the server
        (True, 999.0, (503, 503, 503)),  # it hangs
    ],
)
async def test_probes(
    http: httpx.AsyncClient, engine: FakeEngine, is_ready: bool, age: float, expected: tuple[int, ...]
) -> None:
    engine.is_ready, engine.heartbeat_age_s = is_ready, age
    answers = [await http.get(url) for url in ("/live", "/ready", "/health")]
    assert tuple(answer.status_code for answer in answers) == expected


async def metrics(http: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Samples by name and by labels, those that all have aside."""
    text = (await http.get("/metrics")).text
    common = {"model_name", "engine"}
    return {
        (sample.name, frozenset((k, v) for k, v in sample.labels.items() if k not in common)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_of_the_engine(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats = EngineStats(
        running=3,
        waiting=2,
        pages_free=600,
        pages_cached=100,
        pages_total=1000,
        prompt_tokens_total=50,
        prefix_query_tokens_total=40,
        prefix_hit_tokens_total=30,
        evicted_tokens_total=7,
        freed_bytes_total=4096,
    )
    engine.restarts = 2
    samples = await metrics(http)
    plain = {name: value for (name, labels), value in samples.items() if not labels}
    assert plain["winnow:num_requests_running"] == 3
    assert plain["winnow:num_requests_waiting"] == 2
    assert plain["winnow:kv_cache_usage_perc"] == pytest.approx(0.3)
    assert plain["winnow:prompt_tokens_total"] == 50
    assert plain["winnow:prefix_cache_queries_total"] == 40
    assert plain["winnow:prefix_cache_hits_total"] == 30
    assert plain["winnow:kv_evicted_tokens_total"] == 7
    assert plain["winnow:kv_freed_bytes_total"] == 4096
    assert plain["winnow:engine_restarts_total"] == 2


async def test_metrics_of_requests(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    plan = {"kv": {"evict": {"policy": "knorm", "budget": 0.5}, "format": "int8"}}
    await http.post("/v1/chat/completions", json={"messages": HELLO, "n": 2, "compression": plan})
    await http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})
    await http.post("/v1/chat/completions", json={})
    await http.get("/no/such/url")
    samples = await metrics(http)

    def value(name: str, **labels: str) -> float:
        return samples[f"winnow:{name}", frozenset(labels.items())]

    assert value("request_success_total", finished_reason="length") == 3
    assert value("kv_bytes_held_total", policy="knorm", format="int8") == 510
    assert value("kv_bytes_uncompressed_total", policy="knorm", format="int8") == 2000
    assert value("kv_bytes_held_total", policy="none", format="f32") == 255
    assert value("time_to_first_token_seconds_count") == 3
    assert value("e2e_request_latency_seconds_count") == 3
    assert value("inter_token_latency_seconds_count") == 2 * (len(engine.reply) - 1)
    assert value("request_time_per_output_token_seconds_count") == 2
    assert value("request_generation_tokens_sum") == 2 * len(engine.reply) + 1
    route = "/v1/chat/completions"
    assert value("http_requests_total", method="POST", route=route, status="200") == 2
    assert value("http_requests_total", method="POST", route=route, status="400") == 1
    assert value("http_requests_total", method="GET", route="none", status="404") == 1
    assert value("http_requests_in_flight") == 1  # this one


async def test_usage_perc_without_pages(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats, engine.info = EngineStats(), None
    assert (await metrics(http))["winnow:kv_cache_usage_perc", frozenset()] == 0


async def test_a_plan_must_fit_the_compute_format(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    import msgspec

    assert engine.info is not None
    engine.info = msgspec.structs.replace(engine.info, compute_format="bf16")
    answer = await http.post("/v1/chat/completions", json={"messages": HELLO, "compression": {"kv": {"format": "f32"}}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "compression.kv.format"
