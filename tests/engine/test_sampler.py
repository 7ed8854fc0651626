"""The sampler against one that does a row at a time in plain Python, and against the odds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from winnow.engine.messages import SamplingParams
from winnow.engine.sampler import Sampled, Sampler
from winnow.engine.sampling import SamplingTable

VOCAB = 1003  # neither a multiple of a vector nor of a block


def run(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int] | None = None,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    few: int = 128,
) -> Sampled:
    table = SamplingTable(len(params), logits.shape[1])
    for slot, each in enumerate(params):
        table.admit(slot, each, slot if seeds is None else seeds[slot], prompt, output)
    return Sampler(few).sample(logits, table.batch(np.arange(len(params))))


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# One row at a time --------------------------------------------------------------------------------------------------


def distribution(
    row: list[float], params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> list[float]:
    """What each token's probability is, by the definitions; a one for the likeliest where greedy."""
    scores = [score + params.logit_bias.get(token, 0.0) for token, score in enumerate(row)]
    for token in {*prompt, *output}:
        scores[token] *= params.repetition_penalty ** (-1 if scores[token] > 0 else 1)
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if len(output) < params.min_tokens:
        for token in params.stop_token_ids:
            scores[token] = -math.inf
    peak = max(scores)
    if params.temperature == 0:
        return [float(token == scores.index(peak)) for token in range(len(scores))]
    weights = [math.exp((score - peak) / params.temperature) for score in scores]
    total = math.fsum(weights)
    p = [weight / total for weight in weights]
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    order = [token for token in order if p[token] >= params.min_p * max(p)]
    order = order[: params.top_k or None]
    if params.top_p < 1:
        wanted, before = params.top_p * math.fsum(p[token] for token in order), 0.0
        nucleus: list[int] = []
        for token in order:
            if nucleus and before >= wanted:
                break
            nucleus.append(token)
            before += p[token]
        order = nucleus
    stays = set(order)
    return [weight if token in stays else 0.0 for token, weight in enumerate(p)]


def draw(p: list[float], uniform: float) -> int:
    target, so_far = uniform * math.fsum(p), 0.0
    for token, weight in enumerate(p):
        so_far += weight
        if so_far > target:
            return token
    raise AssertionError


MIX = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=5.0),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.5, temperature=3.0),  # hundreds of tokens
    SamplingParams(top_p=0.999, temperature=2.0),
    SamplingParams(top_k=1),
    SamplingParams(top_k=40),
    SamplingParams(top_k=127, temperature=4.0),
    SamplingParams(top_k=128, temperature=4.0),  # as many as are looked at first
    SamplingParams(top_k=700, temperature=4.0),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=0.001, temperature=6.0),
    SamplingParams(min_p=0.02, top_k=30, top_p=0.8, temperature=1.5),
    SamplingParams(top_k=500, top_p=0.7, temperature=4.0),
    SamplingParams(repetition_penalty=1.3, temperature=0),
    SamplingParams(repetition_penalty=0.8, top_p=0.9),
    SamplingParams(presence_penalty=1.5, frequency_penalty=0.5),
    SamplingParams(logit_bias={3: 100.0}),
    SamplingParams(logit_bias={3: 5.0, 900: -100.0, 17: 4.0}, top_k=5),
    SamplingParams(min_tokens=9, stop_token_ids=(0, 4, 8, 15, 900)),
    SamplingParams(min_tokens=9, stop_token_ids=(0, 4, 8, 15, 900), temperature=0, logit_bias={4: 100.0}),
    SamplingParams(
        temperature=0.7,
        top_p=0.95,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        logit_bias={1: 2.0},
    ),
]
PROMPT = [5, 6, 7, 5, 900]
OUTPUT = [7, 8, 8, 8, 17, 3]


@pytest.mark.parametrize("round_", range(3))
def test_is_the_one_row_sampler(round_: int) -> None:
    logits = random_logits(len(MIX), seed=round_)
    logits[:, :20] += 6
    before = logits.clone()
    seeds = [1000 * round_ + row for row in range(len(MIX))]
    sampled = run(logits, MIX, seeds, PROMPT, OUTPUT)
    assert torch.equal(logits, before), "the logits are left as they are"
    assert not sampled.bad.any()
    assert sampled.logprobs == {}
    table = SamplingTable(len(MIX), VOCAB)
    for slot, params in enumerate(MIX):
        table.admit(slot, params, seeds[slot], PROMPT, OUTPUT)
    uniform = table.batch(np.arange(len(MIX))).uniform.tolist()
    for row, params in enumerate(MIX):
        p = distribution(logits[row].tolist(), params, PROMPT, OUTPUT)
        assert sampled.tokens[row] == draw(p, uniform[row]), params


