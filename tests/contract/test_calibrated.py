"""What needs to know the model, through HTTP on the default one: its profiles and its frontier come with Winnow."""

from __future__ import annotations

from typing import Any

import pytest

from .serving import Serving

CONTEXT = "The harbour master counts the boats each morning and writes their names into a long green book. " * 12


def answer(server: Serving, compression: dict[str, Any] | None) -> dict[str, Any]:
    body = {"prompt": CONTEXT, "max_tokens": 8, "temperature": 0, "compression": compression}
    with server.http() as http:
        return http.post("/v1/completions", json=body).raise_for_status().json()["usage"]["compression"]


@pytest.mark.parametrize("policy", ["tri_attention", "razor_attention"])
def test_methods_that_need_a_profile(server: Serving, policy: str) -> None:
    used = answer(server, {"kv": {"evict": {"policy": policy, "budget": 0.25}}})
    kept, seen = used["tokens_kept"], used["tokens_seen"]
    assert kept["min"] < 0.3 * seen
    assert used["bytes_held"] < 0.6 * used["bytes_uncompressed"]
    # 14 % of the lanes for induction and 1 % for echo, some for both, keep everything.
    assert (kept["max"] == seen) is (policy == "razor_attention")


@pytest.mark.parametrize("fmt", ["matryoshka", "cskv"])
def test_formats_that_need_a_profile(server: Serving, fmt: str) -> None:
    used = answer(server, {"kv": {"format": fmt, "residual": 0}})
    assert used["bytes_held"] < 0.4 * used["bytes_uncompressed"]


def test_a_quality(server: Serving) -> None:
    held = []
    for quality in (1.0, 0.98, 0.8):
        used = answer(server, {"quality": quality})
        held.append(used["bytes_held"])
        assert quality == 1.0 or used["plan"]["kv"]
    assert held[0] > held[1] > held[2]


def test_an_elastic_plan_at_rest(server: Serving) -> None:
    used = answer(server, {"on_pressure": {"format": "int4"}})
    assert used["squeezed"] == 0
    assert used["bytes_held"] == used["bytes_uncompressed"]
    assert used["plan"]["on_pressure"]["format"] == "int4"
