"""The `openai` package against a running server with the default model."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from .serving import KEY, PATIENCE_S, Serving

MODEL = "default"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
STORY = "The old lighthouse keeper climbed the stairs and looked at the sea. " * 100
LONG: list[Any] = [{"role": "user", "content": f"{STORY}\nWho looked at the sea?"}]
QUARTER_INT4 = {"kv": {"evict": {"policy": "snapkv", "budget": 0.25}, "format": "int4"}}
PLANS: list[Any] = [
    None,
    {"kv": {"format": "int8"}},
    {"kv": {"format": "int4", "residual": 0}},
    QUARTER_INT4,
    {"kv": {"evict": {"policy": "streaming_llm", "budget": 128, "during": "both", "interval": 4}}},
    {"kv": {"evict": {"policy": "h2o", "budget": 0.5, "head_budget": "adaptive"}}},
    {"kv": {"evict": {"policy": "knorm", "budget": 0.5, "layer_budget": "pyramid"}, "format": "int8"}},
    {"kv": {"evict": {"policy": "h2o", "budget": 0.3, "merge": {"policy": "kv_merging"}}, "format": "int8"}},
    {"kv": {"evict": {"policy": "streaming_llm", "budget": 128, "block": 64, "positions": "compact"}}},
    "balanced",
]


def ask(client: OpenAI, messages: list[Any] = QUESTION, compression: Any = None, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 16, **fields}
    extra = {} if compression is None else {"compression": compression}
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **fields)


def compression_of(usage: Any) -> dict[str, Any]:
    report: dict[str, Any] = usage.model_extra["compression"]
    return report


def test_models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert {model.id for model in listed} == {"SmolLM2-135M-Instruct", "default"}
    model = client.models.retrieve(MODEL)
    assert model.model_extra is not None
    assert "snapkv" in model.model_extra["compression"]["policies"]
    assert model.model_extra["max_model_len"] == 8192


def test_chat(client: OpenAI) -> None:
    answer = ask(client)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == "SmolLM2-135M-Instruct" or answer.model == MODEL
    assert ask(client).choices[0].message.content == answer.choices[0].message.content


def test_chat_streaming_says_the_same(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert compression_of(chunks[-1].usage)["tokens_seen"] == compression_of(whole.usage)["tokens_seen"]


def test_completions(client: OpenAI) -> None:
    prompts = ["The capital of France is", "Two plus two is"]
    whole = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=8, echo=True)
    assert [choice.text.startswith(prompt) for choice, prompt in zip(whole.choices, prompts, strict=True)] == [True] * 2
    assert "Paris" in whole.choices[0].text
    stream = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=8, stream=True)
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [prompt + text for prompt, text in zip(prompts, texts, strict=True)] == [c.text for c in whole.choices]


def test_logprobs(client: OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token  # greedy
    completion = client.completions.create(model=MODEL, prompt="One two three", temperature=0, max_tokens=4, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == completion.choices[0].text


def test_n_and_seed(client: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "n": 3, "seed": 7}
    first, second = (ask(client, **fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) > 1
    assert texts != [choice.message.content for choice in ask(client, **(fields | {"seed": 8})).choices]


def test_stop_strings(client: OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text[8:13]
    stopped = ask(client, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, stop=[stop], stream=True) if c.choices)
    assert streamed == text[: text.index(stop)]


def test_token_routes_agree_with_usage(server: Serving, client: OpenAI) -> None:
    with server.http() as http:
        tokens = http.post("/tokenize", json={"messages": QUESTION}).json()
        text = http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert tokens["count"] == ask(client).usage.prompt_tokens
    assert QUESTION[0]["content"] in text


READS: list[dict[str, Any]] = [
    {"policy": "quest", "tokens": 128},
    {"policy": "tidal_decode", "tokens": 64},
    {"policy": "double_sparsity", "tokens": 0.05},
    {"policy": "token_select", "tokens": 64, "sinks": 4, "recent": 32},
]


def test_generated_tokens_read_a_part(client: OpenAI) -> None:
    """All policies in one batch with a request that reads everything; each says what it read, and frees nothing."""
    alone = ask(client, LONG, {"kv": {"read": READS[0]}}, max_tokens=8)
    with ThreadPoolExecutor(len(READS) + 1) as pool:
        dense = pool.submit(ask, client, LONG, max_tokens=8)
        asked = [pool.submit(ask, client, LONG, {"kv": {"read": read}}, max_tokens=8) for read in READS]
    answers = [answer.result() for answer in asked]
    assert "read" not in compression_of(dense.result().usage)
    assert answers[0].choices[0].message.content == alone.choices[0].message.content
    for read, answer in zip(READS, answers, strict=True):
        report = compression_of(answer.usage)
        assert report["plan"]["kv"]["read"]["policy"] == read["policy"]
        beside = report["bytes_held"] - report["bytes_uncompressed"]
        assert (beside > 0) is (read["policy"] in ("quest", "token_select"))  # bounds of pages, or choices
        said = report["read"]
        assert said["tokens"] == answer.usage.completion_tokens - 1  # the first comes from the prompt
        assert 0.05 < said["bytes_per_token"] / said["bytes_per_token_dense"] < 1
        assert said["bytes_per_token_dense"] == pytest.approx(report["bytes_uncompressed"], rel=0.02)


def test_compression_frees_memory(client: OpenAI) -> None:
    plain, small = ask(client, LONG), ask(client, LONG, QUARTER_INT4)
    before, after = compression_of(plain.usage), compression_of(small.usage)
    assert before["plan"] is None
    assert before["bytes_held"] == before["bytes_uncompressed"]
    assert after["plan"]["kv"]["evict"]["policy"] == "snapkv"
    assert after["tokens_seen"] > 1200
    assert after["tokens_kept"]["mean"] < 0.35 * after["tokens_seen"]
    assert after["bytes_held"] < 0.15 * after["bytes_uncompressed"]  # whole pages: some tokens stay in f32
    assert abs(after["bytes_uncompressed"] - before["bytes_uncompressed"]) < 0.05 * before["bytes_uncompressed"]


def test_a_prompt_is_repeated_and_cut(client: OpenAI) -> None:
    answer = ask(client, LONG, {"kv": {"evict": {"policy": "kvzip", "budget": 0.5, "chunk": 512}}})
    report = compression_of(answer.usage)
    assert report["tokens_seen"] > 1200
    assert report["tokens_kept"]["min"] < report["tokens_kept"]["mean"] < 0.55 * report["tokens_seen"]
    assert report["tokens_kept"]["max"] <= report["tokens_seen"]


def test_formats_mix_in_a_lane(client: OpenAI) -> None:
    mix = {"policy": "mikv", "format": "int8", "rest": "int2"}
    report = compression_of(ask(client, LONG, {"kv": {"evict": QUARTER_INT4["kv"]["evict"], "mix": mix}}).usage)
    assert report["plan"]["kv"]["mix"]["policy"] == "mikv"
    assert report["tokens_kept"]["min"] == report["tokens_seen"], "nothing is evicted"
    held = report["tokens_by_format"]
    assert held["int2"] > held["int8"] > held["f32"]
    assert report["bytes_held"] < 0.4 * report["bytes_uncompressed"]


def test_a_plan_that_keeps_all_changes_nothing(client: OpenAI) -> None:
    everything = {"kv": {"evict": {"policy": "snapkv", "budget": 1.0}}}
    assert ask(client, LONG, everything).choices[0].message.content == ask(client, LONG).choices[0].message.content


def test_a_streams_last_chunk_reports(client: OpenAI) -> None:
    chunks = list(ask(client, LONG, QUARTER_INT4, stream=True))
    report = chunks[-1].model_extra["compression"]
    assert chunks[-1].choices[0].finish_reason
    assert report["bytes_held"] < report["bytes_uncompressed"]


@pytest.mark.parametrize("method", ["prompt_lookup", "token_recycling"])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "seed": 3, "n": 2}], ids=["greedy", "sampled"])
def test_speculation_changes_no_answer(client: OpenAI, method: str, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": f"Repeat this:\n{STORY[:400]}"}]
    for plan in (None, {"kv": {"format": "int8", "residual": 0}}):
        plain = ask(client, messages, plan, max_tokens=40, **fields)
        extra = {"speculative": {"method": method, "tokens": 6}} | ({"compression": plan} if plan else {})
        quick = client.chat.completions.create(
            **{"model": MODEL, "messages": messages, "max_tokens": 40, "temperature": 0, "extra_body": extra} | fields
        )
        assert [c.message.content for c in quick.choices] == [c.message.content for c in plain.choices]
        assert compression_of(quick.usage)["bytes_held"] == compression_of(plain.usage)["bytes_held"]
        details = quick.usage.completion_tokens_details
        assert plain.usage.completion_tokens_details is None
        if method == "prompt_lookup" and not fields:
            assert details.accepted_prediction_tokens > 10
            assert details.accepted_prediction_tokens + details.rejected_prediction_tokens < 3 * 40


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"temperature": 3}, "temperature"),
        ({"n": 1000}, "n"),
        ({"stop": "x" * 2**20}, "stop[0]"),
        (
            {"extra_body": {"compression": {"kv": {"evict": {"policy": "h3o", "budget": 0.5}}}}},
            "compression.kv.evict.policy",
        ),
        (
            {"extra_body": {"compression": {"kv": {"evict": {"policy": "h2o", "budget": -1}}}}},
            "compression.kv.evict.budget",
        ),
        ({"extra_body": {"speculative": {"method": "magic"}}}, "speculative.method"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
    ],
)
def test_bad_requests(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**({"model": MODEL, "messages": QUESTION, "stream": stream} | fields))
        assert raised.value.param == param
        assert raised.value.type == "invalid_request_error"


def test_a_prompt_that_is_too_long(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, [{"role": "user", "content": "word " * 100_000}])
    assert raised.value.code == "context_length_exceeded"


def test_other_errors(server: Serving, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    with server.http() as http:
        assert http.post("/v1/completions", content=b"x" * (17 << 20)).status_code == 413
        assert http.post("/v1/completions", content=b"{}").status_code == 415


def test_a_stream_that_is_closed_frees_its_pages(server: Serving, client: OpenAI) -> None:
    stream = ask(client, LONG, stream=True, max_tokens=4000, extra_headers={}, seed=1)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    server.until_idle()


def test_a_request_that_is_given_up_frees_its_pages(server: Serving) -> None:
    body = {"prompt": [5] * 3000, "max_tokens": 4000, "ignore_eos": True, "temperature": 0}
    with server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=1)
    server.until_idle()


@pytest.mark.anyio
async def test_32_requests_with_8_plans_at_once(server: Serving) -> None:
    """Each says what it says alone."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=PATIENCE_S) as client:

        async def answer(i: int) -> tuple[str, dict[str, Any]]:
            plan = PLANS[i % len(PLANS)]
            messages = [{"role": "user", "content": f"{STORY[: 600 + 70 * (i // 8)]}\nStory {i // 8}: who climbed?"}]
            made: Any = await client.chat.completions.create(
                model=MODEL,
                messages=messages,  # type: ignore[arg-type]
                temperature=0,
                max_tokens=12,
                extra_body={"compression": plan, "ignore_eos": True, "cache_salt": "together"},
            )
            return made.choices[0].message.content, compression_of(made.usage)

        together = await asyncio.gather(*map(answer, range(32)))
        for i in range(0, 32, 3):  # among them each plan
            text, report = await answer(i)
            assert text == together[i][0], PLANS[i % len(PLANS)]
            assert report["tokens_kept"] == together[i][1]["tokens_kept"]
    for i, (_, report) in enumerate(together):
        if i % len(PLANS):
            assert report["bytes_held"] < report["bytes_uncompressed"]
    server.until_idle()
