"""A request does the same, bit for bit, whatever happens around it: every policy with every other choice of a plan."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from winnow.engine.compression.part import FORMATS
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.registry import MERGE, MIX, READ, read_policy
from winnow.engine.models.decoder import Decoder

from ..compression.knobs import taken
from ..compression.oracles import ORACLES
from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_beside, pages_for

NEW = 52
"""Tokens that each request generates: several evictions during decode, and a page of int8 seals."""

CHOICES = [
    (during, fmt, heads, layers)
    for i, (during, heads, layers) in enumerate(
        product(("prefill", "decode", "both"), ("uniform", "adaptive"), ("uniform", "pyramid"))
    )
    for fmt in ((None, "int4"), ("int8", "int2"), ("fp8", "mustafar70"), ("bf16", "int4"))[i % 4]
]


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    plan: dict[str, Any]
    alone: Seen
    """What it does with the engine to itself, its prompt read in one step"""

    @property
    def may_hit(self) -> bool:
        """Whether the prefix cache may spare it some of the prompt: not if queries from the first on must vote."""
        evict = Plan.parse(self.plan).evict
        return evict is None or evict.voters(len(self.prompt)) is not None


def plans_of(policy: str, merge: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    more = {} if merge is None else {"merge": merge}
    plans: list[dict[str, Any]] = []
    for i, (during, fmt, heads, layers) in enumerate(CHOICES):
        evict = {"policy": policy, "budget": (0.6, 120, 0.35)[i % 3], "during": during, "sinks": (4, 0, 20)[i % 3]}
        evict |= {"head_budget": heads, "layer_budget": layers} | more
        evict |= {} if during == "prefill" else {"interval": (8, 11)[i % 2]}
        quantized = {} if fmt is None else {"format": fmt, "residual": (0, 16, 40)[i // 2 % 3]}
        plans.append({"kv": {"evict": taken(evict)} | quantized})
    return plans


def reading_plans(policy: str) -> list[dict[str, Any]]:
    read = {"policy": policy, "dense_layers": 0, "recent": 7}
    plans: list[dict[str, Any]] = [
        {"read": read | {"tokens": 40}},
        {"read": read | {"tokens": 0.2, "sinks": 5}, "format": "int8", "residual": 8},
        {"read": read | {"tokens": 30, "dense_layers": 1}, "format": "int4", "residual": 0},
        {"read": read | {"tokens": 1}, "format": "bf16"},
        {"read": read | {"tokens": 50}, "format": "int2", "residual": 16},
    ]
    if not read_policy(policy).shares_choices:
        plans += [
            {"read": read | {"tokens": 30}, "evict": {"policy": "snapkv", "budget": 0.6, "head_budget": "adaptive"}},
            {
                "read": read | {"tokens": 0.3},
                "evict": {"policy": "knorm", "budget": 90, "during": "both", "interval": 9},
                "format": "fp8",
                "residual": 0,
            },
        ]
    return [{"kv": plan} for plan in plans]


MERGING = {"policy": "kv_merging", "proportional": True}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "kv_merging": ("knorm", MERGING),
    "ems": ("snapkv", {"threshold": 0.1}),
    "compensation": ("streaming_llm", {}),
}


MIXED: list[dict[str, Any]] = [
    {
        "mix": {"policy": "mikv", "rest": "int2"},
        "evict": {"policy": "h2o", "budget": 0.4, "during": "both", "interval": 11},
        "residual": 8,
    },
    {
        "mix": {"policy": "mikv", "format": "int8", "rest": "int2"},
        "evict": {"policy": "snapkv", "budget": 0.3, "head_budget": "adaptive"},
    },
    {
        "mix": {"policy": "mikv", "format": "int4", "rest": "int2"},
        "evict": {"policy": "random", "budget": 60, "during": "both", "interval": 8},
        "residual": 0,
    },
    {
        "mix": {"policy": "mikv", "format": "bf16", "rest": "int4"},
        "evict": {"policy": "keydiff", "budget": 0.5, "during": "decode", "interval": 16},
    },
    {"mix": {"policy": "zipcache", "format": "mustafar50", "rest": "int4", "every": 20}, "residual": 0},
    {
        "mix": {"policy": "mikv", "format": "int8", "rest": "mustafar70"},
        "evict": {"policy": "snapkv", "budget": 0.3, "during": "both", "interval": 9},
        "residual": 0,
    },
    {"mix": {"policy": "zipcache", "share": 0.4, "every": 20}, "residual": 4},
    {"mix": {"policy": "zipvl", "tau": 0.8, "every": 16}, "residual": 0},
    {"mix": {"policy": "mini_cache", "every": 16}, "residual": 0},
    {"mix": {"policy": "mini_cache", "format": None, "gamma": 0.3, "every": 9, "start": 0.0}, "residual": 12},
]


@pytest.fixture(
    scope="module",
    params=[*ORACLES, *(f"{name}, merged" for name in MERGE), "compact", "formats only", "formats mixed", *READ],
)
def requests(request: pytest.FixtureRequest, tiny: Decoder) -> list[Request]:
    """Requests with every plan of a policy; their prompts begin alike, so that they meet in the prefix cache."""
    if request.param == "formats only":
        plans = [
            {},
            *({"kv": {"format": fmt, "residual": 8}} for fmt in FORMATS),
        ]
    elif request.param == "compact":
        plans = [
            {"kv": {"evict": evict} | quantized}
            for evict in (
                {"policy": "streaming_llm", "positions": "compact", "budget": 60, "block": 16, "interval": 8},
                {"policy": "streaming_llm", "positions": "compact", "budget": 90, "block": 50, "sinks": 0},
                {"policy": "streaming_llm", "positions": "compact", "budget": 30, "block": 64, "merge": MERGING},
            )
            for quantized in ({}, {"format": "int8", "residual": 8}, {"format": "gear", "residual": 0})
        ]
    elif request.param.endswith(", merged"):
        name = request.param.removesuffix(", merged")
        policy, knobs = MERGES[name]
        plans = plans_of(policy, {"policy": name} | knobs)[::3]
    elif request.param == "formats mixed":
        plans = [{"kv": plan} for plan in MIXED]
    elif request.param in READ:
        plans = reading_plans(request.param)
    else:  # a third of the plans: the policies in turn have them all
        plans = plans_of(request.param)[list(ORACLES).index(request.param) % 3 :: 3]
    bench = Bench(tiny, max_step_tokens=1024, prefix_caching=False)
    prompts = [prompt_of(96, 1) + prompt_of(90 + 29 * i % 150, i + 2) for i in range(len(plans))]
    return [Request(prompt, plan, bench.alone(prompt, NEW, plan)) for prompt, plan in zip(prompts, plans, strict=True)]


def test_every_mix_is_among_them() -> None:
    assert {plan["mix"]["policy"] for plan in MIXED} == set(MIX)


def submit_all(bench: Bench, requests: list[Request], **sampling: Any) -> None:
    for i, request in enumerate(requests):
        bench.submit(str(i), request.prompt, NEW, request.plan, **sampling)


def check(bench: Bench, requests: list[Request], choices: int = 1) -> None:
    for i, request in enumerate(requests):
        assert len(request.alone.tokens) == NEW
        for index in range(choices):
            assert_same(bench.seen[str(i), index], request.alone)


@pytest.mark.parametrize("max_step_tokens", [16, 100])
def test_in_company(requests: list[Request], tiny: Decoder, max_step_tokens: int) -> None:
    """Among the other plans, with prompts cut into chunks."""
    bench = Bench(tiny, max_step_tokens=max_step_tokens, prefix_caching=False)
    submit_all(bench, requests)
    bench.run()
    check(bench, requests)


def test_with_a_prefix_hit(requests: list[Request], tiny: Decoder) -> None:
    """Once the beginning of the prompt, once nearly all of it is in the cache; nobody writes to its pages."""
    bench = Bench(tiny, max_step_tokens=512)
    submit_all(bench, requests)
    bench.run()
    check(bench, requests)
    first = {choice: seen.last.cached_tokens for choice, seen in bench.seen.items()}
    bench.seen.clear()
    submit_all(bench, requests)
    bench.run()
    check(bench, requests)
    for i, request in enumerate(requests):
        again = bench.seen[str(i), 0].last.cached_tokens
        assert again >= first[str(i), 0]
        assert (again >= 64) is request.may_hit or Plan.parse(request.plan).evicts_in_decode
    if any(request.may_hit for request in requests):
        assert any(seen.last.cached_tokens for seen in bench.seen.values())


def test_after_preemption(requests: list[Request], tiny: Decoder) -> None:
    """Whoever runs may lose everything after any step, several times."""
    bench = Bench(tiny, max_step_tokens=200)
    dice = random.Random(5)
    submit_all(bench, requests)

    def preempt() -> None:
        if bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    bench.run(preempt)
    assert bench.engine.stats.preemptions_total > len(requests)
    check(bench, requests)


def test_where_pages_are_short(requests: list[Request], tiny: Decoder) -> None:
    """In an arena that holds one of them whole, and several that are cut."""
    beside = max(pages_beside(tiny, request.plan, len(request.prompt), 400) for request in requests)
    bench = Bench(tiny, pages_for(tiny, 400) + beside, max_step_tokens=128)
    submit_all(bench, requests)
    bench.run()
    check(bench, requests)
    assert bench.held_pages == 0


def test_as_one_of_several_choices(requests: list[Request], tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=128)
    submit_all(bench, requests, n=3)
    bench.run()
    check(bench, requests, choices=3)
