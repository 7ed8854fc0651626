"""Prompts that the model repeats before they are cut (kvzip), against dense runs of transformers over both."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PromptTooLong, RequestError
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.recital import lead_ins, parts_of

from ..models.checkpoints import prompt_of, random_model
from .bench import Bench, Seen, assert_same, pages_for
from .masked import causal, hide_evicted, run_masked

SAID = [[3, 9, 4], [11, 2], [8]]
CHUNK = 64
NEW = 10


def kvzip(**more: Any) -> dict[str, Any]:
    evict = {"policy": "kvzip", "budget": 0.4, "sinks": 3, "chunk": CHUNK} | more
    return {"kv": {"evict": evict}}


def alone(bench: Bench, prompt: list[int], plan: dict[str, Any], **more: Any) -> Seen:
    return bench.alone(prompt, NEW, plan, lead_ins=SAID, **more)


# The rule ----------------------------------------------------------------------------------------------------------


def spoken(prompt: list[int]) -> list[list[int]]:
    """What the model reads behind the prompt, part by part."""
    parts = [[*SAID[0], *SAID[2], *prompt[:CHUNK]]]
    for start in range(CHUNK, len(prompt), CHUNK):
        parts.append([*SAID[1], *prompt[start - 8 : start], *SAID[2], *prompt[start : start + CHUNK]])
    return parts


def scores_of(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """[layers, kv_heads, prompt]: the most that any row behind the prompt pays to a token, in any head of the group."""
    layers, heads, kv_heads = 3, 4, 2
    best = torch.zeros(layers, kv_heads, len(prompt))
    for part in spoken(prompt):
        text = [*prompt, *part]
        paid = run_masked(model, text, causal(layers, kv_heads, len(text))).attention
        for layer in range(layers):
            for head in range(heads):
                lane = best[layer, head * kv_heads // heads]
                lane.copy_(torch.maximum(lane, paid[layer, head, len(prompt) :, : len(prompt)].amax(0)))
    return best


def survivors(scores: Tensor, budget: int, sinks: int) -> list[list[set[int]]]:
    """The sinks of every lane, and then the best of all lanes together."""
    layers, heads, tokens = scores.shape
    kept = [[set(range(sinks)) for _ in range(heads)] for _ in range(layers)]
    rest = [
        (-float(scores[i, j, k]), k, i, j) for i in range(layers) for j in range(heads) for k in range(sinks, tokens)
    ]
    for _, token, layer, head in sorted(rest)[: (budget - sinks) * layers * heads]:
        kept[layer][head].add(token)
    return kept


@pytest.mark.parametrize("length", [50, 64, 150])  # less than a part, one part, three
def test_keeps_what_repeating_the_prompt_takes(tiny: Decoder, length: int) -> None:
    model = random_model("llama", max_position_embeddings=1024)
    prompt = prompt_of(length, 5)
    bench = Bench(tiny, prefix_caching=False)
    seen = alone(bench, prompt, kvzip())
    budget = int(length * 0.4)
    wanted = survivors(scores_of(model, prompt), budget, 3)
    (kept,) = seen.kept.values()
    held = [[set(lane[lane >= 0].tolist()) for lane in layer] for layer in kept]
    assert held == wanted
    assert len({len(lane) for layer in held for lane in layer}) > 1
    assert sum(len(lane) for layer in held for lane in layer) == budget * 6
    # And it goes on from there, as if what was repeated had never been read.
    text = [*prompt, *seen.tokens[:-1]]
    run = run_masked(model, text, hide_evicted(causal(3, 2, len(text)), seen.kept))
    rows = sorted(seen.logits)
    assert rows == list(range(length, length + NEW))
    wanted_logits = run.logits[[at - 1 for at in rows]]
    torch.testing.assert_close(torch.stack([seen.logits[at] for at in rows]), wanted_logits, atol=1e-3, rtol=0)
    assert bench.held_pages == 0


def test_a_budget_of_everything_repeats_nothing(tiny: Decoder) -> None:
    bench = Bench(tiny)
    wanted = alone(bench, prompt_of(90), {})
    assert_same(alone(bench, prompt_of(90), kvzip(budget=1.0)), wanted)
    assert sum(count for batch in bench.batches for _, count in batch) < 2 * (90 + NEW) + 1


# In company --------------------------------------------------------------------------------------------------------

PLANS: list[dict[str, Any]] = [
    kvzip(),
    {"kv": kvzip(budget=30)["kv"] | {"format": "int4", "residual": 0}},
    kvzip(budget=0.7, merge={"policy": "kv_merging"}),
    {"kv": kvzip()["kv"] | {"read": {"policy": "quest", "tokens": 16, "dense_layers": 0}}},
    {},
    {"kv": {"evict": {"policy": "h2o", "budget": 0.5, "during": "both", "interval": 4}}},
]


@pytest.mark.parametrize("kind", ["chunks", "preempted", "short of pages", "prefix hits"])
def test_in_company(tiny: Decoder, kind: str) -> None:
    prompts = [prompt_of(48, 1) + prompt_of(30 + 25 * i, i) for i in range(len(PLANS))]
    wanted = [
        alone(Bench(tiny, max_step_tokens=1024, prefix_caching=False), prompt, plan)
        for prompt, plan in zip(prompts, PLANS, strict=True)
    ]
    pages = pages_for(tiny, 330) if kind == "short of pages" else 1 << 15
    bench = Bench(tiny, pages, max_step_tokens=23 if kind == "chunks" else 200, prefix_caching=kind == "prefix hits")
    dice = random.Random(1)

    def disturb() -> None:
        bench.engine.check_integrity()
        if kind == "preempted" and bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    for _ in range(1 + (kind == "prefix hits")):
        bench.seen.clear()
        for i, (prompt, plan) in enumerate(zip(prompts, PLANS, strict=True)):
            speculative = {"method": "prompt_lookup"} if i % 2 == 0 else {}
            bench.submit(str(i), prompt, NEW, plan, speculative=speculative, lead_ins=SAID, n=1 + i % 3)
        bench.run(disturb)
    for i, alone_ in enumerate(wanted):
        for index in range(1 + i % 3):
            assert_same(bench.seen[str(i), index], alone_)
            assert bench.seen[str(i), index].last.compression == alone_.last.compression
    assert kind != "preempted" or bench.engine.stats.preemptions_total > 3
    assert bench.held_pages == 0
    if kind == "prefix hits":
        assert all(seen.last.cached_tokens >= 64 for (name, _), seen in bench.seen.items() if name != "5")


def test_others_decode_while_a_prompt_is_repeated(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=20)
    bench.submit("a", prompt_of(8), 40)
    bench.step()
    bench.submit("b", prompt_of(100), 2, kvzip(), lead_ins=SAID)
    while ("b", 0) not in bench.seen or not bench.seen["b", 0].tokens:
        before = len(bench.seen["a", 0].tokens)
        bench.step()
        assert len(bench.seen["a", 0].tokens) == before + 1
    assert len(bench.batches) > 10
    bench.run()


def test_an_abort_amid_a_recital_gives_everything_back(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=40, prefix_caching=False)
    bench.submit("a", prompt_of(100), 5, kvzip(), lead_ins=SAID, n=2)
    while bench.engine.is_idle or bench.sequence("a").reciting is None or not bench.sequence("a").reciting.done:
        bench.step()
    bench.engine.abort("a")
    assert bench.engine.is_idle and bench.held_pages == 0
    bench.engine.check_integrity()


# Parts and refusals ------------------------------------------------------------------------------------------------


def evict_of(plan: dict[str, Any]) -> Any:
    return Plan.parse(plan).evict


def test_parts() -> None:
    prompt = np.arange(10, 160, dtype=np.int32)
    parts = parts_of(evict_of(kvzip()), prompt, SAID, 10_000)
    assert [part.tolist() for part in parts] == spoken(prompt.tolist())
    assert [len(part) for part in parts_of(evict_of(kvzip()), prompt, [], 10_000)] == [64, 8 + 64, 8 + 22]
    # Where the context leaves less room, parts are shorter.
    assert [len(part) for part in parts_of(evict_of(kvzip(chunk=150)), prompt, SAID, 90)] == [3 + 1 + 79, 10 + 1 + 71]
    assert parts_of(evict_of({"kv": {"evict": {"policy": "knorm", "budget": 0.5}}}), prompt, SAID, 90) == []


@pytest.mark.parametrize(("length", "fits"), [(940, True), (960, False), (10, True)])
def test_a_prompt_that_leaves_no_room(tiny: Decoder, length: int, fits: bool) -> None:
    """The model reads 1024 tokens: at least 64 of the prompt must fit behind it."""
    bench = Bench(tiny)
    if fits:
        assert len(bench.alone(prompt_of(length), 2, kvzip(chunk=2048), lead_ins=SAID).tokens) == 2
        return
    with pytest.raises(PromptTooLong, match="leaves no room") as error:
        bench.submit("a", prompt_of(length), 2, kvzip(chunk=2048), lead_ins=SAID)
    assert error.value.param == "compression.kv.evict.policy"


@pytest.mark.parametrize(
    ("knobs", "at"),
    [({"during": "both"}, "during"), ({"chunk": 63}, "chunk"), ({"head_budget": "adaptive"}, "head_budget")],
)
def test_refusals(knobs: dict[str, Any], at: str) -> None:
    with pytest.raises(RequestError) as error:
        Plan.parse(kvzip(**knobs))
    assert error.value.param == f"compression.kv.evict.{at}"


def test_lead_ins_of_the_default_model() -> None:
    tokenizer = load_tokenizer("default")
    first, later, turn = (tokenizer.decode(part, skip_special_tokens=False) for part in lead_ins(tokenizer))
    assert first == "\n\nRepeat the previous context exactly."
    assert later.endswith("starting with")
    assert turn == "<|im_end|>\n<|im_start|>assistant\n"
