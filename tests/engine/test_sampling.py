"""What a step gathers of the running choices: parameters, counts, edits and random numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from winnow.engine.errors import RequestError
from winnow.engine.messages import SamplingParams
from winnow.engine.sampling import SamplingBatch, SamplingTable, TokenCounts, check_sampling, choice_seed

VOCAB = 100


def slots(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.int64)


def counted(counts: TokenCounts) -> dict[int, float]:
    return dict(zip(counts.tokens.tolist(), counts.counts.tolist(), strict=True))


def test_counts() -> None:
    counts = TokenCounts([5, 3, 5], [3, 9])
    assert counted(counts) == {3: 1, 5: 0, 9: 1}  # the prompt is known, but only output counts
    rng = np.random.default_rng(0)
    output = [3, 9, *rng.integers(0, 1000, 2000).tolist()]  # grows several times
    for token in output[2:]:
        counts.add(token)
    assert counted(counts) == {5: 0} | dict(Counter(output)) | ({5: output.count(5)} if 5 in output else {})
    empty = TokenCounts([])
    empty.add(7)
    assert counted(empty) == {7: 1}


def test_batch_gathers_by_slot() -> None:
    table = SamplingTable(4, VOCAB)
    table.admit(2, SamplingParams(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, logprobs=3), 2**64 - 1, [1])
    table.admit(0, SamplingParams(top_k=VOCAB), 11, [1], [4, 4])
    batch = table.batch(slots(2, 0))
    assert len(batch) == 2
    assert batch.temperature.tolist() == [0.5, 1.0]
    assert batch.top_p.tolist() == [0.9, 1.0]
    assert batch.top_k.tolist() == [7, 0]  # a limit that is none
    assert batch.min_p.tolist() == [0.1, 0.0]
    assert batch.seed.tolist() == [2**64 - 1, 11]
    assert batch.step.tolist() == [0, 2]
    assert batch.logprobs.tolist() == [3, -1]
    assert batch.edits is None
    table.record(slots(0, 2), slots(8, 9))
    assert table.batch(slots(2, 0)).step.tolist() == [1, 3]


def test_a_batch_does_not_change_afterwards() -> None:
    table = SamplingTable(1, VOCAB)
    table.admit(0, SamplingParams(frequency_penalty=1.0), 1, [1])
    batch = table.batch(slots(0))
    table.record(slots(0), slots(5))
    assert batch.step.tolist() == [0]
    assert batch.edits is not None
    assert batch.edits.seen_token.tolist() == []


def test_edits_are_those_of_the_rows_that_have_any() -> None:
    table = SamplingTable(5, VOCAB)
    table.admit(0, SamplingParams(), 0, [1, 2])
    table.admit(1, SamplingParams(repetition_penalty=1.5), 0, [6, 2, 6], [2])
    table.admit(2, SamplingParams(logit_bias={9: -1.0, 4: 2.0}, presence_penalty=0.5), 0, [7], [8, 8])
    table.admit(3, SamplingParams(min_tokens=2, stop_token_ids=(50, 3, 3, VOCAB)), 0, [1])
    edits = table.batch(slots(3, 0, 2, 1)).edits
    assert edits is not None
    assert edits.rows.tolist() == [0, 2, 3]
    assert (edits.bias_row.tolist(), edits.bias_token.tolist(), edits.bias.tolist()) == ([1, 1], [9, 4], [-1.0, 2.0])
    assert edits.seen_row.tolist() == [1, 2, 2]
    assert edits.seen_token.tolist() == [8, 2, 6]  # presence does not look at the prompt
    assert edits.seen_count.tolist() == [2, 1, 0]
    assert edits.repetition.tolist() == [1.0, 1.0, 1.5]
    assert edits.presence.tolist() == [0.0, 0.5, 0.0]
    assert (edits.banned_row.tolist(), edits.banned_token.tolist()) == ([0, 0], [3, 50])


def test_end_tokens_are_banned_until_there_are_enough() -> None:
    table = SamplingTable(2, VOCAB)
    table.admit(0, SamplingParams(min_tokens=2, stop_token_ids=(3,)), 0, [1])
    table.admit(1, SamplingParams(min_tokens=2, stop_token_ids=(3,), logit_bias={5: 1.0}), 0, [1])
    banned = []
    for _ in range(4):
        edits = table.batch(slots(0, 1)).edits
        assert edits is not None
        banned.append((edits.rows.tolist(), edits.banned_row.tolist()))
        table.record(slots(0, 1), slots(8, 8))
    # The first slot then has no edits at all.
    assert banned == [([0, 1], [0, 1]), ([0, 1], [0, 1]), ([1], []), ([1], [])]


def test_a_choice_that_returns_is_as_if_it_had_stayed() -> None:
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=3, stop_token_ids=(2,))
    stayed, returned = SamplingTable(1, VOCAB), SamplingTable(3, VOCAB)
    stayed.admit(0, params, 5, [1, 2, 3])
    output = [7, 3, 7, 9]
    for token in output:
        stayed.record(slots(0), slots(token))
    returned.admit(2, params, 5, [1, 2, 3], output)
    one, other = stayed.batch(slots(0)), returned.batch(slots(2))
    assert one.uniform == other.uniform
    assert one.edits is not None
    assert other.edits is not None
    for name in ("seen_token", "seen_count", "repetition", "frequency", "presence", "banned_token"):
        assert getattr(one.edits, name).tolist() == getattr(other.edits, name).tolist()


def test_a_slot_forgets() -> None:
    table = SamplingTable(1, VOCAB)
    table.admit(0, SamplingParams(logit_bias={1: 1.0}), 0, [1])
    table.release(0)
    assert table.batch(slots(0)).edits is None
    table.admit(0, SamplingParams(logit_bias={1: 1.0}), 0, [1])
    table.admit(0, SamplingParams(), 0, [1])
    assert table.batch(slots(0)).edits is None


def test_uniform_is_a_hash_of_seed_and_step() -> None:
    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    table = SamplingTable(4, VOCAB)
    seeds = [0, 1, 2**63, 2**64 - 1]
    for slot, seed in enumerate(seeds):
        table.admit(slot, SamplingParams(), seed, [1], [4] * slot)
    wanted = [
        (mix((mix((seed + gamma) % 2**64) + (step + 1) * gamma) % 2**64) >> 11) / 2**53
        for step, seed in enumerate(seeds)
    ]
    assert table.batch(slots(0, 1, 2, 3)).uniform.tolist() == wanted
    assert table.batch(slots(2)).uniform.tolist() == wanted[2:3]


def test_choices_draw_differently() -> None:
    seeds = [choice_seed(2**64 - 3, index) for index in range(100)]
    assert seeds[0] == 2**64 - 3
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(-1, 0) == 2**64 - 1


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("temperature", math.nan, None),
        ("temperature", -0.1, None),
        ("temperature", math.inf, None),
        ("top_p", 1.5, None),
        ("top_p", math.nan, None),
        ("top_k", -1, None),
        ("min_p", 2.0, None),
        ("repetition_penalty", 0.0, None),
        ("presence_penalty", math.inf, None),
        ("frequency_penalty", math.nan, None),
        ("min_tokens", -1, None),
        ("logprobs", -1, None),
        ("logit_bias", {3: math.inf}, "logit_bias.3"),
        ("logit_bias", {3: math.nan}, "logit_bias.3"),
        ("logit_bias", {VOCAB: 1.0}, "logit_bias.100"),
        ("logit_bias", {-1: 1.0}, "logit_bias.-1"),
    ],
)
def test_what_the_sampler_cannot_do_is_refused(field: str, value: Any, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        check_sampling(SamplingParams(**{field: value}), VOCAB)
    assert caught.value.param == (param or field)
    assert (param or field) in caught.value.message


def test_usual_parameters_pass() -> None:
    check_sampling(SamplingParams(), VOCAB)
    check_sampling(SamplingParams(temperature=0, top_p=0.0, top_k=10**9, logit_bias={0: -100, 99: 100}), VOCAB)


def test_rows_behind_a_guess_are_those_of_the_guess_recorded() -> None:
    """Rows of a batch with guesses are what batches without would be, had the guessed tokens been generated."""
    knobs: list[dict[str, Any]] = [
        {"frequency_penalty": 0.5, "min_tokens": 3, "stop_token_ids": (7,)},
        {},
        {"repetition_penalty": 1.2, "logit_bias": {4: 1.0}},
        {"min_tokens": 2, "stop_token_ids": (7, 8)},
    ]
    drafts = [np.array(draft, np.int32) for draft in ([5, 5, 9], [1], [], [3, 4])]

    def admitted() -> SamplingTable:
        table = SamplingTable(4, VOCAB)
        for slot, extra in enumerate(knobs):
            table.admit(slot, SamplingParams(temperature=0.5, **extra), slot, [5, 6], [9])
        return table

    together = admitted().batch(slots(0, 1, 2, 3), drafts)
    assert len(together) == 4 + 2 + 1 + 3
    row = 0
    for slot, draft in enumerate(drafts):
        table = admitted()
        for ahead in range(len(draft) + 1):
            alone = table.batch(slots(slot))
            assert together.step[row] == alone.step[0] == 1 + ahead
            assert together.uniform[row] == alone.uniform[0]
            assert edits_of(together, row) == edits_of(alone, 0)
            table.record(slots(slot), slots(*draft[ahead : ahead + 1])) if ahead < len(draft) else None
            row += 1


def edits_of(batch: SamplingBatch, row: int) -> dict[str, Any]:
    """What changes a row's logits; nothing where it has no edits or edits without effect."""
    edits = batch.edits
    if edits is None or row not in edits.rows:
        return {"bias": {}, "seen": {}, "banned": set()}
    at = int(np.flatnonzero(edits.rows == row)[0])
    penalties = (float(edits.repetition[at]), float(edits.presence[at]), float(edits.frequency[at]))
    seen = zip(edits.seen_token[edits.seen_row == at], edits.seen_count[edits.seen_row == at], strict=True)
    bias = zip(edits.bias_token[edits.bias_row == at], edits.bias[edits.bias_row == at], strict=True)
    return {
        "bias": {int(token): float(value) for token, value in bias},
        "seen": {int(token): (float(count), *penalties) for token, count in seen},
        "banned": set(edits.banned_token[edits.banned_row == at].tolist()),
    }
