"""Prompts that a draft model goes on with before they are cut (spec_kv), against dense runs of transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.errors import PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.models.decoder import Decoder

from ..compression.knobs import refused
from ..models.checkpoints import logits_of, prompt_of, random_model
from .bench import Bench, Seen, assert_same, pages_for
from .drafts import first_layers
from .masked import causal, hide_evicted, run_masked

WINDOW, AHEAD, POOL, SINKS = 8, 6, 7, 3
NEW = 10


def spec_kv(**more: Any) -> dict[str, Any]:
    evict = {"policy": "spec_kv", "budget": 0.4, "sinks": SINKS, "window": WINDOW, "lookahead": AHEAD} | more
    return {"kv": {"evict": evict}}


# The rule ----------------------------------------------------------------------------------------------------------


def lookahead(model: PreTrainedModel, prompt: list[int], most: int, stops: tuple[int, ...] = ()) -> list[int]:
    """What a model holds for likeliest, token by token."""
    text = list(prompt)
    while len(text) < len(prompt) + most and (len(text) == len(prompt) or text[-1] not in stops):
        text.append(int(logits_of(model, text)[-1].argmax()))
    return text[len(prompt) :]


def survivors(model: PreTrainedModel, prompt: list[int], ahead: list[int], budget: int) -> list[list[set[int]]]:
    layers, heads, kv_heads = 3, 4, 2
    text, first = [*prompt, *ahead], len(prompt) - WINDOW
    paid = run_masked(model, text, causal(layers, kv_heads, len(text))).attention[:, :, first:, : len(prompt)]
    most = paid.unflatten(1, (kv_heads, heads // kv_heads)).amax((2, 3))  # [layers, kv_heads, prompt]
    recent = min(WINDOW, budget // 2)

    def score(lane: Tensor, token: int) -> float:
        if token >= first:
            return float(lane[token])
        return max(float(lane[near]) for near in range(token - POOL // 2, token + POOL // 2 + 1) if 0 <= near < first)

    def kept(lane: Tensor) -> set[int]:
        sure = [*range(SINKS), *range(len(prompt) - recent, len(prompt))]
        rest = [(-score(lane, token), token) for token in range(SINKS, len(prompt) - recent)]
        return {*sure, *(token for _, token in sorted(rest)[: budget - len(sure)])}

    return [[kept(most[layer, head]) for head in range(kv_heads)] for layer in range(layers)]


@pytest.fixture(scope="module")
def whole() -> PreTrainedModel:
    return random_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def half(whole: PreTrainedModel) -> PreTrainedModel:
    """The first two of its layers."""
    model = random_model("llama", max_position_embeddings=1024, num_hidden_layers=2)
    model.load_state_dict(whole.state_dict(), strict=False)
    return model


@pytest.mark.parametrize(
    ("length", "budget"), [(50, 0.4), (150, 0.4), (150, 12)]
)  # 12: the window is not all protected
def test_keeps_what_the_lookahead_looks_at(
    tiny: Decoder, whole: PreTrainedModel, half: PreTrainedModel, length: int, budget: float
) -> None:
    prompt = prompt_of(length, 5)
    bench = Bench(tiny, draft=first_layers(tiny), prefix_caching=False)
    seen = bench.alone(prompt, NEW, spec_kv(budget=budget))
    ahead = lookahead(half, prompt, AHEAD)
    count = int(length * budget) if budget < 1 else int(budget)
    wanted = survivors(whole, prompt, ahead, count)
    (kept,) = seen.kept.values()
    assert [[set(lane[lane >= 0].tolist()) for lane in layer] for layer in kept] == wanted
    # The window alone would keep other tokens, and so would the model's own lookahead.
    assert wanted != survivors(whole, prompt, [], count)
    assert ahead != lookahead(whole, prompt, AHEAD)
    # And it goes on from there, as if what was said ahead had never been read.
    text = [*prompt, *seen.tokens[:-1]]
    run = run_masked(whole, text, hide_evicted(causal(3, 2, len(text)), seen.kept))
    wanted_logits = run.logits[[at - 1 for at in sorted(seen.logits)]]
    torch.testing.assert_close(
        torch.stack([seen.logits[at] for at in sorted(seen.logits)]), wanted_logits, atol=1e-3, rtol=0
    )
    assert bench.held_pages == 0


def test_it_looks_no_further_than_an_answer(tiny: Decoder, whole: PreTrainedModel, half: PreTrainedModel) -> None:
    """Neither than `max_tokens` nor than where the draft model would end."""
    prompt = prompt_of(60, 5)
    ahead = lookahead(half, prompt, AHEAD)
    stop = ahead[2]
    for knobs, read in (({}, AHEAD), ({"max_tokens": 2}, 2), ({"stop_token_ids": (stop,)}, ahead.index(stop) + 1)):
        bench = Bench(tiny, draft=first_layers(tiny))
        seen = bench.alone(prompt, NEW, spec_kv(), **knobs)
        (kept,) = seen.kept.values()
        wanted = survivors(whole, prompt, ahead[:read], 24)
        assert [[set(lane[lane >= 0].tolist()) for lane in layer] for layer in kept] == wanted
        assert [count for batch in bench.batches for _, count in batch][:2] == [60, read]


def test_a_budget_of_everything_looks_at_nothing(tiny: Decoder) -> None:
    bench = Bench(tiny, draft=first_layers(tiny))
    assert_same(bench.alone(prompt_of(90), NEW, spec_kv(budget=1.0)), Bench(tiny).alone(prompt_of(90), NEW))
    assert bench.engine.draft is not None
    assert bench.engine.draft.engine.stats.steps_total == 0


# In company --------------------------------------------------------------------------------------------------------

PLANS: list[dict[str, Any]] = [
    spec_kv(),
    spec_kv(head_budget="adaptive", layer_budget="pyramid"),
    {"kv": spec_kv(budget=30)["kv"] | {"format": "int4", "residual": 0}},
    spec_kv(budget=0.7, merge={"policy": "kv_merging"}, lookahead=20),
    {"kv": spec_kv()["kv"] | {"read": {"policy": "quest", "tokens": 16, "dense_layers": 0}}},
    {},
    {"kv": {"evict": {"policy": "h2o", "budget": 0.5, "during": "both", "interval": 4}}},
]


@pytest.mark.parametrize("kind", ["chunks", "preempted", "short of pages", "short of draft pages", "prefix hits"])
def test_in_company(tiny: Decoder, kind: str) -> None:
    draft = first_layers(tiny)
    prompts = [prompt_of(48, 1) + prompt_of(30 + 25 * i, i) for i in range(len(PLANS))]
    wanted = [
        Bench(tiny, prefix_caching=False, draft=draft).alone(prompt, NEW, plan)
        for prompt, plan in zip(prompts, PLANS, strict=True)
    ]
    settings: dict[str, Any] = {"max_step_tokens": 40 if kind == "chunks" else 300, "prefix_caching": kind != "chunks"}
    if kind == "short of pages":
        settings["pages"] = pages_for(tiny, 450)
    if kind == "short of draft pages":
        settings["draft_pages"] = pages_for(draft, 280)
    bench, dice = Bench(tiny, draft=draft, **settings), random.Random(1)

    def disturb() -> None:
        bench.engine.check_integrity()
        if kind == "preempted" and bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    for _ in range(1 + (kind == "prefix hits")):
        bench.seen.clear()
        for i, (prompt, plan) in enumerate(zip(prompts, PLANS, strict=True)):
            speculative = {"method": "draft"} if i % 2 and i < 4 else {}
            bench.submit(str(i), prompt, NEW, plan, n=1 + i % 2, speculative=speculative)
        bench.run(disturb)
        for i, seen in enumerate(wanted):
            for index in range(1 + i % 2):
                assert_same(bench.seen[str(i), index], seen)
    assert bench.held_pages == 0
    stats = bench.engine.stats
    assert stats.draft_pages_free == stats.draft_pages_total


def test_where_it_waits_it_is_counted_and_can_be_aborted(tiny: Decoder) -> None:
    bench = Bench(tiny, draft=first_layers(tiny), max_step_tokens=16)
    bench.submit("a", prompt_of(90), NEW, spec_kv())
    bench.step()
    assert bench.engine.stats.waiting == 1
    assert bench.engine.stats.waiting_tokens == 90
    assert not bench.engine.is_idle
    bench.engine.abort("a")
    bench.step()
    assert bench.engine.is_idle
    assert bench.engine.stats.waiting == 0
    assert bench.engine.stats.draft_pages_free == bench.engine.stats.draft_pages_total


def test_a_draft_model_that_fails_loses_the_request(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tiny, draft=first_layers(tiny))
    wanted = Bench(tiny).alone(prompt_of(50), NEW)
    assert bench.engine.draft is not None

    def fail(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench.engine.draft.engine.runner, "run", fail)
    bench.submit("a", prompt_of(90), NEW, spec_kv())
    bench.submit("b", prompt_of(50), NEW)
    bench.run()
    rejected: Seen = bench.seen["a", 0]
    assert rejected.rejected is not None
    assert rejected.rejected.kind == "internal"
    assert_same(bench.seen["b", 0], wanted)


# Refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(tiny: Decoder) -> None:
    with pytest.raises(
        PlanNotSupported, match="'spec_kv' needs a draft model; start the server with --draft-model"
    ) as e:
        Bench(tiny).submit("a", prompt_of(90), NEW, spec_kv())
    assert e.value.param == "compression.kv.evict.policy"
    draft = first_layers(tiny)
    short = Bench(tiny, draft=draft, draft_pages=pages_for(draft, 96))
    with pytest.raises(PromptTooLong, match="94 prompt tokens and 6 ahead exceed the draft model's 96") as long:
        short.submit("a", prompt_of(94), NEW, spec_kv())
    assert long.value.param == "compression.kv.evict.policy"
    assert short.engine.is_idle
    short.alone(prompt_of(90), NEW, spec_kv())
    for knobs, param in (({"pool": 4}, "pool"), ({"during": "both"}, "during"), ({"lookahead": 0}, "lookahead")):
        error: RequestError = refused(spec_kv(**knobs))
        assert error.param == f"compression.kv.evict.{param}"
