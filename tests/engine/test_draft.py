"""Guesses of a draft model: the same answers as without, one pass for each place of all guesses, pages given back."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from winnow.engine.errors import PlanNotSupported
from winnow.engine.messages import SamplingParams
from winnow.engine.models.decoder import Decoder
from winnow.engine.sampling import SamplingTable
from winnow.engine.scheduler import ScheduledBatch

from ..models.checkpoints import prompt_of
from .bench import Bench, Seen, assert_same, pages_for
from .drafts import first_layers
from .test_speculation import NEW, PLANS, accepted, assert_same_ends

DRAFT: dict[str, Any] = {"method": "draft", "tokens": 4}


def drafting_pages(bench: Bench) -> int:
    """Pages of the draft model that are neither free nor only its prefix cache's."""
    stats = bench.engine.stats
    return stats.draft_pages_total - stats.draft_pages_free


def watch(bench: Bench) -> list[list[int]]:
    """Fills in the rows of each sequence in each pass of the draft model."""
    assert bench.engine.draft is not None
    runner, passes = bench.engine.draft.engine.runner, []
    run = runner.run

    def watched(batch: ScheduledBatch, *unread: Any) -> Any:
        passes.append(batch.counts.tolist())
        return run(batch, *unread)

    runner.run = watched  # type: ignore[method-assign]
    bench.engine.draft._runner = runner
    return passes


