"""Eviction policies over HTTP, alone and among each other, with the default model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from .serving import Serving

TEXT = "The old lighthouse keeper climbed the stairs and looked at the sea. " * 18
ASKED: list[Any] = [{"role": "user", "content": f"{TEXT}\nWho looked at the sea?"}]
EVICTIONS: list[dict[str, Any]] = [
    {"policy": "a2sf", "budget": 80, "decay": 0.9, "during": "both", "interval": 4},
    {"policy": "keyformer", "budget": 0.4, "heating": 0.05, "during": "both", "interval": 4},
    {"policy": "lagkv", "budget": 0.4, "lag": 32},
    {"policy": "lacache", "budget": 100, "during": "both", "interval": 4},
    {"policy": "expected_attention", "budget": 0.4, "head_budget": "adaptive"},
]


def ask(client: OpenAI, evict: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    plan = {"compression": {"kv": {"evict": evict, "format": "int8", "residual": 16}}}
    made = client.chat.completions.create(
        model="default", messages=ASKED, temperature=0, max_tokens=10, seed=5, extra_body=plan
    )
    assert made.usage is not None
    assert made.usage.model_extra is not None
    return made.choices[0].message.content or "", made.usage.model_extra["compression"]


def test_each_says_the_same_alone_and_in_company(server: Serving, client: OpenAI) -> None:
    with ThreadPoolExecutor(len(EVICTIONS)) as pool:
        together = list(pool.map(lambda evict: ask(client, evict), EVICTIONS))
    for evict, (text, report) in zip(EVICTIONS, together, strict=True):
        again, alone = ask(client, evict)
        assert again == text
        assert alone["tokens_kept"] == report["tokens_kept"]
        assert report["tokens_kept"]["mean"] < 0.5 * report["tokens_seen"]
        assert report["bytes_held"] < 0.6 * report["bytes_uncompressed"]
        assert report["plan"]["kv"]["evict"].items() >= evict.items()
    server.until_idle()


def test_knobs_are_checked(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as refusal:
        ask(client, {"policy": "a2sf", "budget": 80, "decay": 1.5})
    assert refusal.value.param == "compression.kv.evict.decay"
