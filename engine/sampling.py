"""Sampling parameters of the running sequences, as arrays that a step gathers by slot. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from winnow.engine.errors import RequestError
from winnow.engine.messages import SamplingParams

GREEDY_BELOW = 1e-5
"""A lower temperature takes the likeliest token, as in vLLM."""

GAMMA = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes of single logits, for those rows that have any.

    `*_row` index `rows`. No (row, token) pair stands twice in one of the three lists.
    """

    rows: NDArray[np.int64]
    """[E] rows of the batch, ascending"""
    bias_row: NDArray[np.int64]
    bias_token: NDArray[np.int64]
    bias: NDArray[np.float32]
    seen_row: NDArray[np.int64]
    seen_token: NDArray[np.int64]
    seen_count: NDArray[np.float32]
    """How often the token was generated; 0 if it is only in the prompt"""
    repetition: NDArray[np.float32]
    """[E], like the two below"""
    presence: NDArray[np.float32]
    frequency: NDArray[np.float32]
    banned_row: NDArray[np.int64]
    banned_token: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the rows of one step are sampled; row r belongs to logits row r."""

    temperature: NDArray[np.float32]
    top_p: NDArray[np.float64]
    top_k: NDArray[np.int64]
    """0: no limit"""
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    step: NDArray[np.int64]
    """Tokens that the row's choice has generated so far"""
    logprobs: NDArray[np.int64]
    """-1: none, 0: the chosen token's, n: also the n likeliest"""
    edits: Edits | None = None

    def __len__(self) -> int:
        return len(self.temperature)

    @property
    def drawn(self) -> NDArray[np.int64]:
        """Rows whose token is drawn; the others' is the likeliest."""
        return np.flatnonzero(self.temperature >= GREEDY_BELOW)

    @property
    def is_filtered(self) -> NDArray[np.bool_]:
        """[R] whether top_p, top_k or min_p leave tokens out."""
        return (self.top_p < 1) | (self.top_k > 0) | (self.min_p > 0)

    @property
    def asked(self) -> NDArray[np.int64]:
        """Rows that are to have logprobs."""
        return np.flatnonzero(self.logprobs >= 0)

    @property
    def uniform(self) -> NDArray[np.float64]:
        """[R] in [0, 1): a hash of each row's seed and step, so that nothing else decides what is drawn."""
        key = _mix(self.seed + np.uint64(GAMMA))
        bits = _mix(key + (self.step.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1 << 62),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
    "min_tokens": (0, 1 << 62),
}
"""What arithmetic can bear; the server's own bounds are narrower."""


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """RequestError, naming the field, for what the sampler cannot do."""
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(params, name) <= high:  # false for NaN too
            raise RequestError(name, f"{name} must be from {low} to {high}")
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size or not abs(bias) <= 1e3:
            path = f"logit_bias.{token}"
            raise RequestError(path, f"{path} must be from -1000 to 1000, for a token id below {vocab_size}")
    if params.logprobs is not None and params.logprobs < 0:
        raise RequestError("logprobs", "logprobs must not be negative")


