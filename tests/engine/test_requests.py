"""From submission to the last output: how requests end, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from winnow.engine.errors import PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.models.decoder import Decoder

from ..models.checkpoints import prompt_of
from .bench import Bench, pages_for

EVICTED = {"kv": {"evict": {"policy": "tova", "budget": 0.4, "during": "both", "interval": 4}, "format": "int8"}}


# Ends --------------------------------------------------------------------------------------------------------------


def test_max_tokens(tiny: Decoder) -> None:
    bench = Bench(tiny)
    for count in (1, 2, 17):
        seen = bench.alone(prompt_of(20), count)
        assert len(seen.tokens) == count
        assert [output.finish_reason for output in seen.outputs] == [None] * (count - 1) + ["length"]
        assert seen.last.stop_token is None


def test_a_stop_token_is_the_last(tiny: Decoder) -> None:
    bench = Bench(tiny)
    free = bench.alone(prompt_of(20), 30)
    stop = next(token for i, token in enumerate(free.tokens) if i >= 5 and token not in free.tokens[:i])
    seen = bench.alone(prompt_of(20), 30, stop_token_ids=(stop, 10**9))
    assert seen.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert (seen.last.finish_reason, seen.last.stop_token) == ("stop", stop)
    # The server leaves the model's end tokens out where they are to be ignored: the engine has none of its own.
    assert tiny.config.eos_token_ids == (7,)
    assert bench.alone(prompt_of(20), 5, logit_bias={7: 900.0}).tokens == [7] * 5


def test_min_tokens_puts_stop_tokens_off(tiny: Decoder) -> None:
    bench = Bench(tiny)
    sure = {7: 900.0}
    for least in (0, 1, 6):
        seen = bench.alone(prompt_of(20), 30, stop_token_ids=(7,), logit_bias=sure, min_tokens=least)
        assert len(seen.tokens) == least + 1
        assert 7 not in seen.tokens[:-1]
        assert seen.last.stop_token == 7
    seen = bench.alone(prompt_of(20), 4, stop_token_ids=(7,), logit_bias=sure, min_tokens=9)
    assert (len(seen.tokens), seen.last.finish_reason) == (4, "length")


def test_finish_ends_a_choice_with_a_report(tiny: Decoder) -> None:
    bench = Bench(tiny, prefix_caching=False)
    bench.submit("a", prompt_of(100), 50, EVICTED)
    for _ in range(9):
        bench.step()
    held = bench.held_pages
    (last,) = bench.finish("a")
    assert (last.token_ids, last.finish_reason) == ([], "stop")
    assert last.compression is not None
    assert last.compression.tokens_seen == 108
    assert last.compression.bytes_held == held * bench.engine.arena.layout.page_bytes
    assert bench.engine.is_idle
    assert bench.held_pages == 0
    assert bench.finish("a") == []
    assert bench.engine.finish("nobody", 3) == []


def test_finish_of_one_that_waits_again(tiny: Decoder) -> None:
    bench = Bench(tiny)
    bench.submit("a", prompt_of(100), 50)
    for _ in range(3):
        bench.step()
    held = bench.held_pages
    bench.engine.scheduler.preempt(bench.sequence("a"))
    (last,) = bench.finish("a")
    assert (last.finish_reason, last.token_ids) == ("stop", [])
    assert last.compression is not None  # what it held until then
    assert last.compression.bytes_held == held * bench.engine.arena.layout.page_bytes
    assert bench.engine.is_idle


# Aborts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 10])
@pytest.mark.parametrize("n", [1, 3])
def test_abort_gives_everything_back_at_once(tiny: Decoder, steps: int, n: int) -> None:
    """Waiting, in the midst of a prompt of three chunks, and while it answers."""
    bench = Bench(tiny, max_step_tokens=40, prefix_caching=False)
    bench.submit("a", prompt_of(110), 50, EVICTED, n=n)
    for _ in range(steps):
        bench.step()
    assert (bench.held_pages > 0) is (steps > 0)
    bench.engine.abort("a")
    assert bench.engine.is_idle
    assert bench.held_pages == 0
    assert bench.engine.arena.free_slots == 64
    assert not bench.engine.arena.kv.mass
    assert not bench.engine.arena.kv.positions
    bench.engine.check_integrity()
    bench.engine.abort("a")
    bench.engine.abort("nobody")
    assert bench.step() == []


def test_abort_lets_others_be(tiny: Decoder) -> None:
    wanted = Bench(tiny).alone(prompt_of(70), 20, EVICTED)
    bench = Bench(tiny, max_step_tokens=64)
    bench.submit("a", prompt_of(110, 2), 50)
    bench.submit("b", prompt_of(70), 20, EVICTED)
    bench.submit("c", prompt_of(90, 3), 50, n=2)
    for _ in range(8):
        bench.step()
    bench.engine.abort("a")
    bench.step()
    bench.engine.abort("c")
    bench.run()
    assert bench.seen["b", 0].tokens == wanted.tokens
    assert not bench.seen["a", 0].is_over


# Logprobs and seeds ------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_logits(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=16)
    bench.submit("other", prompt_of(30, 2), 20, temperature=1.0)
    bench.submit("a", prompt_of(50), 6, logprobs=3)
    bench.submit("b", prompt_of(50), 6, logprobs=0)
    bench.submit("c", prompt_of(50), 2, logprobs=10**6)
    bench.run()
    seen = bench.seen["a", 0]
    for output, at in zip(seen.outputs, sorted(seen.logits), strict=True):
        (said,) = output.logprobs or []
        wanted = seen.logits[at].log_softmax(-1)
        likeliest = wanted.topk(3)
        assert said.logprob == pytest.approx(float(wanted[output.token_ids[0]]), abs=1e-5)
        assert said.rank == 1
        assert [token for token, _ in said.top] == likeliest.indices.tolist()
        assert [value for _, value in said.top] == pytest.approx(likeliest.values.tolist(), abs=1e-5)
    assert all(output.logprobs and not output.logprobs[0].top for output in bench.seen["b", 0].outputs)
    assert all(output.logprobs and len(output.logprobs[0].top) == 160 for output in bench.seen["c", 0].outputs)
    assert all(output.logprobs is None for output in bench.seen["other", 0].outputs)


def test_a_seed_decides(tiny: Decoder) -> None:
    answers = []
    for seed, company in ((1, 0), (1, 3), (2, 0), (None, 0), (None, 0)):
        bench = Bench(tiny, max_step_tokens=32)
        for i in range(company):
            bench.submit(str(i), prompt_of(20, i), 30, temperature=1.0, seed=None)
        bench.submit("a", prompt_of(50), 20, temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=seed)
        bench.run()
        answers.append(tuple(bench.seen["a", 0].tokens))
    assert answers[0] == answers[1]
    assert len(set(answers)) == 4


def test_penalties_know_what_was_said_before_a_preemption(tiny: Decoder) -> None:
    knobs: dict[str, Any] = {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.3}
    wanted = Bench(tiny).alone(prompt_of(40), 30, **knobs)
    bench = Bench(tiny)
    bench.submit("a", prompt_of(40), 30, **knobs)
    for steps in (3, 10, 1, 8):
        for _ in range(steps):
            bench.step()
        bench.engine.scheduler.preempt(bench.sequence("a"))
    bench.run()
    assert bench.seen["a", 0].tokens == wanted.tokens != Bench(tiny).alone(prompt_of(40), 30).tokens


# Refusals ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({"prompt": []}, "prompt", "the prompt has no tokens"),
    "unknown token": ({"prompt": [3, 160]}, "prompt", "token ids must be below 160"),
    "negative token": ({"prompt": [-1]}, "prompt", "token ids must be below 160"),
    "too many choices": ({"n": 65}, "n", "n must be from 1 to 64"),
    "no choice": ({"n": 0}, "n", "n must be from 1 to 64"),
    "no new token": ({"tokens": 0}, "max_tokens", "max_tokens must be at least 1"),
    "temperature": ({"temperature": float("nan")}, "temperature", "temperature must be"),
    "top_p": ({"top_p": 1.5}, "top_p", "top_p must be"),
    "logit bias": ({"logit_bias": {160: 1.0}}, "logit_bias.160", "token id below 160"),
    "logprobs": ({"logprobs": -1}, "logprobs", "must not be negative"),
    "policy": ({"plan": {"kv": {"evict": {"policy": "x", "budget": 1}}}}, "compression.kv.evict.policy", "snapkv"),
    "budget": (
        {"plan": {"kv": {"evict": {"policy": "h2o", "budget": 0.0}}}},
        "compression.kv.evict.budget",
        "a fraction in (0, 1]",
    ),
}


@pytest.mark.parametrize(("request_", "param", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_field(tiny: Decoder, request_: dict[str, Any], param: str, message: str) -> None:
    bench = Bench(tiny)
    with pytest.raises(RequestError) as error:
        bench.submit("a", **({"prompt": prompt_of(9)} | request_))
    assert error.value.param == param
    assert message in error.value.message
    assert bench.engine.is_idle


@pytest.mark.parametrize(("length", "new"), [(1024, 1), (1, 1024), (900, 125)])
def test_too_long_for_the_model(tiny: Decoder, length: int, new: int) -> None:
    bench = Bench(tiny)
    with pytest.raises(PromptTooLong, match=f"{length} prompt tokens and {new} new ones exceed the model's 1024"):
        bench.submit("a", prompt_of(length), new)
    bench.submit("b", prompt_of(length - 1), new) if length > 1 else bench.submit("b", prompt_of(1), new - 1)


def test_too_long_for_the_arena_or_the_settings(tiny: Decoder) -> None:
    for bench, most in ((Bench(tiny, pages_for(tiny, 64)), 64), (Bench(tiny, max_model_len=100), 100)):
        assert bench.engine.info.max_model_len == most
        with pytest.raises(PromptTooLong, match=f"exceed the model's {most}"):
            bench.submit("a", prompt_of(most - 4), 5)
        assert len(bench.alone(prompt_of(most - 4), 4).tokens) == 4


def test_formats_larger_than_the_engine_computes_in_are_refused(tiny: Decoder) -> None:
    bench = Bench(tiny)
    bench.engine.arena.layout = type(bench.engine.arena.layout)(
        16, compute=type(bench.engine.arena.layout.compute).BF16
    )
    with pytest.raises(PlanNotSupported) as error:
        bench.submit("a", prompt_of(9), plan={"kv": {"format": "f32"}})
    assert error.value.param == "compression.kv.format"


def test_logits_are_finite(tiny: Decoder) -> None:
    seen = Bench(tiny).alone(prompt_of(300), 20, EVICTED)
    assert all(torch.isfinite(logits).all() for logits in seen.logits.values())
