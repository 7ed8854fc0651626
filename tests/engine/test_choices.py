"""The n choices of a request: one prompt, shared pages, separate fates."""

from __future__ import annotations

from typing import Any

import pytest

from winnow.engine.models.decoder import Decoder
from winnow.engine.sampling import choice_seed

from ..models.checkpoints import prompt_of
from .bench import Bench, assert_same

PLANS: dict[str, dict[str, Any]] = {
    "no plan": {},
    "quantized": {"kv": {"format": "int8", "residual": 0}},
    "evicted": {"kv": {"evict": {"policy": "snapkv", "budget": 0.4, "head_budget": "adaptive"}, "format": "int4"}},
    "in decode": {"kv": {"evict": {"policy": "h2o", "budget": 40, "during": "both", "interval": 4}}},
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_choices_are_requests_with_their_own_seeds(tiny: Decoder, plan: dict[str, Any]) -> None:
    bench = Bench(tiny, max_step_tokens=64)
    prompt = prompt_of(150)
    bench.submit("n", prompt, 20, plan, n=4, temperature=1.0, seed=11)
    bench.submit("company", prompt_of(60, 2), 30, temperature=1.0)
    bench.run()
    answers = []
    for index in range(4):
        alone = Bench(tiny).alone(prompt, 20, plan, temperature=1.0, seed=choice_seed(11, index))
        assert_same(bench.seen["n", index], alone)
        answers.append(tuple(alone.tokens))
        assert alone.last.compression == bench.seen["n", index].last.compression
    assert len(set(answers)) == 4
    assert bench.engine.stats.prompt_tokens_total == 210, "the prompt was read once"


def test_random_policies_draw_for_the_request(tiny: Decoder) -> None:
    """Choices share a compressed prompt, so what is kept of it follows from the request's seed alone."""
    plan = {"kv": {"evict": {"policy": "random", "budget": 0.3, "during": "both", "interval": 5}}}
    bench = Bench(tiny)
    bench.submit("n", prompt_of(100), 12, plan, n=3)
    bench.run()
    alone = Bench(tiny).alone(prompt_of(100), 12, plan)
    for index in range(3):
        assert_same(bench.seen["n", index], alone)


def test_choices_share_pages_until_they_write(tiny: Decoder) -> None:
    bench = Bench(tiny, prefix_caching=False)
    bench.submit("n", prompt_of(100), 30, n=5, temperature=1.0)
    bench.step()
    assert bench.held_pages == 6 * 7
    bench.step()
    assert bench.held_pages == 6 * (6 + 5), "each has its own open page, all share the full ones"
    for _ in range(14):
        bench.step()
    assert bench.held_pages == 6 * (6 + 5 * 2)
    bench.run()
    assert bench.held_pages == 0


def test_choices_of_a_cut_prompt_share_what_is_left(tiny: Decoder) -> None:
    bench = Bench(tiny, prefix_caching=False)
    bench.submit("n", prompt_of(300), 30, PLANS["evicted"], n=5)
    bench.step()
    first = bench.sequence("n")
    assert bench.held_pages == int(bench.engine.arena.columns[first.slot].sum()) < 6 * 12
    bench.run()
    assert bench.held_pages == 0


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_preempted_choices_read_their_prompt_again(tiny: Decoder, plan: dict[str, Any]) -> None:
    undisturbed = Bench(tiny)
    undisturbed.submit("n", prompt_of(150), 20, plan, n=3, temperature=1.0)
    undisturbed.run()
    bench = Bench(tiny, max_step_tokens=100)
    bench.submit("n", prompt_of(150), 20, plan, n=3, temperature=1.0)
    bench.step()
    bench.engine.scheduler.preempt(bench.sequence("n"))  # before there are others
    for _ in range(4):
        bench.step()
    for index in (1, 0):
        bench.engine.scheduler.preempt(bench.sequence("n", index))
    for _ in range(3):
        bench.step()
    bench.engine.scheduler.preempt(bench.sequence("n", 2))
    bench.run()
    for choice, seen in undisturbed.seen.items():
        assert_same(bench.seen[choice], seen)


def test_one_choice_can_end_before_the_others(tiny: Decoder) -> None:
    undisturbed = Bench(tiny)
    undisturbed.submit("n", prompt_of(90), 20, n=3, temperature=1.0)
    undisturbed.run()
    bench = Bench(tiny, prefix_caching=False)
    bench.submit("n", prompt_of(90), 20, n=3, temperature=1.0)
    for _ in range(5):
        bench.step()
    for index in (0, 2):
        (last,) = bench.finish("n", index)
        assert bench.seen["n", index].last is last
    assert bench.held_pages == 6 * 6
    bench.run()
    assert_same(bench.seen["n", 1], undisturbed.seen["n", 1])
    assert [len(bench.seen["n", index].tokens) for index in range(3)] == [5, 20, 5]


def test_a_choice_that_has_not_begun_can_be_ended(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=16)
    bench.submit("n", prompt_of(90), 3, n=3)
    bench.step()
    bench.finish("n", 1)
    bench.run()
    assert [len(bench.seen["n", index].tokens) for index in range(3)] == [3, 0, 3]


def test_stop_tokens_end_choices_one_by_one(tiny: Decoder) -> None:
    free = Bench(tiny)
    free.submit("n", prompt_of(90), 20, n=3, temperature=1.0)
    free.run()
    stops = tuple(free.seen["n", index].tokens[4 + index] for index in range(3))
    bench = Bench(tiny)
    bench.submit("n", prompt_of(90), 20, n=3, temperature=1.0, stop_token_ids=stops)
    bench.run()
    for index in range(3):
        tokens = free.seen["n", index].tokens
        end = min(tokens.index(stop) for stop in stops if stop in tokens)
        assert bench.seen["n", index].tokens == tokens[: end + 1]
        assert bench.seen["n", index].last.finish_reason == "stop"
