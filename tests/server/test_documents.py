"""compression.kv.scope over HTTP: where a document ends, what the engine is asked for, what is said of it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from winnow.engine.messages import EngineStats
from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.protocol.responses import ChatCompletion, Completion

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine
from .test_bad_input import error_of
from .test_routes import metrics
from .test_shortening import CHAT, COMPLETIONS, DOCUMENT, QUESTION, part, user

pytestmark = pytest.mark.anyio
PLAN = {"kv": {"evict": {"policy": "kvzip", "budget": 0.5}, "scope": "document"}}


def asking(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [user(*(parts or (part(DOCUMENT, True), part(QUESTION))))], "compression": PLAN} | fields


async def submitted(http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], url: str = CHAT) -> Any:
    answer = await http.post(url, json=body)
    assert answer.status_code == 200, answer.text
    return engine.submits[-1]


async def test_a_chat(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    submit = await submitted(http, engine, asking())
    assert tokenizer.decode(submit.prompt[: submit.document], False).endswith(DOCUMENT)
    assert tokenizer.decode(submit.prompt[submit.document :], False).startswith(f"\n{QUESTION}")
    assert submit.plan == PLAN
    assert submit.lead_ins
    plain = await submitted(http, engine, asking(part(DOCUMENT), part(QUESTION), compression=None))
    assert plain.prompt == submit.prompt
    assert plain.document == 0


@pytest.mark.parametrize(
    ("messages", "ends"),
    [
        ([user(part("one", True), part("two"), part("three", True), part("four"))], "one\ntwo\nthree"),
        ([user(part("one", True)), user(part("two")), user(part("three", True), part("four"))], "three"),
        ([user(part("one ", True), part("two"))], "one"),
        ([user(part("one", True)), {"role": "assistant", "content": "two"}, *HELLO], "one"),
    ],
)
async def test_it_ends_with_the_last_marked_token(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer, messages: list[Any], ends: str
) -> None:
    submit = await submitted(http, engine, asking(messages=messages))
    assert tokenizer.decode(submit.prompt[: submit.document], False).endswith(ends)


async def test_a_completion(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    body = {"prompt": f"{DOCUMENT}\n\n{QUESTION}", "context": DOCUMENT, "compression": PLAN, "max_tokens": 4}
    submit = await submitted(http, engine, body, COMPLETIONS)
    assert tokenizer.decode(submit.prompt[: submit.document], False) == DOCUMENT
    everything = await submitted(http, engine, body | {"context": body["prompt"]}, COMPLETIONS)
    assert everything.document == len(everything.prompt) - 1  # the answer begins from the last token


async def test_what_is_said_of_it(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": f"{DOCUMENT} {QUESTION}", "context": DOCUMENT, "compression": PLAN, "max_tokens": 4, "n": 2}
    for is_found in (False, True):
        engine.cached_tokens = engine.submits[0].document if is_found else 0
        answer = Completion.model_validate((await http.post(COMPLETIONS, json=body)).json())
        length = engine.submits[0].document
        assert answer.usage is not None and answer.usage.compression is not None
        assert answer.usage.compression.document is not None
        said = answer.usage.compression.document.model_dump()
        assert said == {"tokens": 2 * length, "reused": 2 * length * is_found}
        assert answer.usage.prompt_tokens_details.cached_tokens == length * is_found
        assert answer.usage.compression.plan is not None
        assert answer.usage.compression.plan["kv"]["scope"] == "document"
    plain = await http.post(CHAT, json={"messages": HELLO, "compression": {"kv": {"format": "int8"}}})
    assert "document" not in plain.json()["usage"]["compression"]
    assert ChatCompletion.model_validate(plain.json())


async def test_metrics(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.stats = EngineStats(documents=3, document_query_tokens_total=900, document_hit_tokens_total=600)
    samples = await metrics(http)
    assert samples["winnow:kv_documents_cached", frozenset()] == 3
    assert samples["winnow:document_cache_queries_total", frozenset()] == 900
    assert samples["winnow:document_cache_hits_total", frozenset()] == 600


async def test_of_a_prompt_that_was_shortened(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    both = PLAN | {"prompt": {"policy": "selective", "keep": 0.5}}
    submit = await submitted(http, engine, asking(compression=both))
    assert submit.plan == PLAN
    assert len(submit.prompt) == len(engine.shortens[0].prompt) - 1
    assert tokenizer.decode(submit.prompt[submit.document :], False).startswith(f"\n{QUESTION}")


async def test_a_plan_that_keeps_all_has_no_document(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    submit = await submitted(
        http, engine, asking(compression={"kv": PLAN["kv"] | {"evict": {"policy": "knorm", "budget": 1.0}}})
    )
    assert (submit.plan, submit.document) == ({}, 0)


async def test_the_servers_own_plan_does_without_marks(connect: Connect, engine: FakeEngine) -> None:
    async with connect(compression=PLAN) as http:
        assert (await submitted(http, engine, {"messages": HELLO})).document == 0
        assert (await submitted(http, engine, asking(compression=None))).document > 0


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, asking(messages=HELLO), "compression.kv.scope", "mark text parts as context"),
    (CHAT, asking(part("  \n", True), part("x")), "compression.kv.scope", "no token is marked"),
    (
        COMPLETIONS,
        {"prompt": "x y", "compression": PLAN},
        "compression.kv.scope",
        'give texts of the prompt in "context"',
    ),
    (COMPLETIONS, {"prompt": [5, 6], "compression": PLAN}, "compression.kv.scope", "no token is marked"),
    (CHAT, asking(compression={"kv": {"scope": "prompt", "format": "int8"}}), "compression.kv.scope", "document"),
    (CHAT, asking(compression={"kv": {"scope": "document"}}), "compression.kv.scope", "has no effect"),
    (
        CHAT,
        asking(compression={"kv": {"scope": "document", "evict": {"policy": "snapkv", "budget": 0.5}}}),
        "compression.kv.scope",
        "'snapkv' goes by what later tokens look at",
    ),
]


@pytest.mark.parametrize(("url", "body", "param", "why"), BAD, ids=lambda value: json.dumps(value)[-50:])
async def test_refused(
    http: httpx.AsyncClient, engine: FakeEngine, url: str, body: dict[str, Any], param: str, why: str
) -> None:
    error = error_of(await http.post(url, json=body))
    assert error["param"] == param
    assert why in error["message"]
    assert not engine.submits


async def test_a_largest_budget_is_not_for_documents_alone(connect: Connect, engine: FakeEngine) -> None:
    evict = {"policy": "knorm", "budget": 0.4}
    async with connect(max_compression={"budget": 0.5}, compression={"kv": {"evict": evict}}) as http:
        body = asking(compression={"kv": {"evict": evict, "scope": "document"}})
        assert error_of(await http.post(CHAT, json=body))["param"] == "compression.kv.scope"
        always = evict | {"during": "both"}
        assert (
            await submitted(http, engine, asking(compression={"kv": {"evict": always, "scope": "document"}}))
        ).document


async def test_the_schema_says_so(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/openapi.json")).text
    assert "compression.kv.scope" in schema
    scope = (await http.get("/v1/models/default")).json()["compression"]["schema"]["$defs"]["KV"]["properties"]["scope"]
    assert "document" in json.dumps(scope)
