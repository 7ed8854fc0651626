"""Generated tokens that read a part: against dense runs of transformers that see what the papers' rules choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from winnow.engine.compression.registry import READ, read_policy
from winnow.engine.errors import PlanNotSupported, PromptTooLong
from winnow.engine.messages import CompressionReport
from winnow.engine.models.decoder import Decoder

from ..compression.read_oracles import READ_ORACLES, Look
from ..models.checkpoints import prompt_of, random_model
from ..models.reference import default_reference
from .bench import Bench, assert_same, pages_beside, pages_for
from .masked import causal, run_masked
from .texts import tokens_of_text

NEW = 14
PAPER = {"sinks": 0, "recent": 1}
"""Knobs of the papers that protect no tokens"""


def read(policy: str, **knobs: Any) -> dict[str, Any]:
    return {"kv": {"read": {"policy": policy, **knobs}}}


def logits_by_oracle(
    model: PreTrainedModel, bench: Bench, tokens: Sequence[int], prompt: int, policy: str
) -> tuple[Tensor, float]:
    """Logits of a dense run whose tokens after the prompt see what the oracle says, and what part of all that is."""
    config, (oracle, knobs) = bench.engine.config, READ_ORACLES[policy]
    if policy in bench.engine.profiles:
        knobs = knobs | {"profile": bench.engine.profiles[policy]}
    memory: dict[Any, Any] = {}
    visible = causal(config.layers, config.kv_heads, len(tokens))

    def look(layer: int, q: Tensor, keys: Tensor) -> None:
        for token in range(prompt, len(tokens)):
            at = Look(layer, config.layers, token, q[:, token].double(), keys[:, : token + 1].double(), memory)
            for head, chosen in enumerate(oracle(at, **knobs)):
                visible[layer, head, token] = False
                visible[layer, head, token, sorted(chosen)] = True

    logits = run_masked(model, tokens, visible, look).logits
    after = visible[:, :, prompt:]
    return logits, float(after.sum() / causal(config.layers, config.kv_heads, len(tokens))[:, :, prompt:].sum())


def check_against_oracle(bench: Bench, model: PreTrainedModel, prompt: list[int], policy: str, new: int = NEW) -> None:
    seen = bench.alone(prompt, new, read(policy, **(PAPER | READ_ORACLES[policy][1])))
    logits, part = logits_by_oracle(model, bench, [*prompt, *seen.tokens[:-1]], len(prompt), policy)
    assert part < 0.8, "nearly everything was read"
    rows = sorted(seen.logits)
    assert rows == list(range(len(prompt), len(prompt) + new))
    wanted = logits[[at - 1 for at in rows]]
    torch.testing.assert_close(torch.stack([seen.logits[at] for at in rows]), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("policy", READ)
def test_reads_what_the_oracle_reads(tiny: Decoder, policy: str) -> None:
    check_against_oracle(
        Bench(tiny, max_step_tokens=64), random_model("llama", max_position_embeddings=1024), prompt_of(150, 8), policy
    )


@pytest.mark.parametrize("policy", READ)
def test_reads_what_the_oracle_reads_on_the_default_model(default_model: Decoder, policy: str) -> None:
    check_against_oracle(Bench(default_model), default_reference(), tokens_of_text(140, start=300), policy, new=6)


CHARGED = ("quest", "token_select")
"""Keep bounds of pages, or choices, from token to token"""

WHOLE: list[dict[str, Any]] = [
    *(read(policy, tokens=1.0) for policy in READ),
    *(read(policy, tokens=10_000, dense_layers=0) for policy in READ),
]


def test_a_plan_that_reads_everything_is_none(tiny: Decoder) -> None:
    bench = Bench(tiny, max_step_tokens=50)
    wanted = bench.alone(prompt_of(130), 30)
    for plan in WHOLE:
        seen = bench.alone(prompt_of(130), 30, plan)
        assert_same(seen, wanted)
        assert seen.logits.keys() == wanted.logits.keys()


def reported(bench: Bench, prompt: list[int], plan: dict[str, Any]) -> CompressionReport:
    report = bench.alone(prompt, NEW, plan).last.compression
    assert report is not None
    return report


@pytest.mark.parametrize("policy", READ)
def test_says_what_was_read(tiny: Decoder, policy: str) -> None:
    """Every byte is counted: keys and values of 6 lanes, and what was looked at to choose. Nothing is freed; pages
    stand for what is kept to choose by."""
    bench, prompt = Bench(tiny), prompt_of(330)
    knobs = {"tokens": 32, "sinks": 0, "recent": 1, "dense_layers": 0}
    plain, report = reported(bench, prompt, {}), reported(bench, prompt, read(policy, **knobs))
    assert (plain.tokens_read, plain.bytes_read, plain.bytes_read_dense) == (0, 0, 0)
    assert report.tokens_read == NEW - 1, "the first token comes from the prompt, which is read densely"
    assert report.bytes_uncompressed == plain.bytes_held
    beside = report.bytes_held - plain.bytes_held
    assert beside < 0.1 * plain.bytes_held and (beside > 0) is (policy in CHARGED)
    dim = bench.engine.config.head_dim
    dense = sum((-(-n // 16) * 16 + n) * dim * 4 for n in range(331, 330 + NEW)) * 6
    assert report.bytes_read_dense == dense
    # Of three layers tidal_decode reads two whole, and their keys twice; token_select scores all keys now and then.
    least, most = {"tidal_decode": (0.9, 1.3), "token_select": (0.3, 1.0)}.get(policy, (0.1, 0.8))
    assert least * dense < report.bytes_read < most * dense


@pytest.mark.parametrize("policy", [policy for policy in READ if not read_policy(policy).keeps_choices])
@pytest.mark.parametrize("fmt", [None, "bf16", "int8"])
def test_guesses_change_nothing(tiny: Decoder, policy: str, fmt: str | None) -> None:
    """A wrong guess may fill a page, which is then filled otherwise: nothing remembers the first time."""
    plan = read(policy, tokens=33, dense_layers=0)
    plan["kv"] |= {} if fmt is None else {"format": fmt, "residual": 8}
    bench, prompt = Bench(tiny), prompt_of(150, 4)
    wanted = bench.alone(prompt, 60, plan)
    bench.submit("a", prompt, 60, plan, speculative={"method": "prompt_lookup", "tokens": 6})
    guess_wrongly(bench)
    bench.run(bench.engine.check_integrity)
    seen = bench.seen["a", 0]
    assert seen.tokens == wanted.tokens
    assert seen.last.rejected_tokens > 50


def test_guesses_are_refused_where_a_token_reads_what_the_last_one_chose(tiny: Decoder) -> None:
    with pytest.raises(PlanNotSupported, match="under 'token_select'"):
        Bench(tiny).submit("a", [1, 2], plan=read("token_select"), speculative={"method": "prompt_lookup"})


def guess_wrongly(bench: Bench) -> None:
    """Each step reads guesses that do not come true."""
    speculator = bench.engine.speculator

    class Wrong:
        learns = False

        def propose(self, seqs: list[Any], most: list[int]) -> list[list[int]]:
            return [
                [(int(seq.tokens[seq.length - 1]) + 1) % 7 + 2] * count for seq, count in zip(seqs, most, strict=True)
            ]

    speculator._drafters["prompt_lookup"] = Wrong()  # type: ignore[assignment]


def test_what_a_part_was_read_for_is_not_cached(tiny: Decoder) -> None:
    """Keys and values of tokens that read a part are not those that others would compute."""
    bench, prompt = Bench(tiny), prompt_of(100, 3)
    answer = bench.alone(prompt, 40, read("quest", tokens=16, dense_layers=0))
    again = bench.alone([*prompt, *answer.tokens, 5, 6], 10)
    assert again.last.cached_tokens == 96
    assert_same(again, Bench(tiny, prefix_caching=False).alone([*prompt, *answer.tokens, 5, 6], 10))


@pytest.mark.parametrize("fmt", [{}, {"format": "int8", "residual": 8}], ids=["f32", "int8"])
@pytest.mark.parametrize("policy", CHARGED)
def test_pages_stand_for_what_is_kept_to_choose_by(tiny: Decoder, policy: str, fmt: dict[str, Any]) -> None:
    """To the byte, from the prompt's last row on: there is no step at which they might be missing."""
    bench = Bench(tiny, max_step_tokens=64)
    arena, plan = bench.engine.arena, read(policy, tokens=32)
    plan["kv"] |= fmt
    bench.submit("a", prompt_of(150), 150, plan)
    held = []
    while not bench.engine.is_idle:
        bench.step()
        bench.engine.check_integrity()
        if not bench.engine.is_idle and (seq := bench.sequence("a")).generated:
            state = arena.kv.reading.get(seq.slot)
            held.append(arena.ballast(seq.slot))
            if state is not None:
                assert held[-1] == -(-state.nbytes // arena.layout.page_bytes)
    assert 0 < held[0] <= held[-1]
    assert (held[0] < held[-1]) is (policy == "quest" and not fmt), "pages in int8 have no bounds"
    assert bench.engine.stats.pages_free + bench.engine.stats.pages_cached == arena.total


@pytest.mark.parametrize("policy", CHARGED)
def test_many_who_choose_share_a_small_arena(tiny: Decoder, policy: str) -> None:
    """Choices of one request, and requests that preempt each other: all say what they say alone."""
    plan, prompts = read(policy, tokens=32), [prompt_of(100 + 20 * i, i) for i in range(4)]
    wanted = [Bench(tiny).alone(prompt, 60, plan, n=2) for prompt in prompts]
    bench = Bench(tiny, pages_for(tiny, 220) + pages_beside(tiny, plan, 160, 220), prefix_caching=False)
    for i, prompt in enumerate(prompts):
        bench.submit(str(i), prompt, 60, plan, n=2)
    bench.run(bench.engine.check_integrity)
    assert bench.engine.stats.preemptions_total > 0
    for i, one in enumerate(wanted):
        assert bench.seen[str(i), 0].tokens == bench.seen[str(i), 1].tokens == one.tokens


@pytest.mark.parametrize("policy", READ)
def test_a_text_must_fit_with_what_is_kept_of_it(tiny: Decoder, policy: str) -> None:
    bench = Bench(tiny, pages_for(tiny, 160))
    bench.submit("plain", prompt_of(150), 10)
    if policy not in CHARGED:
        return bench.submit("a", prompt_of(150), 10, read(policy))
    with pytest.raises(PromptTooLong, match=f"what '{policy}' must know of them"):
        bench.submit("a", prompt_of(150), 10, read(policy))
