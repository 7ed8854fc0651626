"""The same request does the same, bit for bit, whatever happens around it: for every policy with every other choice."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from winnow.engine.compression.registry import EVICTION
from winnow.engine.models.decoder import Decoder

from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_for

NEW = 52
"""Tokens that each request generates: six evictions during decode, and a page of int8 seals"""

Request = tuple[list[int], dict[str, Any]]


def requests_of(policy: str) -> list[Request]:
    """A prompt and a plan for each combination of the choices beside the policy."""
    every = product(("prefill", "decode", "both"), (None, "bf16", "int8", "int4"), ("uniform", "adaptive"), ("uniform", "pyramid"))
    requests: list[Request] = []
    for i, (during, fmt, heads, layers) in enumerate(every):
        evict = {"policy": policy, "budget": (0.6, 120, 0.35)[i % 3], "during": during, "sinks": (4, 0, 20)[i % 3]}
        evict |= {"head_budget": heads, "layer_budget": layers}
        if during != "prefill":
            evict["interval"] = (8, 11)[i % 2]
        kv: dict[str, Any] = {"evict": evict}
        if fmt is not None:
            kv |= {"format": fmt, "residual": (0, 16, 40)[i // 4 % 3]}
        # All begin alike, so that they meet in the prefix cache.
        requests.append((prompt_of(96, 1) + prompt_of(90 + 29 * i % 150, i + 2), {"kv": kv}))
    return requests


@pytest.fixture(scope="module", params=EVICTION)
def alone(request: pytest.FixtureRequest, tiny: Decoder) -> list[tuple[Request, Seen]]:
    """Every request of a policy, and what it does with the engine to itself and its prompt read at once."""
    bench = Bench(tiny, max_step_tokens=1024, prefix_caching=False)
    return [(each, bench.alone(each[0], NEW, each[1])) for each in requests_of(request.param)]


def submit_all(bench: Bench, alone: list[tuple[Request, Seen]], **sampling: Any) -> None:
    for i, ((prompt, plan), _) in enumerate(alone):
        bench.submit(str(i), prompt, NEW, plan, **sampling)


def check(bench: Bench, alone: list[tuple[Request, Seen]]) -> None:
    for i, (_, wanted) in enumerate(alone):
        assert_same(bench.seen[str(i), 0], wanted)


@pytest.mark.parametrize("max_step_tokens", [16, 61, 512])
def test_in_company(alone: list[tuple[Request, Seen]], tiny: Decoder, max_step_tokens: int) -> None:
    """Among all other plans, with prompts cut into chunks, without a prefix cache."""
    bench = Bench(tiny, max_step_tokens=max_step_tokens, prefix_caching=False)
    submit_all(bench, alone)
    bench.run()
    check(bench, alone)
