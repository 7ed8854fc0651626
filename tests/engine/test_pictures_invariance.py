"""A request with pictures does the same, bit for bit, whatever happens around it, under plans of every kind."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from winnow.engine.messages import Picture
from winnow.engine.models.decoder import Decoder

from .bench import Bench, Seen, assert_same, pages_beside, pages_for
from .seeing import TinyEyes, picture, pictured

NEW = 24

SNAPKV = {"policy": "snapkv", "budget": 0.4, "window": 8}
H2O = {"policy": "h2o", "budget": 0.6, "during": "both", "interval": 7}
COMPACT = {"policy": "streaming_llm", "positions": "compact", "budget": 40, "block": 16, "interval": 8}


def vision(policy: str = "uniform", keep: float = 11, **knobs: Any) -> dict[str, Any]:
    return {"policy": policy, "keep": keep} | knobs


PLANS: list[dict[str, Any]] = [
    {},
    {"vision": vision()},
    {"vision": vision("random", 0.25, positions="contiguous")},
    {"vision": vision("random", 20), "kv": {"evict": SNAPKV, "format": "int4", "residual": 8}},
    {"vision": vision(keep=0.5), "kv": {"evict": {"policy": "expected_attention", "budget": 0.5}}},
    {"vision": vision(), "kv": {"evict": H2O}},
    {"kv": {"evict": H2O | {"head_budget": "adaptive"}, "format": "int8", "residual": 0}},
    {"vision": vision(), "kv": {"mix": {"policy": "mikv", "rest": "int2"}, "evict": SNAPKV}},
    {"vision": vision(), "kv": {"read": {"policy": "quest", "tokens": 30, "dense_layers": 0}, "format": "int8"}},
    {"vision": vision(positions="contiguous"), "kv": {"evict": COMPACT}},
    {"vision": vision(), "kv": {"evict": {"policy": "prompt_distill", "budget": 0.5, "layer": 1}}},
    {"vision": vision(keep=1.0), "kv": {"evict": {"policy": "keydiff", "budget": 0.5}}},
]


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    pictures: list[Picture]
    more: dict[str, Any]
    alone: Seen


@pytest.fixture(scope="module", params=["one axis", "three axes"])
def eyes(request: pytest.FixtureRequest) -> TinyEyes:
    return TinyEyes(has_axes=request.param == "three axes")


@pytest.fixture(scope="module")
def model(eyes: TinyEyes, tiny: Decoder, turning: tuple[Decoder, Any]) -> Decoder:
    return turning[0] if eyes.has_axes else tiny


@pytest.fixture(scope="module")
def requests(eyes: TinyEyes, model: Decoder) -> list[Request]:
    """One for each plan, one without pictures and one that guesses; prompts begin alike, some with the same picture."""
    bench = Bench(model, max_step_tokens=1024, prefix_caching=False, eyes=eyes, image_cache_gib=0)
    plans = [plan for plan in PLANS if not (eyes.has_axes and "compact" in str(plan))]
    asked: list[tuple[list[int], list[Picture], dict[str, Any]]] = []
    for i, plan in enumerate(plans):
        prompt, pictures = pictured([40, picture(i % 2, 0), 9 + i, picture(2 + i % 3, 0, 4, 9), 30])
        asked.append((prompt, pictures, {"plan": plan}))
    asked.append((pictured([90])[0], [], {"plan": PLANS[3]}))
    again, pictures = pictured([40, picture(0, 0), 40])
    lookup = {"method": "prompt_lookup", "tokens": 4}
    asked.append((again + again[-40:], pictures, {"plan": PLANS[1], "speculative": lookup}))
    return [Request(*each, bench.alone(each[0], NEW, pictures=each[1], **each[2])) for each in asked]


def submit_all(bench: Bench, requests: list[Request], **sampling: Any) -> None:
    for i, request in enumerate(requests):
        bench.submit(str(i), request.prompt, NEW, pictures=request.pictures, **request.more, **sampling)


def check(bench: Bench, requests: list[Request], choices: int = 1) -> None:
    for i, request in enumerate(requests):
        assert len(request.alone.tokens) == NEW
        for index in range(choices):
            assert_same(bench.seen[str(i), index], request.alone)


@pytest.mark.parametrize("max_step_tokens", [16, 100])
def test_in_company(requests: list[Request], model: Decoder, eyes: TinyEyes, max_step_tokens: int) -> None:
    bench = Bench(model, max_step_tokens=max_step_tokens, prefix_caching=False, eyes=eyes)
    submit_all(bench, requests)
    bench.run()
    check(bench, requests)


def test_with_a_prefix_hit(requests: list[Request], model: Decoder, eyes: TinyEyes) -> None:
    bench = Bench(model, max_step_tokens=512, eyes=eyes)
    for _ in range(2):
        bench.seen.clear()
        submit_all(bench, requests)
        bench.run()
        check(bench, requests)
    cached = [bench.seen[str(i), 0].last.cached_tokens for i in range(len(requests))]
    assert cached[1] >= len(requests[1].prompt) - 2 * 25 - 17, "of what is read, all but the last block"
    assert sum(count > 0 for count in cached) > len(requests) // 2


def test_after_preemption(requests: list[Request], model: Decoder, eyes: TinyEyes) -> None:
    """Whoever runs may lose everything after any step, several times."""
    bench = Bench(model, max_step_tokens=200, eyes=eyes)
    dice = random.Random(5)
    submit_all(bench, requests)

    def preempt() -> None:
        if bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    bench.run(preempt)
    assert bench.engine.stats.preemptions_total > len(requests)
    check(bench, requests)


def test_where_pages_are_short(requests: list[Request], model: Decoder, eyes: TinyEyes) -> None:
    """In an arena that holds one of them whole, and several that are cut."""
    beside = max(pages_beside(model, request.more["plan"], len(request.prompt), 250) for request in requests)
    bench = Bench(model, pages_for(model, 250) + beside, max_step_tokens=64, eyes=eyes)
    submit_all(bench, requests)
    bench.run()
    check(bench, requests)
    assert bench.held_pages == 0


def test_as_one_of_several_choices(requests: list[Request], model: Decoder, eyes: TinyEyes) -> None:
    bench = Bench(model, max_step_tokens=128, eyes=eyes)
    submit_all(bench, requests, n=2)
    bench.run()
    check(bench, requests, choices=2)
