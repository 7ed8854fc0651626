"""Speculative decoding changes nothing but the number of steps: the same tokens, and the same bits in every logit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.pages import Ints
from winnow.engine.sequence import Sequence
from winnow.engine.speculation.registry import METHODS

from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_for
from .texts import tokens_of_text

NEW = 48
LOOKUP: dict[str, Any] = {"method": "prompt_lookup", "tokens": 5}

PLANS: dict[str, dict[str, Any]] = {
    "no plan": {},
    "int8": {"format": "int8", "residual": 0},
    "int4": {"format": "int4", "residual": 7},
    "snapkv": {"evict": {"policy": "snapkv", "budget": 0.4, "head_budget": "adaptive"}},
    "h2o, then int8": {"evict": {"policy": "h2o", "budget": 0.6}, "format": "int8", "residual": 16},
    "votes before each event": {
        "evict": {"policy": "snapkv", "budget": 0.5, "window": 4, "during": "both", "interval": 11}
    },
    "in decode, int4": {
        "evict": {"policy": "knorm", "budget": 60, "during": "both", "interval": 7, "layer_budget": "pyramid"},
        "format": "int4",
    },
    "one vote": {"evict": {"policy": "tova", "budget": 0.8, "during": "decode", "interval": 5}},
    "sliding": {"evict": {"policy": "streaming_llm", "budget": 40, "during": "both", "interval": 6}},
}


class Prophet:
    """Knows what plain decoding says, and gets some of it wrong, in every place of a guess."""

    learns = False

    def __init__(self, answers: dict[str, list[list[int]]], share: float = 0.75, seed: int = 0):
        self._answers = answers
        self._share = share
        self._dice = random.Random(seed)

    def propose(self, seqs: list[Sequence], most: list[int]) -> list[Ints]:
        return [self._guess(seq, count) for seq, count in zip(seqs, most, strict=True)]

    def _guess(self, seq: Sequence, most: int) -> Ints:
        answer = self._answers[seq.request_id][seq.index]
        known = most if self._share == 1 else self._dice.randint(min(1, most), most)
        wanted = answer[seq.generated :][:known]
        wanted += [1] * (most - len(wanted))  # beyond what plain decoding said before it stopped
        return np.array(
            [token if self._dice.random() < self._share else (token + 1) % 160 for token in wanted[:most]], np.int32
        )


def foreseen(bench: Bench, answers: dict[str, list[list[int]]], share: float = 0.75) -> None:
    """Lets a prophet stand in for prompt lookup."""
    bench.engine.speculator._drafters["prompt_lookup"] = Prophet(answers, share)  # type: ignore[assignment]


def accepted(bench: Bench) -> int:
    return bench.engine.stats.accepted_tokens_total


def assert_same_ends(seen: Seen, wanted: Seen) -> None:
    assert_same(seen, wanted)
    assert seen.logits.keys() >= wanted.logits.keys()  # a guess may be read beyond the stop token
    for what in ("finish_reason", "stop_token", "compression"):
        assert getattr(seen.last, what) == getattr(wanted.last, what)
    said, expected = ([entry for output in s.outputs for entry in output.logprobs or []] for s in (seen, wanted))
    assert said == expected


# The same answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_whatever_is_guessed(tiny: Decoder, plan: dict[str, Any], temperature: float) -> None:
    prompt, kv = prompt_of(120), {"kv": plan}
    wanted = Bench(tiny).alone(prompt, NEW, kv, temperature=temperature)
    bench = Bench(tiny)
    foreseen(bench, {"alone": [wanted.tokens]})
    seen = bench.alone(prompt, NEW, kv, temperature=temperature, speculative=LOOKUP)
    assert_same_ends(seen, wanted)
    assert seen.last.accepted_tokens == accepted(bench) > 5
    assert seen.last.rejected_tokens == bench.engine.stats.draft_tokens_total - accepted(bench) > 5
    assert len(seen.outputs) < len(wanted.outputs) == NEW
    counters = bench.engine.speculator.counters
    assert sum(counters.accepted_at) == counters.accepted_tokens
    assert counters.accepted_at[0] >= counters.accepted_at[1] > 0 == counters.accepted_at[5]


KNOBS: dict[str, dict[str, Any]] = {
    "penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3},
    "penalties, sampled": {"frequency_penalty": 0.7, "repetition_penalty": 1.1, "temperature": 0.8},
    "bias": {"logit_bias": {3: 4.0, 9: -50.0}, "temperature": 1.0},
    "logprobs": {"logprobs": 3},
    "logprobs, sampled": {"logprobs": 0, "temperature": 1.0, "top_p": 0.8},
    "filters": {"temperature": 1.3, "top_k": 12, "min_p": 0.05},
    "a seed of its own": {"temperature": 1.0, "seed": 2**63 + 5},
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_under_all_sampling_parameters(tiny: Decoder, knobs: dict[str, Any]) -> None:
    prompt = prompt_of(40, 4)
    wanted = Bench(tiny).alone(prompt, NEW, **knobs)
    bench = Bench(tiny)
    foreseen(bench, {"alone": [wanted.tokens]})
    assert_same_ends(bench.alone(prompt, NEW, speculative=LOOKUP, **knobs), wanted)
    assert accepted(bench) > 10


@pytest.mark.parametrize("least", [0, 1, 2, 9, 17])
def test_stops_and_min_tokens(tiny: Decoder, least: int) -> None:
    """A stop token ends the answer where it stands, though guesses behind it held."""
    prompt = prompt_of(20)
    free = Bench(tiny).alone(prompt, 30).tokens
    stops = (free[4], free[12])
    wanted = Bench(tiny).alone(prompt, 30, stop_token_ids=stops, min_tokens=least)
    for share in (1.0, 0.6):
        bench = Bench(tiny)
        foreseen(bench, {"alone": [wanted.tokens]}, share)
        seen = bench.alone(prompt, 30, stop_token_ids=stops, min_tokens=least, speculative=LOOKUP)
        assert_same_ends(seen, wanted)
        assert bench.held_pages == 0


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_no_more_than_max_tokens(tiny: Decoder, tokens: int) -> None:
    wanted = Bench(tiny).alone(prompt_of(30), 20)
    bench = Bench(tiny)
    foreseen(bench, {"alone": [wanted.tokens]}, 1.0)
    seen = bench.alone(prompt_of(30), tokens, speculative=LOOKUP)
    assert seen.tokens == wanted.tokens[:tokens]
    assert seen.last.finish_reason == "length"
    assert len(seen.outputs) == 1 + -(-(tokens - 1) // 6)  # the first token, and then five guesses and one more


def test_with_the_real_methods_on_the_default_model(default_model: Decoder) -> None:
    """A text that repeats itself: every method finds something to guess."""
    prompt = tokens_of_text(50) * 2
    wanted = Bench(default_model).alone(prompt, 16)
    for method in METHODS:
        bench = Bench(default_model, draft=default_model)
        for _ in range(1 + (method == "token_recycling")):  # then it knows what the first answer was read from
            seen = bench.alone(prompt, 16, speculative={"method": method, "tokens": 6})
            assert_same_ends(seen, wanted)
        assert accepted(bench) >= 8
        assert len(seen.outputs) <= 8


# In company --------------------------------------------------------------------------------------------------------


def disturbed(tiny: Decoder, disturb: Callable[[Bench, random.Random], None], **settings: Any) -> Bench:
    """All plans together, half of them with guesses, every third of several choices, against each alone."""
    plans = list(PLANS.values())
    alone = []
    for i, plan in enumerate(plans):
        quiet = Bench(tiny)
        quiet.submit(str(i), prompt_of(60 + 13 * i, i), NEW, {"kv": plan}, temperature=i % 2, n=1 + i % 3)
        alone.append([quiet.run()[str(i), index] for index in range(1 + i % 3)])
    bench = Bench(tiny, **settings)
    foreseen(bench, {str(i): [seen.tokens for seen in choices] for i, choices in enumerate(alone)})
    for i, plan in enumerate(plans):
        speculative = {} if i % 4 == 3 else LOOKUP
        bench.submit(
            str(i),
            prompt_of(60 + 13 * i, i),
            NEW,
            {"kv": plan},
            temperature=i % 2,
            n=1 + i % 3,
            speculative=speculative,
        )
    dice = random.Random(3)
    bench.run(lambda: disturb(bench, dice))
    for i, choices in enumerate(alone):
        for index, wanted in enumerate(choices):
            assert_same(bench.seen[str(i), index], wanted)
            assert bench.seen[str(i), index].last.compression == wanted.last.compression
    assert accepted(bench) > 50
    assert bench.held_pages == 0
    return bench


def test_in_company(tiny: Decoder) -> None:
    disturbed(tiny, lambda bench, dice: bench.engine.check_integrity(), max_step_tokens=100)


def test_after_preemption(tiny: Decoder) -> None:
    def preempt(bench: Bench, dice: random.Random) -> None:
        bench.engine.check_integrity()
        if bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    bench = disturbed(tiny, preempt, max_step_tokens=200)
    assert bench.engine.stats.preemptions_total > 10


def test_where_pages_are_short(tiny: Decoder) -> None:
    bench = Bench(tiny, pages_for(tiny, 250))
    disturbed(tiny, lambda bench, dice: bench.engine.check_integrity(), pages=bench.engine.arena.total)


def test_where_a_step_is_short(tiny: Decoder) -> None:
    """Guesses take what is left of a step: whoever decodes does so in every one."""
    bench = Bench(tiny, max_step_tokens=16)
    wanted = Bench(tiny).alone(prompt_of(40), NEW)
    foreseen(bench, {"a": [wanted.tokens] * 14}, 1.0)
    bench.submit("a", prompt_of(40), NEW, speculative=LOOKUP, n=14)
    bench.run()
    for index in range(14):
        assert_same(bench.seen["a", index], wanted)
    for batch in bench.batches:
        assert len(batch) <= sum(count for _, count in batch) <= 16
    assert [sum(count for _, count in batch) for batch in bench.batches if len(batch) == 14][:3] == [16] * 3


def test_guesses_cost_nobody_pages(tiny: Decoder) -> None:
    """An arena that two sequences fill to the last page: guesses that need another page are not read."""
    prompt, new = prompt_of(90), 38  # 128 tokens, of which the last is never read
    wanted = Bench(tiny).alone(prompt, new)
    bench = Bench(tiny, 2 * 8 * 6, prefix_caching=False)
    foreseen(bench, {"a": [wanted.tokens], "b": [wanted.tokens]}, 0.5)
    for name in "ab":
        bench.submit(name, prompt, new, speculative={"method": "prompt_lookup", "tokens": 32})
    bench.run()
    for name in "ab":
        assert_same(bench.seen[name, 0], wanted)
    assert bench.engine.stats.preemptions_total == 0
    assert accepted(bench) > 10


def test_none_costs_nothing(tiny: Decoder) -> None:
    """Without guesses a step reads one token of each, whatever others do."""
    bench = Bench(tiny)
    wanted = Bench(tiny).alone(prompt_of(50), 20)
    foreseen(bench, {"b": [wanted.tokens]}, 1.0)
    bench.submit("a", prompt_of(50), 20)
    bench.submit("b", prompt_of(50), 20, speculative=LOOKUP)
    bench.run()
    counts = [count for batch in bench.batches[1:] for (name, _), count in batch if name == "a"]
    assert counts == [1] * 19
    assert_same(bench.seen["a", 0], wanted)
    assert_same(bench.seen["b", 0], wanted)
    assert bench.seen["a", 0].last.accepted_tokens == 0


def test_windows(windowed: Decoder) -> None:
    """Where the kernels look up positions in lanes that have lost tokens."""
    for kv in (PLANS["no plan"], PLANS["sliding"], PLANS["in decode, int4"]):
        wanted = Bench(windowed).alone(prompt_of(90), NEW, {"kv": kv})
        bench = Bench(windowed)
        foreseen(bench, {"alone": [wanted.tokens]})
        assert_same_ends(bench.alone(prompt_of(90), NEW, {"kv": kv}, speculative=LOOKUP), wanted)


# Refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(tiny: Decoder) -> None:
    bench = Bench(tiny)
    with pytest.raises(RequestError) as error:
        bench.submit("a", prompt_of(9), speculative={"method": "magic"})
    assert error.value.param == "speculative.method"
    plan = {"kv": {"evict": {"policy": "h2o", "budget": 0.5, "during": "both"}}}
    with pytest.raises(PlanNotSupported, match="every new token votes"):
        bench.submit("a", prompt_of(9), plan=plan, speculative=LOOKUP)
    assert bench.engine.is_idle
