"""Chat completions, whole answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from winnow.engine.models.tokenizer import Tokenizer
from winnow.server.protocol.responses import ChatCompletion

from .conftest import HELLO, Connect
from .fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"


async def ask(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post(URL, json={"messages": HELLO, **fields})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    ChatCompletion.model_validate(body)
    return body


async def test_an_answer(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    body = await ask(http, model="default")
    assert body["model"] == "default"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "The capital of France is Paris.", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(HELLO), False)
    assert engine.submits[0].prompt == prompt
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(engine.reply))
    assert usage["total_tokens"] == len(prompt) + len(engine.reply)


async def test_defaults_of_what_is_submitted(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(http, temperature=None, n=None, stop=None, compression=None, max_tokens=None, tools=[], user="me")
    sampling = engine.submits[0].sampling
    assert sampling.max_tokens == 2048 - len(engine.submits[0].prompt)  # all that the context leaves
    assert (sampling.temperature, sampling.n, sampling.top_k, sampling.seed) == (1.0, 1, 0, None)
    assert sampling.stop_token_ids == (2,)
    assert sampling.logprobs is None
    assert engine.submits[0].plan == {}


async def test_every_knob_reaches_the_engine(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    knobs = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "seed": -7,
        "min_tokens": 3,
        "n": 2,
    }
    await ask(
        http,
        **knobs,
        logit_bias={"5": -100},
        stop_token_ids=[9, 2],
        max_completion_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    sampling = engine.submits[0].sampling
    assert {name: getattr(sampling, name) for name in knobs} == knobs
    assert sampling.logit_bias == {5: -100.0}
    assert sampling.stop_token_ids == (2, 9)
    assert (sampling.max_tokens, sampling.logprobs) == (8, 3)


async def test_ignore_eos(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    await ask(http, ignore_eos=True, stop_token_ids=[7], top_k=-1, cache_salt="mine")
    assert engine.submits[0].sampling.stop_token_ids == (7,)
    assert engine.submits[0].sampling.ignore_eos
    assert engine.submits[0].sampling.top_k == 0
    assert engine.submits[0].cache_salt == "mine"


async def test_the_end_token_is_counted_and_not_shown(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.reply = [*tokenizer.encode("Yes.", False), 2]
    body = await ask(http, logprobs=True)
    assert body["choices"][0]["message"]["content"] == "Yes."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(engine.reply)
    assert "".join(entry["token"] for entry in body["choices"][0]["logprobs"]["content"]) == "Yes."


async def test_a_stop_token_is_shown_when_asked(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    stop = tokenizer.encode(" Paris", False)
    hidden = await ask(http, stop_token_ids=stop)
    assert hidden["choices"][0]["message"]["content"] == "The capital of France is"
    shown = await ask(http, stop_token_ids=stop, include_stop_str_in_output=True)
    assert shown["choices"][0]["message"]["content"] == "The capital of France is Paris"
    assert hidden["usage"]["completion_tokens"] == shown["usage"]["completion_tokens"] == 6


async def test_special_tokens_are_shown_when_asked(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.reply = [1, *tokenizer.encode("Yes.", False)]
    assert (await ask(http))["choices"][0]["message"]["content"] == "Yes."
    shown = await ask(http, skip_special_tokens=False)
    assert shown["choices"][0]["message"]["content"] == "<|im_start|>Yes."


async def test_n_choices(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.cached_tokens = 16
    body = await ask(http, n=3, max_tokens=2)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    usage = body["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["prompt_tokens"] == len(engine.submits[0].prompt)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}  # of the prompt, which is one
    assert usage["compression"]["sequences"] == 3
    assert usage["compression"]["bytes_held"] == 3 * 255


async def test_compression_is_reported(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    plan = {"kv": {"evict": {"policy": "snapkv", "budget": 0.25, "window": 32}, "format": "int4"}}
    body = await ask(http, compression=plan)
    assert engine.submits[0].plan == plan
    report = body["usage"]["compression"]
    described = report.pop("plan")
    assert described["kv"]["format"] == "int4"
    assert described["kv"]["evict"]["sinks"] == 4  # defaults are spelled out
    assert report == {
        "squeezed": 0,
        "sequences": 1,
        "tokens_seen": 100,
        "tokens_kept": {"min": 20, "mean": 25.5, "max": 40},
        "bytes_uncompressed": 1000,
        "bytes_held": 255,
    }


async def test_a_profile_by_name(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await ask(http, compression="light")
    assert engine.submits[0].plan == {"kv": {"format": "int8"}}
    assert body["usage"]["compression"]["plan"]["kv"]["format"] == "int8"


@pytest.mark.parametrize("nothing", [{}, "off", {"kv": {"evict": {"policy": "snapkv", "budget": 1.0}}}])
async def test_plans_that_do_nothing(http: httpx.AsyncClient, engine: FakeEngine, nothing: Any) -> None:
    body = await ask(http, compression=nothing)
    assert engine.submits[0].plan == {}
    assert body["usage"]["compression"]["plan"] is None


async def test_the_servers_default_and_maximum(connect: Connect, engine: FakeEngine) -> None:
    limits = {"budget": 0.5}
    async with connect(compression="balanced", max_compression=limits) as http:
        await ask(http)
        assert engine.submits[-1].plan["kv"]["evict"]["policy"] == "snapkv"
        for refused in ("off", {"kv": {"format": "int4"}}):
            answer = await http.post(URL, json={"messages": HELLO, "compression": refused})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "compression.kv.evict.budget"


async def test_logprobs(http: httpx.AsyncClient, tokenizer: Tokenizer, engine: FakeEngine) -> None:
    engine.reply = tokenizer.encode("né 😀", False)
    body = await ask(http, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert body["choices"][0]["message"]["content"] == "né 😀"
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "né 😀"
    assert any("\ufffd" in entry["token"] for entry in content)  # a part of a character
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)
    without = await ask(http, logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in without["choices"][0]["logprobs"]["content"])


async def test_minus_infinity_becomes_a_number(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    from winnow.engine.messages import TokenLogprob

    inf = float("-inf")
    engine._logprobs = lambda tokens, top: [TokenLogprob(inf, 1, [(1, inf)]) for _ in tokens]  # type: ignore[method-assign]
    body = await ask(http, logprobs=True, top_logprobs=1)
    entry = body["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


async def test_content_parts_and_roles(http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answered = {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "annotations": []}
    await ask(
        http, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}, answered]
    )
    text = tokenizer.decode(engine.submits[0].prompt, skip_special_tokens=False)
    assert "<|im_start|>system\nBe brief.<|im_end|>" in text
    assert "<|im_start|>user\none\ntwo<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


async def test_a_final_message_can_be_continued(
    http: httpx.AsyncClient, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The capital of"}]
    await ask(http, messages=messages, continue_final_message=True, add_generation_prompt=False)
    text = tokenizer.decode(engine.submits[0].prompt, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nThe capital of")


async def test_outputs_of_many_tokens(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.tokens_per_output = 4
    assert (await ask(http))["choices"][0]["message"]["content"] == "The capital of France is Paris."