@pytest.mark.parametrize("few", [1, 2, 64, 2000])
def test_looking_at_a_few_tokens_first_changes_nothing(few: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for scale in (0.0, 0.1, 1.0, 20.0):  # from all tokens equal to nearly all zero
        logits = random_logits(len(MIX), seed=2, scale=scale)
        coarse = (logits * 4).round() / 4  # many equal ones
        for each in (logits, coarse):
            seeds = torch.randint(2**62, (len(MIX),), generator=generator).tolist()
            every = run(each, MIX, seeds, PROMPT, OUTPUT, few=2000)
            assert run(each, MIX, seeds, PROMPT, OUTPUT, few=few).tokens.tolist() == every.tokens.tolist()


def test_rows_do_not_depend_on_their_mates() -> None:
    """Bitwise: tokens and logprobs of a row are the same alone, in any batch, at any place."""
    params = [SamplingParams(logprobs=4, **{f: getattr(p, f) for f in FIELDS}) for p in MIX for _ in range(2)]
    logits = random_logits(len(params), seed=5)
    logits[:, :20] += 6
    seeds = list(range(len(params)))
    together = run(logits, params, seeds, PROMPT, OUTPUT)
    assert len(together.logprobs) == len(params)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 1, 1, 2, 3, 7, 20, len(params)):
        rows = torch.randperm(len(params), generator=generator)[:size].tolist()
        some = run(logits[rows], [params[r] for r in rows], [seeds[r] for r in rows], PROMPT, OUTPUT)
        assert some.tokens.tolist() == together.tokens[rows].tolist()
        assert [some.logprobs[i] for i in range(size)] == [together.logprobs[r] for r in rows]


FIELDS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "stop_token_ids",
]


def test_rows_of_a_large_vocabulary_do_not_depend_on_their_mates() -> None:
    """Large enough for torch to split a single row among its threads."""
    params = [SamplingParams(logprobs=1), SamplingParams(temperature=2.0, top_p=0.9, logprobs=1)] * 3
    logits = random_logits(6, vocab=70_001)
    together = run(logits, params)
    for row, each in enumerate(params):
        alone = run(logits[row : row + 1], [each], [row])
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0] == together.logprobs[row]


# The odds -----------------------------------------------------------------------------------------------------------

CHI_SQUARE_999 = {4: 18.47, 9: 27.88, 49: 85.35}  # degrees of freedom: the value that 1 in 1000 exceeds


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(top_k=10), SamplingParams(min_p=1e-9, temperature=1.0), SamplingParams(top_k=5)],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    draws, vocab = 6000, 50
    row = random_logits(1, vocab, seed=4, scale=0.7)
    p = np.array(distribution(row[0].tolist(), params))
    p /= p.sum()
    # One seed, many steps, and as many seeds at one step.
    for by_step in (True, False):
        table = SamplingTable(draws, vocab)
        for i in range(draws):
            table.admit(i, params, 99 if by_step else i, [], [0] * i if by_step and i < 3 else [])
        if by_step:
            table._step[:] = np.arange(draws)
        tokens = Sampler().sample(row.expand(draws, vocab).contiguous(), table.batch(np.arange(draws))).tokens
        counts = np.bincount(tokens, minlength=vocab)
        assert not counts[p == 0].any()
        expected = p[p > 0] * draws
        statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
        assert statistic < CHI_SQUARE_999[len(expected) - 1]


# Odd ends -----------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [70, 400, 1002]] = 1.0
    logits[2, 1002] = 1.0
    for params in (SamplingParams(temperature=0), SamplingParams(top_k=1), SamplingParams(temperature=1e-6)):
        assert run(logits, [params] * 3).tokens.tolist() == [0, 70, 1002]


def test_filters_leave_at_least_the_likeliest() -> None:
    logits = random_logits(3)
    likeliest = logits.argmax(1).tolist()
    for params in (
        SamplingParams(top_p=0.0),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=1, top_p=1e-9, min_p=1.0),
    ):
        assert run(logits, [params] * 3).tokens.tolist() == likeliest


