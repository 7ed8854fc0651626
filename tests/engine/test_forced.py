"""Outputs that begin with what the caller says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.errors import RequestError
from winnow.engine.models.decoder import Decoder

from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_for
from .test_speculation import LOOKUP, foreseen

PLANS: dict[str, dict[str, Any]] = {
    "no plan": {},
    "quantized": {"kv": {"format": "int8", "residual": 0}},
    "evicted": {"kv": {"evict": {"policy": "snapkv", "budget": 0.4, "head_budget": "adaptive"}, "format": "int4"}},
    "in decode": {"kv": {"evict": {"policy": "h2o", "budget": 40, "during": "both", "interval": 4}}},
}


def logprobs_of(seen: Seen) -> list[Any]:
    return [logprob for output in seen.outputs for logprob in output.logprobs or ()]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_forcing_what_the_model_says_changes_nothing(tiny: Decoder, plan: dict[str, Any]) -> None:
    """The same tokens, logits, keep sets, logprobs and memory as those of decoding token by token."""
    wanted = Bench(tiny).alone(prompt_of(100), 30, plan, logprobs=3)
    for step_tokens in (512, 16):
        bench = Bench(tiny, max_step_tokens=step_tokens)
        seen = bench.alone(prompt_of(100), 30, plan, forced=wanted.tokens[:21], logprobs=3)
        assert_same(seen, wanted)
        assert logprobs_of(seen) == logprobs_of(wanted)
        assert seen.last.compression == wanted.last.compression
        assert bench.engine.stats.generated_tokens_total == 9
        assert bench.engine.stats.prompt_tokens_total == 100


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_other_tokens_are_told_once_in_any_company(tiny: Decoder, plan: dict[str, Any]) -> None:
    """The output begins with them, whoever runs beside, and however often the newest gives way."""
    forced = prompt_of(30, 5)
    wanted = Bench(tiny).alone(prompt_of(120), 40, plan, forced=forced, logprobs=0)
    assert wanted.tokens[:30] == forced
    assert len(wanted.tokens) == len(logprobs_of(wanted)) == 40
    bench = Bench(tiny, pages=pages_for(tiny, 500), max_step_tokens=32)
    for i in range(3):
        bench.submit(str(i), prompt_of(120), 40, plan, forced=forced, logprobs=0)
        bench.submit(f"company {i}", prompt_of(90, i + 7), 60)
    for i in range(60):
        bench.step()
        if i % 7 == 6 and len(bench.running) > 1:
            bench.engine.scheduler.preempt(bench.running[-1])
    bench.run()
    assert bench.engine.stats.preemptions_total > 4
    for i in range(3):
        assert_same(bench.seen[str(i), 0], wanted)
        assert logprobs_of(bench.seen[str(i), 0]) == logprobs_of(wanted)


def test_guesses_change_nothing(tiny: Decoder) -> None:
    """Speculation begins where forced tokens end."""
    forced = prompt_of(17, 5)
    wanted = Bench(tiny).alone(prompt_of(100), 60, forced=forced, logprobs=1)
    bench = Bench(tiny)
    foreseen(bench, {"alone": [wanted.tokens]})
    seen = bench.alone(prompt_of(100), 60, forced=forced, logprobs=1, speculative=LOOKUP)
    assert_same(seen, wanted)
    assert logprobs_of(seen) == logprobs_of(wanted)
    assert seen.last.accepted_tokens


def test_forced_tokens_are_not_compressed_with_the_prompt(tiny: Decoder) -> None:
    bench = Bench(tiny)
    plan = {"kv": {"evict": {"policy": "streaming_llm", "budget": 20}}}
    seen = bench.alone(prompt_of(100), 31, plan, forced=prompt_of(30, 5))
    assert seen.last.compression is not None
    assert seen.last.compression.tokens_kept_max == 20 + 30
    assert list(seen.kept) == [100]


def test_the_observer_sees_whole_distributions(tiny: Decoder) -> None:
    bench = Bench(tiny)
    shown: list[Tensor] = []
    bench.engine.progress.on_forced = lambda request_id, logits: shown.append(logits)
    seen = bench.alone(prompt_of(50), 12, forced=prompt_of(10, 5), logprobs=0)
    every = torch.cat(shown).log_softmax(-1)
    assert every.shape == (10, tiny.config.vocab_size)
    told = torch.tensor([logprob.logprob for logprob in logprobs_of(seen)[:10]])
    assert torch.equal(every.gather(1, torch.tensor(prompt_of(10, 5))[:, None])[:, 0], told)


def test_no_stop_before_the_forced_tokens_are_over(tiny: Decoder) -> None:
    forced = prompt_of(10, 5)
    seen = Bench(tiny).alone(prompt_of(50), 12, forced=forced, stop_token_ids=(forced[3], forced[-1]))
    assert seen.tokens[:10] == forced
    assert len(seen.tokens) > 10


@pytest.mark.parametrize(
    ("changes", "param"),
    [({"forced": [160]}, "forced"), ({"forced": [-1]}, "forced"), ({"max_tokens": 3}, "max_tokens"), ({"n": 2}, "n")],
)
def test_what_is_refused(tiny: Decoder, changes: dict[str, Any], param: str) -> None:
    bench = Bench(tiny)
    with pytest.raises(RequestError) as raised:
        bench.submit("a", prompt_of(20), **({"forced": [1, 2, 3]} | changes))
    assert raised.value.param == param
    assert bench.engine.is_idle
