"""How far a distribution of the next token is from the uncompressed model's, and a mean with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Whole:
    """All probabilities before each token of a text."""

    logprobs: Floats
    """[tokens, vocab]"""
    text: NDArray[np.int64]
    """[tokens] what the text says"""


@dataclass(frozen=True)
class Few:
    """The likeliest tokens before each token of a text, as a server tells them."""

    top: tuple[dict[str, float], ...]
    """Token to logprob"""
    true: Floats
    """[tokens] logprobs of what the text says"""


Foretold = Whole | Few


@dataclass(frozen=True)
class Distance:
    """Means over the tokens of a text."""

    kl: float
    """Nats, from the uncompressed model to the other; from `Few` probabilities it is a lower bound, since what neither
    tells is one bin to it"""
    agreement: float
    """Share of tokens before which both find the same one likeliest"""
    loss: float
    """Nats, of the other on what the text says"""


def distance(exact: Foretold, other: Foretold) -> Distance:
    """How far `other` is from `exact`, on the same text."""
    if isinstance(exact, Whole) and isinstance(other, Whole):
        return _of_whole(exact, other)
    if isinstance(exact, Few) and isinstance(other, Few):
        return _of_few(exact, other)
    raise TypeError("probabilities of two kinds cannot be compared")


def loss_of_last(told: Foretold, tokens: int) -> float:
    """Nats for each of the text's last tokens."""
    true = told.logprobs[np.arange(len(told.text)), told.text] if isinstance(told, Whole) else told.true
    return float(-true[-tokens:].mean(dtype=np.float64))


def _of_whole(exact: Whole, other: Whole) -> Distance:
    p, q = exact.logprobs, other.logprobs
    kl = np.sum(np.exp(p) * (p - q), axis=1, dtype=np.float64)
    agreement = p.argmax(1) == q.argmax(1)
    loss = -q[np.arange(len(q)), other.text]
    return Distance(float(kl.mean()), float(agreement.mean()), float(loss.mean(dtype=np.float64)))


def _of_few(exact: Few, other: Few) -> Distance:
    kl = [_coarse_kl(p, q) for p, q in zip(exact.top, other.top, strict=True)]
    agreement = [_likeliest(p) == _likeliest(q) for p, q in zip(exact.top, other.top, strict=True)]
    return Distance(float(np.mean(kl)), float(np.mean(agreement)), float(-other.true.mean(dtype=np.float64)))


def _likeliest(logprobs: dict[str, float]) -> str:
    return max(logprobs, key=logprobs.__getitem__)


def _coarse_kl(p: dict[str, float], q: dict[str, float]) -> float:
    """KL over the tokens that both tell and one bin for all others: never more than over all tokens."""
    shared = [(p[token], q[token]) for token in p if token in q]
    total = sum(math.exp(a) * (a - b) for a, b in shared)
    rest_p = 1 - sum(math.exp(a) for a, _ in shared)
    rest_q = 1 - sum(math.exp(b) for _, b in shared)
    if rest_p > 1e-9 and rest_q > 1e-9:
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)


def log_softmax(logits: Floats) -> Floats:
    """[tokens, vocab], in float64 where sums are long."""
    peak = logits.max(1, keepdims=True)
    total = np.log(np.sum(np.exp(logits - peak), axis=1, keepdims=True, dtype=np.float64))
    return (logits - (peak + total)).astype(np.float32)


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; the error of a single value is not known."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
        return cls(float(np.mean(values)), error)
