"""compression.kv.scope against a running server with the default model: documents that later requests find."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from .serving import Serving
from .test_openai_client import MODEL, compression_of
from .test_shortening import DOCUMENT

QUESTIONS = ("What is the secret code of the lamp room?", "When was the lighthouse built?")
PLAN = {"kv": {"evict": {"policy": "kvzip", "budget": 0.5}, "format": "int8", "scope": "document"}}


def ask(client: OpenAI, question: str, plan: dict[str, Any] = PLAN, stream: bool = False, **fields: Any) -> Any:
    parts = [{"type": "text", "text": DOCUMENT, "context": True}, {"type": "text", "text": question}]
    options = {"stream_options": {"include_usage": True}} if stream else {}
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": parts}],  # type: ignore[misc,list-item]
        temperature=0,
        max_tokens=12,
        stream=stream,
        extra_body={"compression": plan, "cache_salt": "documents"} | fields,
        **options,
    )


def test_a_document_is_compressed_once(client: OpenAI, server: Serving) -> None:
    held = server.metric("kv_documents_cached")
    answers = {}
    for question in QUESTIONS:
        for salt in ("apart from others: " + question, "documents"):
            answer = ask(client, question, cache_salt=salt)
            answers[question, salt] = answer.choices[0].message.content
            report, cached = compression_of(answer.usage), answer.usage.prompt_tokens_details.cached_tokens
            document = report["document"]
            is_found = question != QUESTIONS[0] and salt == "documents"
            assert document["reused"] == is_found * document["tokens"] == cached
            assert 0.8 * answer.usage.prompt_tokens < document["tokens"] < answer.usage.prompt_tokens
            assert report["bytes_held"] < 0.5 * report["bytes_uncompressed"]
        assert len({text for (asked, _), text in answers.items() if asked == question}) == 1
    assert server.metric("kv_documents_cached") == held + 3
    assert server.metric("document_cache_hits_total") > 0
    chunks = list(ask(client, QUESTIONS[1], stream=True))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == answers[QUESTIONS[1], "documents"]
    assert compression_of(chunks[-1].usage)["document"]["reused"]
    server.until_idle()


def test_completions_name_their_context(client: OpenAI) -> None:
    for is_found in (False, True):
        answer = client.completions.create(
            model=MODEL,
            prompt=f"{DOCUMENT}\n\nQuestion: {QUESTIONS[is_found]}\nAnswer:",
            max_tokens=4,
            extra_body={"context": DOCUMENT.strip(), "compression": PLAN},
        )
        document = compression_of(answer.usage)["document"]
        assert document["reused"] == is_found * document["tokens"]


def test_refusals(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'snapkv' goes by what later tokens look at") as caught:
        ask(client, QUESTIONS[0], {"kv": {"evict": {"policy": "snapkv", "budget": 0.5}, "scope": "document"}})
    assert caught.value.param == "compression.kv.scope"