def choice_seed(seed: int, index: int) -> int:
    """Seed of one of a request's `n` choices; the first has the request's own."""
    if index == 0:
        return seed & MASK
    return int(_mix(np.array([(seed + index * GAMMA) & MASK], dtype=np.uint64))[0])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., 2014); unsigned products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TokenCounts:
    """The distinct tokens of one sequence, and how often each was generated."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()):
        distinct = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._place = {token: place for place, token in enumerate(distinct.tolist())}
        self._tokens = distinct
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """Count a generated token."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            room = max(64, len(self._tokens))
            self._tokens = np.concatenate([self._tokens, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._tokens[place] = token
        self._counts[place] += 1

    def after(self, tokens: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """What `tokens` and `counts` would be if these had been generated too."""
        if not len(tokens):
            return self.tokens, self.counts
        distinct, places = np.unique(np.concatenate([self.tokens, tokens]), return_inverse=True)
        one_each = np.ones(len(tokens), dtype=np.float32)
        return distinct, np.bincount(places, np.concatenate([self.counts, one_each])).astype(np.float32)

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._place)]


@dataclass(slots=True)
class _Extra:
    """What single logits of one sequence are changed by."""

    bias_token: NDArray[np.int64]
    bias: NDArray[np.float32]
    stop_token: NDArray[np.int64]
    min_tokens: int
    repetition: float
    presence: float
    frequency: float
    counts: TokenCounts | None


class SamplingTable:
    """Sampling parameters and progress of all running choices, by slot."""

    def __init__(self, slots: int, vocab_size: int):
        self.vocab_size = vocab_size
        self._temperature = np.ones(slots, dtype=np.float32)
        self._top_p = np.ones(slots)
        self._top_k = np.zeros(slots, dtype=np.int64)
        self._min_p = np.zeros(slots)
        self._seed = np.zeros(slots, dtype=np.uint64)
        self._step = np.zeros(slots, dtype=np.int64)
        self._logprobs = np.full(slots, -1, dtype=np.int64)
        self._has_extra = np.zeros(slots, dtype=bool)
        self._extra: dict[int, _Extra] = {}

    def admit(
        self, slot: int, params: SamplingParams, seed: int, prompt: Sequence[int], output: Sequence[int] = ()
    ) -> None:
        """Take a choice in; `check_sampling` has passed. `output` is what it has generated already, if preempted."""
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._top_k[slot] = params.top_k if params.top_k < self.vocab_size else 0
        self._min_p[slot] = params.min_p
        self._seed[slot] = seed & MASK
        self._step[slot] = len(output)
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        extra = self._extra_of(params, prompt, output)
        self._has_extra[slot] = extra is not None
        self._extra.pop(slot, None)
        if extra is not None:
            self._extra[slot] = extra

    def release(self, slot: int) -> None:
        self._has_extra[slot] = False
        self._extra.pop(slot, None)

    def record(self, slots: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Note generated tokens, in order; a slot may have several."""
        np.add.at(self._step, slots, 1)
        for row in np.flatnonzero(self._has_extra[slots]):
            slot = int(slots[row])
            extra = self._extra[slot]
            if extra.counts is not None:
                extra.counts.add(int(tokens[row]))
            elif not len(extra.bias) and self._step[slot] >= extra.min_tokens:
                self._has_extra[slot] = False  # end tokens were its only edit

    def batch(
        self, slots: NDArray[np.int64], drafts: Sequence[NDArray[np.int32]] | None = None, last_only: bool = False
    ) -> SamplingBatch:
        """How to sample rows for these distinct slots: one for each, or, where there are drafts, one after each
        beginning of a slot's draft: the empty one first, the whole draft last, or that one only."""
        if drafts is None:
            rows, ahead = np.arange(len(slots)), np.zeros(len(slots), dtype=np.int64)
        elif last_only:
            rows, ahead = np.arange(len(slots)), np.array([len(draft) for draft in drafts], dtype=np.int64)
        else:
            sizes = np.array([len(draft) + 1 for draft in drafts])
            rows = np.repeat(np.arange(len(slots)), sizes)
            ahead = np.arange(len(rows)) - np.repeat(sizes.cumsum() - sizes, sizes)
        slots = slots[rows]
        step = self._step[slots] + ahead
        edits = None
        if self._has_extra[slots].any():
            edited = np.flatnonzero(self._has_extra[slots])
            nothing = np.zeros(0, dtype=np.int32)
            after = [nothing if drafts is None else drafts[rows[row]][: ahead[row]] for row in edited]
            edits = self._edits(edited, slots[edited], step[edited], after)
        return SamplingBatch(
            temperature=self._temperature[slots],
            top_p=self._top_p[slots],
            top_k=self._top_k[slots],
            min_p=self._min_p[slots],
            seed=self._seed[slots],
            step=step,
            logprobs=self._logprobs[slots],
            edits=edits,
        )

    def _extra_of(self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> _Extra | None:
        repeats = params.repetition_penalty != 1.0
        has_penalty = repeats or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        has_ban = params.min_tokens > len(output) and len(params.stop_token_ids) > 0
        if not (has_penalty or has_ban or params.logit_bias):
            return None
        # An end token beyond the vocabulary can never come up.
        stops = sorted({token for token in params.stop_token_ids if 0 <= token < self.vocab_size})
        return _Extra(
            bias_token=np.fromiter(params.logit_bias.keys(), dtype=np.int64),
            bias=np.fromiter(params.logit_bias.values(), dtype=np.float32),
            stop_token=np.array(stops, dtype=np.int64),
            min_tokens=params.min_tokens,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            # The prompt counts for the repetition penalty only.
            counts=TokenCounts(prompt if repeats else (), output) if has_penalty else None,
        )

    def _edits(
        self,
        rows: NDArray[np.int64],
        slots: NDArray[np.int64],
        steps: NDArray[np.int64],
        after: list[NDArray[np.int32]],
    ) -> Edits:
        """Of some rows of a batch; `after`: tokens that each row takes for generated beyond those recorded."""
        extras = [self._extra[slot] for slot in slots.tolist()]
        none = np.zeros(0, dtype=np.int64)
        bans = [
            extra.stop_token if step < extra.min_tokens else none
            for extra, step in zip(extras, steps.tolist(), strict=True)
        ]
        counted = [
            (none, np.zeros(0, dtype=np.float32)) if extra.counts is None else extra.counts.after(tokens)
            for extra, tokens in zip(extras, after, strict=True)
        ]
        seen = [tokens for tokens, _ in counted]
        return Edits(
            rows=rows,
            bias_row=_owner([extra.bias_token for extra in extras]),
            bias_token=np.concatenate([extra.bias_token for extra in extras]),
            bias=np.concatenate([extra.bias for extra in extras]),
            seen_row=_owner(seen),
            seen_token=np.concatenate(seen),
            seen_count=np.concatenate([counts for _, counts in counted]),
            repetition=np.array([extra.repetition for extra in extras], dtype=np.float32),
            presence=np.array([extra.presence for extra in extras], dtype=np.float32),
            frequency=np.array([extra.frequency for extra in extras], dtype=np.float32),
            banned_row=_owner(bans),
            banned_token=np.concatenate(bans),
        )


def _owner(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """For each entry of the concatenated parts, the number of its part."""
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])
