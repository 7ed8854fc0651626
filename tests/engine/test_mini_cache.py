"""Layers that share pages: which tokens are merged, what both layers find, and what that saves."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.models.decoder import Decoder
from winnow.kernels.layout import PageFormat

from ..models.checkpoints import prompt_of
from .bench import Bench, assert_same, pages_beside, pages_for
from .lanes import TOKENS, lanes_after

FMT = PageFormat.MINI_CACHE
LOWER, UPPER = 1, 2
"""The pair of a model of three layers"""


def plan(**knobs: Any) -> dict[str, Any]:
    residual = {"residual": knobs.pop("residual")} if "residual" in knobs else {}
    return {"kv": {"mix": {"policy": "mini_cache"} | knobs} | residual}


def distances(x: Tensor, y: Tensor) -> list[float]:
    """Angular distance of two layers' vectors [n, D], token by token."""
    pairs = zip(x.double(), y.double(), strict=True)
    return [math.acos(min(1.0, float(a @ b / a.norm() / b.norm()))) / math.pi for a, b in pairs]


def divergent(exact: list[tuple[Tensor, Tensor]], head: int, gamma: float) -> set[int]:
    """The paper's rule: tokens whose key's or value's distance is within `gamma` of the range from its top."""
    tokens: set[int] = set()
    for side in (0, 1):
        d = distances(exact[LOWER][side][head], exact[UPPER][side][head])
        tokens |= {i for i, one in enumerate(d) if one > max(d) - gamma * (max(d) - min(d))}
    return tokens


@pytest.mark.parametrize("fmt", [None, "bf16"])
@pytest.mark.parametrize(("gamma", "t"), [(0.05, 0.6), (0.4, 0.25), (0.0, 1.0)])
def test_both_layers_hold_one_direction_and_their_norms(tiny: Decoder, fmt: str | None, gamma: float, t: float) -> None:
    bench = Bench(tiny)
    layout = bench.engine.arena.layout
    exact, _ = lanes_after(bench, {})
    read, tables = lanes_after(bench, plan(format=fmt, gamma=gamma, t=t, residual=20))
    high = layout.compute if fmt is None else PageFormat.parse(fmt)
    assert (tables["kept"] == TOKENS).all(), "nothing is evicted"
    assert not tables["rest"][0].any()
    for head in range(2):
        first = int(tables["sealed"][UPPER, head]) * layout.capacity(high)
        last = first + int(tables["rest"][UPPER, head]) * layout.capacity(FMT)
        order = tables["positions"][UPPER, head, :TOKENS]
        kept_apart = divergent(exact, head, gamma)
        assert not kept_apart & set(order[first:last].tolist())
        assert len(kept_apart) > 1 or gamma == 0
        assert last - first > TOKENS - 20 - len(kept_apart) - layout.capacity(FMT) - layout.capacity(high)
        for name in ("positions", "sealed", "rest"):
            assert torch.equal(tables[name][LOWER, head], tables[name][UPPER, head])
        columns = slice(int(tables["sealed"][UPPER, head]), int((tables["sealed"] + tables["rest"])[UPPER, head]))
        pages = tables["table"][:, head]
        assert torch.equal(pages[LOWER, columns], pages[UPPER, columns])
        others = pages[:, : columns.start].flatten().tolist() + pages[:, columns.stop :].flatten().tolist()
        assert not set(others) & set(pages[UPPER, columns].tolist()) - {-1}
        for side in (0, 1):
            x, y = (exact[layer][side][head, order[first:last]].double() for layer in (LOWER, UPPER))
            found = [read[layer][side][head, first:last].double() for layer in (LOWER, UPPER)]
            for own, merged in zip((x, y), found, strict=True):
                torch.testing.assert_close(merged.norm(dim=-1), own.norm(dim=-1), rtol=2e-3, atol=0)
            to_upper, to_lower = distances(found[0], y), distances(found[0], x)
            for whole, up, down in zip(distances(x, y), to_upper, to_lower, strict=True):
                assert up == pytest.approx((1 - t) * whole, abs=3e-3)
                assert down == pytest.approx(t * whole, abs=3e-3)
        for layer in range(3):  # what is not merged is as it was, but for `format`
            count = int(tables["sealed"][layer, head]) * layout.capacity(high)
            behind = count + int(tables["rest"][layer, head]) * layout.capacity(FMT)
            order = tables["positions"][layer, head, :TOKENS]
            for side in (0, 1):
                own = exact[layer][side][head, order]
                assert torch.equal(read[layer][side][head, behind:], own[behind:])
                wanted = own[:count].bfloat16().float() if fmt else own[:count]
                assert torch.equal(read[layer][side][head, :count], wanted)


