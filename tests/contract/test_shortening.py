"""compression.prompt against a running server with the default model: every policy, alone and beside others."""

from __future__ import annotations

import threading
from typing import Any

import openai
import pytest
from openai import OpenAI

from winnow.engine.compression.registry import PROMPT

from .test_openai_client import MODEL, compression_of

DOCUMENT = (
    "The lighthouse at the cape was built in 1871 and is 43 metres tall. Its lamp burned whale oil, then paraffin. "
    "The keeper wrote a diary of the weather.\nThe village has a harbour, two pubs and a school. "
    "The secret code of the lamp room is 7342. In summer many visitors come to see the cliffs.\n"
) * 3
QUESTION = "What is the secret code of the lamp room?"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Answer briefly."},
    {
        "role": "user",
        "content": [{"type": "text", "text": DOCUMENT, "context": True}, {"type": "text", "text": QUESTION}],
    },
]


def ask(client: OpenAI, policy: str, keep: Any = 0.5, stream: bool = False, **fields: Any) -> Any:
    plan = {"prompt": {"policy": policy, "keep": keep}} | fields.pop("compression", {})
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=stream,
        extra_body={"compression": plan},
        **options,
        **fields,
    )


@pytest.fixture(scope="module")
def whole(server: Any) -> tuple[str, int]:
    """The answer and the prompt's tokens without a plan."""
    with server.http() as http:
        body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
        answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("policy", PROMPT)
def test_each_policy(client: OpenAI, whole: tuple[str, int], policy: str) -> None:
    answer = ask(client, policy)
    text, usage = answer.choices[0].message.content, answer.usage
    report = compression_of(usage)["prompt"]
    assert report["tokens_before"] == whole[1]
    assert usage.prompt_tokens == report["tokens_after"] < whole[1]
    dropped = report["context_before"] - report["context_after"]
    assert dropped == report["tokens_before"] - report["tokens_after"]
    assert 0 < report["context_after"] <= report["context_before"] // 2
    # What was read is held: tokens that were dropped take no memory.
    assert compression_of(usage)["tokens_seen"] == report["tokens_after"] + usage.completion_tokens - 1
    again = ask(client, policy)
    assert again.choices[0].message.content == text
    assert again.usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens - 32  # the shortened prompt is cached
    chunks = list(ask(client, policy, stream=True))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == text
    assert compression_of(chunks[-1].usage)["prompt"] == report


def test_what_keeps_everything_is_no_plan(client: OpenAI, whole: tuple[str, int]) -> None:
    for keep in (1.0, 100_000):
        answer = ask(client, "selective", keep)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == whole


def test_beside_others(client: OpenAI) -> None:
    """With KV compression, and while others read and generate: the same answers as alone."""
    plan = {"kv": {"evict": {"policy": "snapkv", "budget": 0.5}, "format": "int8"}}

    def answers() -> list[str]:
        return [ask(client, policy, 0.4, compression=plan).choices[0].message.content for policy in PROMPT]

    alone, together = answers(), [""] * len(PROMPT)

    def answer(i: int, policy: str) -> None:
        together[i] = ask(client, policy, 0.4, compression=plan).choices[0].message.content

    def talk() -> None:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=32)

    threads = [threading.Thread(target=answer, args=pair) for pair in enumerate(PROMPT)]
    threads.append(threading.Thread(target=talk))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_refusals(client: OpenAI) -> None:
    for fields, param in [
        ({"policy": "spec_pc", "keep": 0.5, "first_layer": 30}, "compression.prompt.first_layer"),  # of 30 layers
        ({"policy": "selective", "keep": 0}, "compression.prompt.keep"),
        ({"policy": "unheard_of", "keep": 0.5}, "compression.prompt.policy"),
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=4, extra_body={"compression": {"prompt": fields}}
            )
        assert caught.value.param == param
