"""Prefix caching: what is found again, who may find it, what goes first, and that nobody writes to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from winnow.engine.models.decoder import Decoder
from winnow.engine.prefix_cache import PrefixCache

from ..models.checkpoints import prompt_of
from .bench import Bench, assert_same, pages_beside, pages_for

BLOCK = 16


def cache_of(bench: Bench) -> PrefixCache:
    assert bench.engine.cache is not None
    return bench.engine.cache


def cached(bench: Bench, prompt: list[int], **more: Any) -> int:
    """Tokens of a prompt that the cache spares."""
    return bench.alone(prompt, 1, **more).last.cached_tokens


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 100])
def test_full_blocks_are_found_but_for_the_last_token(tiny: Decoder, length: int) -> None:
    bench = Bench(tiny, max_step_tokens=40)
    prompt = prompt_of(length)
    first, second = bench.alone(prompt, 5), bench.alone(prompt, 5)
    assert first.last.cached_tokens == 0
    assert second.last.cached_tokens == (length - 1) // BLOCK * BLOCK
    assert_same(second, first)
    assert bench.engine.stats.prefix_hit_tokens_total == second.last.cached_tokens
    assert bench.engine.stats.prefix_query_tokens_total == 2 * length


def test_a_common_beginning_is_found(tiny: Decoder) -> None:
    bench = Bench(tiny)
    beginning = prompt_of(70)
    bench.alone([*beginning, *prompt_of(50, 2)], 1)
    assert cached(bench, [*beginning, *prompt_of(50, 3)]) == 64
    assert cached(bench, [5, *beginning]) == 0


def test_the_next_turn_finds_the_answer_too(tiny: Decoder) -> None:
    bench = Bench(tiny)
    prompt = prompt_of(50)
    answer = bench.alone(prompt, 60).tokens
    assert cached(bench, [*prompt, *answer, 3]) == 96  # of 109 tokens that were read


def test_what_a_plan_compressed_is_found_as_it_was_before(tiny: Decoder) -> None:
    bench = Bench(tiny)
    prompt = prompt_of(200)
    wanted = Bench(tiny, prefix_caching=False).alone(prompt, 10)
    plan = {"kv": {"evict": {"policy": "knorm", "budget": 0.2}, "format": "int4"}}
    answer = bench.alone(prompt, 40, plan).tokens
    assert cached(bench, [*prompt, *answer]) == 192, "what a compressed sequence answered is not published"
    again = bench.alone(prompt, 10)
    assert again.last.cached_tokens == 192
    assert_same(again, wanted)


def test_salts_keep_apart(tiny: Decoder) -> None:
    bench = Bench(tiny)
    prompt = prompt_of(100)
    assert [cached(bench, prompt, salt=salt) for salt in ("", "a", "b", "a", "", "b")] == [0, 0, 0, 96, 96, 96]


def test_it_can_be_switched_off(tiny: Decoder) -> None:
    bench = Bench(tiny, prefix_caching=False)
    assert [cached(bench, prompt_of(100)) for _ in range(2)] == [0, 0]
    assert bench.engine.arena.free_count == bench.engine.arena.total


def test_the_least_recently_used_go_first(tiny: Decoder) -> None:
    """One prompt is asked for again and again while others come and go."""
    bench = Bench(tiny, pages_for(tiny, 500))
    often = prompt_of(120, 1)
    cached(bench, often)
    for seed in range(2, 14):
        assert cached(bench, prompt_of(120, seed)) == 0
        assert cached(bench, often) == 112
    assert cached(bench, prompt_of(120, 13)) == 112
    assert cached(bench, prompt_of(120, 2)) == 0
    bench.engine.check_integrity()


def test_a_block_goes_before_the_one_that_it_continues(tiny: Decoder) -> None:
    """Also where a sequence finds the beginning there and adds the rest."""
    bench = Bench(tiny)
    cache, arena = cache_of(bench), bench.engine.arena
    prompt = prompt_of(161)
    bench.alone(prompt[:70], 1)
    bench.alone(prompt_of(70, 2), 1)  # in between
    bench.submit("a", prompt, 1)
    bench.submit("b", prompt_of(70, 3), 1)
    bench.run()
    keys = cache.keys(np.array(prompt, np.int32), "")
    assert len(keys) == 10
    while len(cache):
        cache.reclaim(1)
        known = [key in cache for key in keys]
        assert known == sorted(known, reverse=True), "a block is left that nothing leads to"
    assert arena.free_count == arena.total


def test_reclaim_leaves_what_is_in_use(tiny: Decoder) -> None:
    bench = Bench(tiny)
    cache, arena = cache_of(bench), bench.engine.arena
    bench.alone(prompt_of(100, 2), 1)
    bench.submit("a", prompt_of(100), 9)
    bench.step()
    cache.reclaim(arena.total)
    assert len(cache) == 100 // BLOCK
    assert cache.reclaimable() == 0
    bench.engine.check_integrity()
    bench.run()
    assert cache.reclaimable() == 100 // BLOCK * 6


def test_a_request_that_must_wait_costs_the_cache_nothing(tiny: Decoder) -> None:
    bench = Bench(tiny, pages_for(tiny, 400))
    bench.alone(prompt_of(100, 2), 1)
    bench.submit("long", prompt_of(200), 60)
    bench.submit("must wait", prompt_of(300, 3), 10)
    for _ in range(10):
        bench.step()
    assert not bench.sequence("must wait").is_running
    assert len(cache_of(bench)) == 100 // BLOCK + 200 // BLOCK
    bench.run()


def test_an_arena_full_of_cache_serves_a_prompt_that_just_fits(tiny: Decoder) -> None:
    """The prompt is published before its plan cuts it: its own pages are shared then, and there are no others."""
    prompt = prompt_of(300)
    plan = {"kv": {"evict": {"policy": "random", "budget": 0.7, "head_budget": "adaptive"}}}
    wanted = Bench(tiny).alone(prompt, 4, plan)
    bench = Bench(tiny, pages_for(tiny, 304) + pages_beside(tiny, plan, 300, 304))
    assert bench.engine.max_model_len == 304
    for seed in range(2, 6):
        bench.alone(prompt_of(150, seed), 1)
    for _ in range(2):
        assert_same(bench.alone(prompt, 4, plan), wanted)


PLANS: list[dict[str, Any]] = [
    {},
    {"kv": {"format": "int8", "residual": 0}},
    {"kv": {"evict": {"policy": "streaming_llm", "budget": 0.5}}},
    {"kv": {"evict": {"policy": "snapkv", "budget": 0.5, "head_budget": "adaptive"}, "format": "int4"}},
    {"kv": {"evict": {"policy": "h2o", "budget": 60, "during": "both", "interval": 4}}},
    {"kv": {"evict": {"policy": "keydiff", "budget": 0.8, "during": "decode", "interval": 3}, "format": "bf16"}},
]


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_shared_pages_are_never_written(tiny: Decoder, prefix_caching: bool, n: int) -> None:
    """Neither by the model nor by a plan. (Between the two a page may be dropped by all and taken by somebody else.)"""
    bench = Bench(tiny, pages_for(tiny, 600), max_step_tokens=80, prefix_caching=prefix_caching)
    engine, arena = bench.engine, bench.engine.arena
    compared = 0

    def digests() -> dict[int, bytes]:
        pages = np.flatnonzero(arena.refs > 1)
        return {int(page): hashlib.blake2b(arena.kv.data[page].numpy().tobytes()).digest() for page in pages}

    def guarded(writes: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            nonlocal compared
            before = digests()
            result = writes(*arguments)
            after = digests()
            both = before.keys() & after.keys()
            assert [page for page in both if before[page] != after[page]] == []
            compared += len(both)
            return result

        return watched

    engine.runner.run = guarded(engine.runner.run)  # type: ignore[assignment,method-assign]
    engine.compressor.apply = guarded(engine.compressor.apply)  # type: ignore[assignment,method-assign]
    beginning = prompt_of(100)
    for i, plan in enumerate(PLANS * 2):
        bench.submit(str(i), [*beginning, *prompt_of(3 + 17 * i, i)], 20, plan, n=n, temperature=1.0)
    bench.run()
    assert all(seen.rejected is None for seen in bench.seen.values())
    assert (compared > 0) is (prefix_caching or n > 1)
