"""Asynchronous stepping: tokens are read one step late, and nothing else is different."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from winnow.engine.compression.plan import Plan
from winnow.engine.config import EngineSettings
from winnow.engine.models.decoder import Decoder
from winnow.engine.sampler import Drawn, Sampled, Sampler
from winnow.engine.speculation.speculation import obstacle

from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_for
from .plans import evict

NEW = 30
STOPS = tuple(range(0, 160, 9))
"""So many tokens that sampled answers end at one of them soon"""

PLANS: dict[str, dict[str, Any]] = {
    "no plan": {},
    "snapkv, int4": evict("snapkv") | {"format": "int4", "residual": 0},
    "int8": {"format": "int8", "residual": 0},
    "votes at last": {"evict": {"policy": "snapkv", "budget": 0.5, "window": 3, "during": "both", "interval": 8}},
    "h2o": evict("h2o"),
    "expected_attention": evict("expected_attention"),
    "ems": evict("ems"),
    "sliding": {"evict": {"policy": "streaming_llm", "budget": 40, "positions": "compact", "block": 32}},
    "quest": {"read": {"policy": "quest", "tokens": 40}},
    "token_select": {"read": {"policy": "token_select", "tokens": 40, "recent": 8}},
    "zipcache": {"mix": {"policy": "zipcache", "every": 10}, "residual": 0},
}
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "stop_token_ids": STOPS, "logprobs": 3},
    {"temperature": 1.2, "top_p": 0.8, "stop_token_ids": STOPS, "min_tokens": 5},
    {"frequency_penalty": 1.5, "repetition_penalty": 1.3, "stop_token_ids": STOPS, "logprobs": 0},
    {"temperature": 0.9, "top_k": 7, "min_p": 0.05, "n": 3, "stop_token_ids": STOPS},
    {"tokens": 1},
    {"speculative": {"method": "prompt_lookup", "tokens": 4, "ngram_min": 1}, "stop_token_ids": STOPS},
    {"forced": [5, 9, 4], "logprobs": 1, "tokens": 9},
]
ENDS = ("finish_reason", "stop_token", "cached_tokens", "compression")


def benches(model: Decoder, **settings: Any) -> list[Bench]:
    return [Bench(model, async_scheduling=is_async, **settings) for is_async in (False, True)]


def submit_all(bench: Bench, plan: dict[str, Any]) -> None:
    """A batch of all kinds of sampling, every second one of them under the plan."""
    for i, sampling in enumerate(SAMPLING):
        is_plain = i % 2 or ("speculative" in sampling and obstacle(Plan.parse(plan)) is not None)
        more = {"tokens": NEW, "plan": {} if is_plain else plan, "seed": 11 + i} | sampling
        bench.submit(str(i), prompt_of(70 + 7 * i, i), **more)


def assert_same_answers(bench: Bench, wanted: Bench, ends: tuple[str, ...] = ENDS) -> None:
    assert bench.seen.keys() == wanted.seen.keys()
    for choice, seen in bench.seen.items():
        other = wanted.seen[choice]
        assert_same(seen, other)
        for what in ends:
            assert getattr(seen.last, what) == getattr(other.last, what), (choice, what)
        assert logprobs(seen) == logprobs(other)
    assert bench.held_pages == 0
    assert bench.engine.stats.generated_tokens_total == wanted.engine.stats.generated_tokens_total


def logprobs(seen: Seen) -> list[Any]:
    return [entry for output in seen.outputs for entry in output.logprobs or []]


# The same answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", PLANS.values(), ids=PLANS)
def test_in_a_mixed_batch(tiny: Decoder, kv: dict[str, Any]) -> None:
    """And the same reports: a row that was read ahead of a stop token is not in them, nor in the prefix cache."""
    wanted, bench = benches(tiny, max_step_tokens=48)
    for each in (wanted, bench):
        submit_all(each, {"kv": kv})
        each.run(each.engine.check_integrity)
    assert {seen.last.finish_reason for seen in bench.seen.values()} == {"stop", "length"}
    assert_same_answers(bench, wanted)
    assert wanted.engine.cache is not None
    assert bench.engine.cache is not None
    assert bench.engine.cache._entries.keys() == wanted.engine.cache._entries.keys()


def test_when_pages_run_out(tiny: Decoder) -> None:
    plan = {"kv": evict("streaming_llm", budget=70)}
    wanted, bench = benches(tiny, max_step_tokens=48, pages=pages_for(tiny, 160))
    for each in (wanted, bench):
        for i in range(6):
            stops = () if i % 3 else STOPS
            each.submit(
                str(i), prompt_of(30 + i, i), 60, {} if i % 2 else plan, temperature=1.0, seed=i, stop_token_ids=stops
            )
        each.run(each.engine.check_integrity)
    assert bench.engine.stats.preemptions_total
    assert_same_answers(bench, wanted, ENDS[:2])


def test_whoever_is_preempted_between_steps(tiny: Decoder) -> None:
    """Loses the token that was not read, and says the same one later."""
    wanted, bench = benches(tiny)
    for each in (wanted, bench):
        submit_all(each, {"kv": PLANS["int8"]})
    wanted.run()
    dice = random.Random(3)

    def preempt() -> None:
        if bench.running and dice.random() < 0.4:
            bench.engine.scheduler.preempt(dice.choice(bench.running))
            bench.engine.check_integrity()

    bench.run(preempt)
    assert bench.engine.stats.preemptions_total > 5
    assert_same_answers(bench, wanted, ENDS[:2])


def test_the_next_turn_finds_this_one(tiny: Decoder) -> None:
    """As far as it was said, however many rows were read behind its stop token."""
    for length in range(40, 58, 3):  # one of the answers ends at a page's end
        turns = []
        for each in benches(tiny):
            said = each.alone(prompt_of(length), NEW, temperature=1.0, stop_token_ids=STOPS).tokens
            turns.append(each.alone([*prompt_of(length), *said, 8, 9], 5))
        assert turns[0].last.cached_tokens == turns[1].last.cached_tokens
        assert_same(turns[1], turns[0])


@pytest.mark.parametrize("steps", range(1, 9))
def test_who_is_cancelled_or_finished(tiny: Decoder, steps: int) -> None:
    """Says nothing more; the others do not notice."""
    (wanted, bench), plan = benches(tiny, max_step_tokens=64), {"kv": PLANS["votes at last"]}
    for each in (wanted, bench):
        for i in range(4):
            each.submit(str(i), prompt_of(40 + i, i), 12, plan if i % 2 else {}, temperature=1.0)
    wanted.run()
    for _ in range(steps):
        bench.step()
    said = len(bench.seen["1", 0].tokens)
    bench.engine.abort("0")
    ended = bench.finish("1")
    bench.engine.check_integrity()
    bench.run()
    assert [output.finish_reason for output in ended] == ["stop"]
    assert bench.seen["1", 0].tokens == wanted.seen["1", 0].tokens[:said]
    for name in "23":
        assert_same(bench.seen[name, 0], wanted.seen[name, 0])
    assert bench.held_pages == 0
    assert bench.engine.arena.free_slots == 64


@pytest.mark.parametrize("plan", ["no plan", "h2o", "quest", "token_select"])
def test_tokens_that_the_device_cannot_tell(tiny: Decoder, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads ahead then reads the wrong one, which leaves nothing. Where it would, all is sorted until it can."""
    late = 0
    read = Drawn.read

    def counted(drawn: Drawn) -> Sampled:
        nonlocal late
        sampled = read(drawn)
        late += sampled.late.sum()
        return sampled

    monkeypatch.setattr(Drawn, "read", counted)
    wanted, bench = benches(tiny)
    bench.engine.drawing._sampler = Sampler(few=2)
    for each in (wanted, bench):
        for i, filters in enumerate(({"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 30, "logprobs": 2}, {})):
            each.submit(
                str(i), prompt_of(60, i), NEW, {"kv": PLANS[plan]}, temperature=1.2, stop_token_ids=(3,), **filters
            )
        assert late == 0
        each.run(each.engine.check_integrity)
    assert late > 2 * NEW if plan == "no plan" else late == 0
    assert_same_answers(bench, wanted)


def test_bad_logits(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lose their request, with all its choices; the others go on."""
    (wanted, bench), steps = benches(tiny), 0
    for each in (wanted, bench):
        each.submit("bad", prompt_of(30, 1), 20, n=2)
        each.submit("good", prompt_of(40), 20)
        run: Callable[..., torch.Tensor] = each.engine.runner.run
        steps = 0

        def spoiled(batch: Any, *ids: Any, run: Callable[..., torch.Tensor] = run) -> torch.Tensor:
            nonlocal steps
            logits, steps = run(batch, *ids).clone(), steps + 1
            if steps == 5:
                logits[[seq.request_id for seq in batch.seqs].index("bad")] = torch.nan
            return logits

        monkeypatch.setattr(each.engine.runner, "run", spoiled)
        each.run(each.engine.check_integrity)
    assert bench.seen["bad", 0].rejected == wanted.seen["bad", 0].rejected is not None
    assert {choice: seen.tokens for choice, seen in bench.seen.items()} == {
        choice: seen.tokens for choice, seen in wanted.seen.items()
    }
    assert_same(bench.seen["good", 0], wanted.seen["good", 0])
    assert bench.held_pages == 0


# One step late -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "guesses"), [*((plan, {}) for plan in PLANS), ("no plan", {"method": "prompt_lookup", "tokens": 4})]
)
def test_a_step_is_launched_before_tokens_are_read(
    tiny: Decoder, plan: str, guesses: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody guesses from them."""
    order: list[str] = []
    read = Drawn.read

    def watched_read(drawn: Drawn) -> Sampled:
        order.append("read")
        return read(drawn)

    monkeypatch.setattr(Drawn, "read", watched_read)
    (_, bench) = benches(tiny)
    run = bench.engine.runner.run

    def watched_run(*arguments: Any) -> torch.Tensor:
        order.append("run")
        return run(*arguments)

    monkeypatch.setattr(bench.engine.runner, "run", watched_run)
    assert len(bench.alone(prompt_of(40), 4, {"kv": PLANS[plan]}, speculative=guesses).tokens) == 4
    # Nothing is read ahead of the last token: lengths are known.
    chunks = 2 if plan == "ems" else 1  # of the prompt: its newest queries are heard apart
    assert order == (["run", "read"] * 4 if guesses else [*["run"] * chunks, *["run", "read"] * 3, "read"])


def test_nobody_gives_way_to_who_is_over(tiny: Decoder) -> None:
    """Pages run out in the step behind a stop token: they are found without taking any from the other."""
    stop = Bench(tiny).alone(prompt_of(32), 2).tokens[1]
    bench = Bench(tiny, pages_for(tiny, 64), async_scheduling=True, prefix_caching=False)
    bench.submit("a", prompt_of(30, 1), 20)
    bench.submit("ends", prompt_of(32), 20, stop_token_ids=(stop,))
    taken = bench.engine.arena.take(bench.engine.arena.free_count - 6 * 5)
    bench.run()
    bench.engine.arena.release(taken)
    assert bench.seen["ends", 0].tokens[-1] == stop
    assert bench.engine.stats.preemptions_total == 0


def test_the_default_follows_the_device() -> None:
    assert not EngineSettings().async_scheduling
    assert EngineSettings(device="cuda").async_scheduling
    assert not EngineSettings(device="cuda", async_scheduling=False).async_scheduling