def test_equal_tokens_are_cut_by_id() -> None:
    flat = torch.zeros(200, VOCAB)
    seeds = list(range(200))
    assert set(run(flat, [SamplingParams(top_k=3)] * 200, seeds).tokens.tolist()) == {0, 1, 2}
    assert run(flat, [SamplingParams(top_p=0.01)] * 200, seeds).tokens.max() == 10  # 10 tokens have less than 0.01
    assert run(flat, [SamplingParams(min_p=1.0)] * 200, seeds).tokens.max() > 900  # all are as likely as the likeliest


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1.0, 1e6])
def test_extreme_temperatures_and_logits(temperature: float) -> None:
    logits = random_logits(4, scale=1e4)
    params = [
        SamplingParams(temperature=temperature, **knobs)
        for knobs in ({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1})
    ]
    sampled = run(logits, params)
    assert not sampled.bad.any()
    assert ((sampled.tokens >= 0) & (sampled.tokens < VOCAB)).all()
    if temperature < 1:
        assert sampled.tokens.tolist() == logits.argmax(1).tolist()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((500, VOCAB), -torch.inf)
    logits[:, [3, 999]] = 0.0
    for params in (SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(top_k=20), SamplingParams(min_p=0.0)):
        assert set(run(logits, [params] * 500).tokens.tolist()) == {3, 999}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 500, VOCAB - 1])
def test_a_bad_row_harms_no_other(value: float, where: int) -> None:
    params = [SamplingParams(logprobs=2, **{f: getattr(p, f) for f in FIELDS}) for p in MIX]
    logits = random_logits(len(params), seed=6)
    good = run(logits, params)
    logits[::2, where] = value
    sampled = run(logits, params)
    assert sampled.bad.tolist() == [row % 2 == 0 for row in range(len(params))]
    assert sampled.tokens[1::2].tolist() == good.tokens[1::2].tolist()
    assert {row: good.logprobs[row] for row in range(1, len(params), 2)} == sampled.logprobs


def test_rows_without_a_possible_token_are_bad() -> None:
    logits = torch.zeros(2, 3)
    ban = SamplingParams(min_tokens=1, stop_token_ids=(0, 1, 2))
    assert run(logits, [ban, SamplingParams()]).bad.tolist() == [True, False]
    assert run(torch.full((1, 3), -torch.inf), [SamplingParams(temperature=0)]).bad.tolist() == [True]


def test_a_single_token_vocabulary() -> None:
    assert run(torch.zeros(2, 1), [SamplingParams(logprobs=5), SamplingParams(top_p=0.5)]).tokens.tolist() == [0, 0]


# Logprobs -----------------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(4, seed=8)
    params = [
        SamplingParams(temperature=0.2, logprobs=0, top_k=3),
        SamplingParams(temperature=0, logit_bias={31: 100.0}, logprobs=2),
        SamplingParams(),
        SamplingParams(temperature=3.0, logprobs=20, repetition_penalty=2.0),
    ]
    sampled = run(logits, params, prompt=PROMPT)
    assert set(sampled.logprobs) == {0, 1, 3}
    assert sampled.tokens[1] == 31
    raw = logits.double().log_softmax(1)
    for row, count in ((0, 0), (1, 2), (3, 20)):
        got, token = sampled.logprobs[row], int(sampled.tokens[row])
        assert got.logprob == pytest.approx(raw[row, token].item(), abs=1e-5)
        assert got.rank == 1 + int((raw[row] > raw[row, token]).sum())
        order = raw[row].argsort(descending=True)[:count].tolist()
        assert [token for token, _ in got.top] == order
        assert [logprob for _, logprob in got.top] == pytest.approx(raw[row, order].tolist(), abs=1e-5)


def test_top_logprobs_of_equal_tokens_come_by_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[1, [900, 30, 50]] = torch.tensor([2.0, 1.0, 1.0])
    sampled = run(logits, [SamplingParams(temperature=0, logprobs=4)] * 2)
    assert [token for token, _ in sampled.logprobs[0].top] == [0, 1, 2, 3]
    assert [token for token, _ in sampled.logprobs[1].top] == [900, 30, 50, 0]
    assert sampled.logprobs[0].rank == 1
    many = run(logits[:, :5], [SamplingParams(temperature=0, logprobs=20)] * 2)
    assert len(many.logprobs[0].top) == 5  # no more than there are