# The same answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3])  # 3: the model itself, which knows what it will say unless a plan hides it
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_same_answer(tiny: Decoder, plan: dict[str, Any], temperature: float, layers: int) -> None:
    prompt, kv = prompt_of(120), {"kv": plan}
    wanted = Bench(tiny).alone(prompt, NEW, kv, temperature=temperature)
    bench = Bench(tiny, draft=first_layers(tiny, layers))
    seen = bench.alone(prompt, NEW, kv, temperature=temperature, speculative=DRAFT)
    assert_same_ends(seen, wanted)
    assert seen.last.accepted_tokens == accepted(bench)
    assert seen.last.rejected_tokens == bench.engine.stats.draft_tokens_total - accepted(bench)
    assert seen.last.accepted_tokens + seen.last.rejected_tokens > 30
    if not plan and layers == 3:
        assert seen.last.rejected_tokens == 0
        assert len(seen.outputs) == 1 + -(-(NEW - 1) // 5)
    assert drafting_pages(bench) == 0


KNOBS: dict[str, dict[str, Any]] = {
    "penalties": {"frequency_penalty": 1.5, "repetition_penalty": 1.3},
    "filters": {"temperature": 1.2, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
    "bias": {"logit_bias": {5: 4.0, 9: -100.0}, "temperature": 0.7, "logprobs": 3},
    "no end before": {"stop_token_ids": tuple(range(0, 160, 3)), "min_tokens": 9},
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_guesses_are_sampled_like_the_answer(tiny: Decoder, knobs: dict[str, Any]) -> None:
    """So the model itself guesses all of it right."""
    wanted = Bench(tiny).alone(prompt_of(40), 30, **knobs)
    seen = Bench(tiny, draft=tiny).alone(prompt_of(40), 30, speculative=DRAFT, **knobs)
    assert_same_ends(seen, wanted)
    assert seen.last.accepted_tokens >= 0.7 * (len(seen.tokens) - 1)
    assert seen.last.rejected_tokens <= (0 if len(seen.tokens) == 30 else DRAFT["tokens"])


def test_sampling_behind_a_guess_is_that_of_its_last_row() -> None:
    table = SamplingTable(4, 50)
    for slot in range(4):
        params = SamplingParams(temperature=slot / 2, repetition_penalty=1 + slot % 2, logit_bias={slot: 1.0})
        table.admit(slot, params, 5 + slot, [1, 2, 3], [slot, 4])
    slots = np.array([3, 0, 1])
    drafts = [np.array(draft, np.int32) for draft in ([7, 7], [], [4, 9, 2])]
    every, last = table.batch(slots, drafts), table.batch(slots, drafts, last_only=True)
    rows = np.array([2, 3, 7])
    for name in ("temperature", "top_p", "seed", "step", "uniform"):
        assert np.array_equal(getattr(every, name)[rows], getattr(last, name))
    assert every.edits is not None
    assert last.edits is not None
    assert last.edits.rows.tolist() == [0, 1, 2]
    for place, row in enumerate(rows):
        for part, owner in (("seen_token", "seen_row"), ("seen_count", "seen_row"), ("bias", "bias_row")):
            of_every, of_last = (
                getattr(edits, part)[getattr(edits, owner) == at]
                for edits, at in ((every.edits, row), (last.edits, place))
            )
            assert np.array_equal(of_every, of_last)


# In company --------------------------------------------------------------------------------------------------------


def ask_all(bench: Bench, guessing: bool) -> dict[tuple[str, int], Seen]:
    for i, plan in enumerate(PLANS.values()):
        speculative = DRAFT | {"tokens": 1 + i % 5} if guessing and i % 4 < 3 else {}
        bench.submit(
            str(i),
            prompt_of(32, 1) + prompt_of(20 + 13 * i, i),
            NEW,
            {"kv": plan},
            temperature=i % 2,
            n=1 + i % 3,
            speculative=speculative,
        )
    return bench.seen


@pytest.fixture(scope="module")
def plain(tiny: Decoder) -> dict[tuple[str, int], Seen]:
    bench = Bench(tiny)
    ask_all(bench, guessing=False)
    return bench.run()


@pytest.mark.parametrize("kind", ["chunks", "preempted", "short of draft pages", "short of pages", "nothing cached"])
def test_in_company(tiny: Decoder, plain: dict[tuple[str, int], Seen], kind: str) -> None:
    draft, dice = first_layers(tiny), random.Random(3)
    settings: dict[str, Any] = {"max_step_tokens": 100}
    if kind == "short of draft pages":
        settings["draft_pages"] = pages_for(draft, 400)
    elif kind == "short of pages":
        settings["pages"] = pages_for(tiny, 350)
    elif kind == "nothing cached":
        settings |= {"prefix_caching": False, "max_step_tokens": 32}
    bench = Bench(tiny, draft=draft, **settings)
    ask_all(bench, guessing=True)

    def disturb() -> None:
        bench.engine.check_integrity()
        if kind == "preempted" and bench.running and dice.random() < 0.3:
            bench.engine.scheduler.preempt(dice.choice(bench.running))

    bench.run(disturb)
    assert bench.seen.keys() == plain.keys()
    for choice, wanted in plain.items():
        assert_same(bench.seen[choice], wanted)
        assert bench.seen[choice].last.compression == wanted.last.compression
    assert accepted(bench) > 20
    assert bench.held_pages == drafting_pages(bench) == 0


def test_all_guess_in_one_pass_of_the_draft_model(tiny: Decoder) -> None:
    bench = Bench(tiny, draft=tiny)
    passes = watch(bench)
    for i in range(5):
        bench.submit(str(i), prompt_of(20 + i, i), 16, speculative=DRAFT)
    while len(bench.running) < 5 or not all(seq.is_decoding for seq in bench.running):
        bench.step()
    passes.clear()
    bench.step()
    assert passes[0] == [21 + i for i in range(5)]  # the prompts, and what was sampled behind each
    assert passes[1:] == [[1] * 5] * 3
    passes.clear()
    bench.step()
    # What was guessed last was not read then; it and the token behind it are known now.
    assert passes == [[2] * 5, *[[1] * 5] * 3]
    bench.run()


def test_a_long_text_is_caught_up_with_step_by_step(tiny: Decoder) -> None:
    bench = Bench(tiny, draft=tiny, max_step_tokens=32)
    passes = watch(bench)
    wanted = Bench(tiny).alone(prompt_of(200), 30)
    bench.submit("a", prompt_of(200), 30, speculative=DRAFT)
    bench.submit("b", prompt_of(90, 9), 30, speculative=DRAFT)
    bench.run()
    assert_same(bench.seen["a", 0], wanted)
    assert max(map(sum, passes)) == 32
    assert all(bench.seen[name, 0].last.accepted_tokens > 5 for name in "ab")


def test_choices_share_what_the_draft_model_read(tiny: Decoder) -> None:
    bench = Bench(tiny, draft=tiny)
    passes = watch(bench)
    bench.submit("a", prompt_of(100), 12, speculative=DRAFT, n=4, temperature=1.0)
    bench.run()
    first = next(rows for rows in passes if rows)
    assert sum(first) == 4 * 101  # all begin in one pass
    passes.clear()
    bench.submit("b", prompt_of(100), 12, speculative=DRAFT)
    bench.run()
    assert passes[0] == [101 - 96]


def test_texts_longer_than_the_draft_model_reads(tiny: Decoder) -> None:
    draft = first_layers(tiny)
    wanted = Bench(tiny).alone(prompt_of(100), 60)
    bench = Bench(tiny, draft=draft, draft_pages=pages_for(draft, 112))
    assert bench.engine.draft is not None
    assert bench.engine.draft.max_len == 112
    passes = watch(bench)
    assert_same(bench.alone(prompt_of(100), 60, speculative=DRAFT), wanted)
    assert passes
    assert accepted(bench) < 20
    assert_same(bench.alone(prompt_of(100), 60, speculative=DRAFT), wanted)
    assert drafting_pages(bench) == 0


def test_an_aborted_request_is_followed_no_longer(tiny: Decoder) -> None:
    bench = Bench(tiny, draft=tiny)
    bench.submit("a", prompt_of(50), 200, speculative=DRAFT)
    for _ in range(5):
        bench.step()
    assert drafting_pages(bench) > 0
    bench.engine.abort("a")
    assert not bench.engine.is_idle
    bench.step()
    assert drafting_pages(bench) == 0
    assert bench.engine.is_idle


def test_without_a_draft_model(tiny: Decoder) -> None:
    with pytest.raises(PlanNotSupported, match="--draft-model") as error:
        Bench(tiny).submit("a", prompt_of(9), speculative=DRAFT)
    assert error.value.param == "speculative.method"
