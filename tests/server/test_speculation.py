"""The field `speculative`, the server's default for it, and what usage and metrics say of it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from winnow.engine.messages import EngineStats
from winnow.engine.speculation.registry import METHODS
from winnow.server.protocol.responses import ChatChunk, ChatCompletion, Completion
from winnow.server.settings import SettingsError

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine
from .test_bad_input import error_of
from .test_streaming import events

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
LOOKUP = {"method": "prompt_lookup", "tokens": 6, "ngram_max": 3, "ngram_min": 2}
VOTES = {"kv": {"evict": {"policy": "h2o", "budget": 0.5, "during": "both"}}}
DETAILS = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 3}


@pytest.fixture(autouse=True)
def _guesses(engine: FakeEngine) -> None:
    engine.accepted_tokens, engine.rejected_tokens = 5, 3


async def test_reaches_the_engine_and_comes_back(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await http.post(CHAT, json={"messages": HELLO, "speculative": LOOKUP})
    ChatCompletion.model_validate(answer.json())
    assert engine.submits[0].speculative == LOOKUP
    assert answer.json()["usage"]["completion_tokens_details"] == DETAILS
    body = {"prompt": "x", "n": 2, "speculative": {"method": "token_recycling"}}
    answer = await http.post("/v1/completions", json=body)
    Completion.model_validate(answer.json())
    assert engine.submits[1].speculative == {"method": "token_recycling", "tokens": 4}
    assert answer.json()["usage"]["completion_tokens_details"] == {name: 2 * n for name, n in DETAILS.items()}


async def test_is_off_by_default(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    for fields in ({}, {"speculative": None}, {"speculative": {}}):
        answer = await http.post(CHAT, json={"messages": HELLO, **fields})
        assert "completion_tokens_details" not in answer.json()["usage"]
        assert engine.submits[-1].speculative == {}


async def test_streams_report_it_in_their_usage(http: httpx.AsyncClient) -> None:
    body = {"messages": HELLO, "speculative": LOOKUP, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, _ = events((await http.post(CHAT, json=body)).text)
    ChatChunk.model_validate(chunks[-1])
    assert chunks[-1]["usage"]["completion_tokens_details"] == DETAILS


async def test_the_servers_default(connect: Connect, engine: FakeEngine) -> None:
    for default in ("prompt_lookup", {"method": "prompt_lookup"}):
        async with connect(speculative=default) as http:
            cases: list[tuple[dict[str, Any], str]] = [
                ({}, "prompt_lookup"),
                ({"speculative": {}}, ""),
                ({"speculative": {"method": "token_recycling"}}, "token_recycling"),
                ({"compression": VOTES}, ""),  # nobody asked for what the plan leaves no room for
            ]
            for fields, method in cases:
                assert (await http.post(CHAT, json={"messages": HELLO, **fields})).status_code == 200
                assert engine.submits[-1].speculative.get("method", "") == method
            card = (await http.get("/v1/models")).json()["data"][0]["speculative"]
            assert list(card["methods"]) == list(METHODS)
            assert card["default"]["method"] == "prompt_lookup"


async def test_with_a_draft_model(connect: Connect, engine: FakeEngine) -> None:
    async with connect(draft_model="org/small", speculative="draft") as http:
        for fields in ({}, {"speculative": {"method": "draft", "tokens": 7}}):
            assert (await http.post(CHAT, json={"messages": HELLO, **fields})).status_code == 200
            assert engine.submits[-1].speculative["method"] == "draft"
        assert engine.submits[-1].speculative["tokens"] == 7


async def test_a_wrong_default_is_said_at_the_start(connect: Connect) -> None:
    for wrong in ("magic", "draft", {"method": "prompt_lookup", "tokens": 0}):
        with pytest.raises(SettingsError, match="speculative"):
            async with connect(speculative=wrong):
                pass


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"speculative": "prompt_lookup"}, "speculative"),
        ({"speculative": {"method": "magic"}}, "speculative.method"),
        ({"speculative": {"tokens": 4}}, "speculative.method"),
        ({"speculative": {**LOOKUP, "tokens": 0}}, "speculative.tokens"),
        ({"speculative": {**LOOKUP, "tokens": 1e9}}, "speculative.tokens"),
        ({"speculative": {**LOOKUP, "ngram_min": 4}}, "speculative"),
        ({"speculative": {**LOOKUP, "depth": 4}}, "speculative.depth"),
        ({"speculative": {"method": "draft"}}, "speculative.method"),  # no draft model
        ({"speculative": LOOKUP, "compression": VOTES}, "speculative"),
    ],
)
async def test_bad_requests(http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    assert error_of(await http.post(CHAT, json={"messages": HELLO, **fields}))["param"] == param
    assert not engine.submits


async def test_metrics(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats = EngineStats(
        drafts_total=4, draft_tokens_total=20, accepted_tokens_total=9, accepted_tokens_by_place=[4, 3, 2]
    )
    samples = [s for f in text_string_to_metric_families((await http.get("/metrics")).text) for s in f.samples]
    values = {sample.name: sample.value for sample in samples}
    assert values["winnow:spec_decode_num_drafts_total"] == 4
    assert values["winnow:spec_decode_num_draft_tokens_total"] == 20
    assert values["winnow:spec_decode_num_accepted_tokens_total"] == 9
    per_place = "winnow:spec_decode_num_accepted_tokens_per_pos_total"
    places = {s.labels["position"]: s.value for s in samples if s.name == per_place}
    assert places == {"0": 4, "1": 3, "2": 2}