def test_generated_tokens_are_merged_too_and_stay_so(tiny: Decoder) -> None:
    bench = Bench(tiny)
    merged: list[set[int]] = []
    for new in (1, 101, 161):
        _, tables = lanes_after(bench, plan(format=None, every=20, residual=8), new)
        count = int(tables["rest"][UPPER, 0]) * bench.engine.arena.layout.capacity(FMT)
        merged.append(set(tables["positions"][UPPER, 0, :count].tolist()))
    assert merged[0] < merged[1] < merged[2]
    assert max(merged[2]) >= TOKENS + 100


def test_a_shared_page_counts_once(tiny: Decoder) -> None:
    bench = Bench(tiny, prefix_caching=False)
    before = bench.engine.compressor.freed.bytes
    bench.submit("a", prompt_of(TOKENS, 5), 30, plan(format=None))
    for _ in range(20):
        bench.step()
        bench.engine.check_integrity()
    arena, slot = bench.engine.arena, bench.sequence("a").slot
    report = arena.report(slot, bench.sequence("a").computed)
    assert report.bytes_held == bench.held_pages * arena.layout.page_bytes
    assert bench.held_pages - arena.ballast(slot) == len(set(arena.table[slot][arena.table[slot] >= 0].tolist()))
    shared = int(arena.rest[slot, UPPER].sum())
    assert int(arena.columns[slot].sum()) == len(arena.held(slot)) + shared
    saved = 2 * shared * arena.layout.capacity(FMT) // arena.layout.page_tokens - shared
    assert bench.engine.compressor.freed.bytes - before >= (saved - 4) * arena.layout.page_bytes
    assert report.tokens_by_format["mini_cache"] == pytest.approx(2 * shared * arena.layout.capacity(FMT) / 6, abs=0.01)
    bench.run(bench.engine.check_integrity)
    assert bench.held_pages == 0


def test_pages_add_up_whatever_happens(tiny: Decoder) -> None:
    """Preempted, forked, aborted and short of pages; what each request answers stays the same."""
    plans = [plan(every=9, residual=4), plan(format=None, gamma=0.3, every=6, start=0.0, residual=0), {}]
    prompts = [prompt_of(90, 1) + prompt_of(30 + 40 * i, i + 2) for i in range(3)]
    alone = [Bench(tiny, prefix_caching=False).alone(prompt, 40, p) for prompt, p in zip(prompts, plans, strict=True)]
    beside = max(pages_beside(tiny, p, len(prompt), 260) for prompt, p in zip(prompts, plans, strict=True))
    bench, dice = Bench(tiny, 2 * pages_for(tiny, 260) + beside, max_step_tokens=48), random.Random(3)
    for i in range(9):
        bench.submit(str(i), prompts[i % 3], 40, plans[i % 3], n=1 + i % 2)

    def disturb() -> None:
        bench.engine.check_integrity()
        if bench.running and dice.random() < 0.1:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    for _ in range(30):
        bench.step()
        disturb()
    bench.engine.abort("4")
    bench.run(disturb)
    assert bench.engine.stats.preemptions_total > 3
    assert bench.held_pages == 0
    for i in set(range(9)) - {4}:
        for index in range(1 + i % 2):
            assert_same(bench.seen[str(i), index], alone[i % 3])


def test_guesses_may_be_taken_back(tiny: Decoder) -> None:
    prompt = prompt_of(40, 1) * 4
    asked = plan(format=None, every=8, residual=0)
    wanted = Bench(tiny).alone(prompt, 40, asked)
    bench = Bench(tiny)
    bench.submit("a", prompt, 40, asked, "", {"method": "prompt_lookup"})
    bench.run(bench.engine.check_integrity)
    assert bench.seen["a", 0].tokens == wanted.tokens


@pytest.mark.parametrize(
    ("kv", "path", "why"),
    [
        ({"mix": {"policy": "mini_cache", "format": "int8"}}, "compression.kv.mix.rest", "no fewer bits"),
        ({"mix": {"policy": "mini_cache", "rest": "int2"}}, "compression.kv.mix.rest", "mini_cache"),
        ({"format": "mini_cache"}, "compression.kv.format", "bf16"),
        (
            {"mix": {"policy": "mini_cache"}, "evict": {"policy": "streaming_llm", "budget": 64}},
            "compression.kv.mix",
            "chooses tokens itself",
        ),
        (
            {"mix": {"policy": "mini_cache"}, "read": {"policy": "quest", "tokens": 64}},
            "compression.kv.mix",
            "one format",
        ),
    ],
)
def test_what_does_not_go_with_merged_layers_is_refused(kv: dict[str, Any], path: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as refused:
        Plan.parse({"kv": kv})
    assert refused.value.param == path


def test_layers_too_deep_to_be_merged_are_refused(tiny: Decoder) -> None:
    with pytest.raises(PlanNotSupported, match="no two of the model's 3 layers") as refused:
        Bench(tiny).submit("x", prompt_of(50, 1), 2, plan(start=0.9))
    assert refused.value.param == "compression.kv.mix.start"
