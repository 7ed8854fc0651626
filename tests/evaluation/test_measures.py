"""Distances between distributions, against plain sums; means and their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from winnow.engine.evaluation.measures import Few, Mean, Whole, distance, log_softmax


def random_whole(seed: int, tokens: int = 5, vocab: int = 30) -> Whole:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (tokens, vocab)).astype(np.float32)
    return Whole(log_softmax(logits), np.arange(tokens) * 3 % vocab)


def few_of(whole: Whole, count: int) -> Few:
    """The `count` likeliest of each distribution, as a server would tell them."""
    top = []
    for row in whole.logprobs:
        best = sorted(range(len(row)), key=lambda token: -row[token])[:count]
        top.append({f"<{token}>": float(row[token]) for token in best})
    return Few(tuple(top), whole.logprobs[np.arange(len(whole.text)), whole.text])


def test_whole_distributions() -> None:
    p, q = random_whole(1), random_whole(2)
    kl = agreement = loss = 0.0
    for a, b, true in zip(p.logprobs.tolist(), q.logprobs.tolist(), p.text.tolist(), strict=True):
        assert sum(map(math.exp, a)) == pytest.approx(1, abs=1e-5)
        kl += sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True)) / 5
        agreement += (a.index(max(a)) == b.index(max(b))) / 5
        loss -= b[true] / 5
    far = distance(p, q)
    assert (far.kl, far.agreement, far.loss) == (pytest.approx(kl), pytest.approx(agreement), pytest.approx(loss))
    same = distance(p, p)
    assert (same.kl, same.agreement) == (0, 1)


@pytest.mark.parametrize("count", [1, 5, 20, 30])
def test_few_probabilities_never_say_more_than_all(count: int) -> None:
    for seed in range(20):
        p, q = random_whole(seed), random_whole(seed + 100)
        exact, told = distance(p, q), distance(few_of(p, count), few_of(q, count))
        assert 0 <= told.kl <= exact.kl + 1e-6
        assert told.agreement == exact.agreement
        assert told.loss == pytest.approx(exact.loss)
        assert distance(few_of(p, count), few_of(p, count)).kl == pytest.approx(0, abs=1e-6)
        if count == 30:
            assert told.kl == pytest.approx(exact.kl, rel=1e-4)


def test_two_kinds_are_not_compared() -> None:
    whole = random_whole(1)
    with pytest.raises(TypeError):
        distance(whole, few_of(whole, 3))


def test_means() -> None:
    assert Mean.of([3.0]) == Mean(3.0, None)
    mean = Mean.of([1.0, 2.0, 6.0])
    assert mean.value == 3.0
    assert mean.error == pytest.approx(math.sqrt(((2**2 + 1 + 3**2) / 2) / 3))
