"""From logits to tokens: the whole batch at once, each row as if it were alone.

The order is vLLM's: logit bias, repetition, frequency and presence penalties, end tokens banned below `min_tokens`,
temperature, min_p, top_k, top_p. Logprobs are those of the raw logits, before any of it.

Where we depart from vLLM:
- top_k keeps exactly k tokens; equal logits are decided by the lower id.
- What is drawn is the inverse of the distribution function, in token order, at a hash of (seed, step). A row's token
  is therefore bitwise the same whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.messages import TokenLogprob
from winnow.engine.sampling import GREEDY_BELOW, Edits, SamplingBatch

BLOCK = 128
"""Probabilities are summed in blocks of this many first; the draw then looks into one block only."""

FEW = 128
"""As many of the likeliest tokens are looked at first; most filters are decided among them."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one sequence is to say after a step: one token, or several where guesses held."""

    tokens: list[int]
    is_bad: bool
    """The last token comes from logits that are NaN or infinite, and means nothing"""
    logprobs: list[TokenLogprob] | None
    guessed: int = 0
    """Tokens that had been guessed for the step"""
    accepted: int = 0
    """Of `tokens`, the leading ones that had been guessed"""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came out for each row."""

    tokens: NDArray[np.int64]
    bad: NDArray[np.bool_]
    """Rows whose logits are NaN or infinite; their token means nothing"""
    logprobs: dict[int, TokenLogprob]
    """By row, for the rows that asked"""

    def draw(self, first: int, count: int = 1, guessed: int = 0, accepted: int = 0) -> Draw:
        """Of some neighbouring rows, the tokens of one sequence."""
        end = first + count
        logprobs = [self.logprobs[row] for row in range(first, end) if row in self.logprobs]
        is_bad = bool(self.bad[end - 1])
        return Draw(self.tokens[first:end].tolist(), is_bad, logprobs or None, guessed, accepted)


class Sampler:
    """Stateless: whatever a choice carries from step to step is in `SamplingTable`."""

    def __init__(self, few: int = FEW):
        self._few = few

    @torch.inference_mode()
    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """One token for each row of logits [R, vocab] float32, which are left as they are."""
        peak, likeliest = (t.numpy() for t in logits.max(dim=1))
        tokens = likeliest.copy()
        bad = ~np.isfinite(peak)
        edited = None
        if batch.edits is not None:
            rows = batch.edits.rows
            edited = _edit(logits, batch.edits)
            peak, edited_likeliest = peak.copy(), edited.max(dim=1)
            peak[rows] = edited_likeliest.values.numpy()
            tokens[rows] = edited_likeliest.indices.numpy()
            bad[rows] |= ~np.isfinite(peak[rows])

        drawn = np.flatnonzero((batch.temperature >= GREEDY_BELOW) & ~bad)
        if len(drawn):
            probabilities = _softmax(logits, edited, peak, drawn, batch)
            tokens[drawn] = self._draw(probabilities, drawn, batch)
        asked = np.flatnonzero((batch.logprobs >= 0) & ~bad)
        if not len(asked):
            return Sampled(tokens, bad, {})
        asking = logits[torch.from_numpy(asked)]
        logprobs = token_logprobs(asking, tokens[asked], batch.logprobs[asked])
        return Sampled(tokens, bad, dict(zip(asked.tolist(), logprobs, strict=True)))

    def _draw(self, probabilities: Tensor, rows: NDArray[np.int64], batch: SamplingBatch) -> NDArray[np.int64]:
        uniform = batch.uniform[rows]
        top_p, top_k, min_p = batch.top_p[rows], batch.top_k[rows], batch.min_p[rows]
        is_filtered = (top_p < 1) | (top_k > 0) | (min_p > 0)
        if not is_filtered.any():
            return _invert(probabilities.numpy(), uniform)
        tokens = np.empty(len(rows), dtype=np.int64)
        free = np.flatnonzero(~is_filtered)
        if len(free):
            tokens[free] = _invert(probabilities[free].numpy(), uniform[free])

        pending = np.flatnonzero(is_filtered)
        # Beyond top_k there must be one more: the last of the few may have equals that are not among them.
        hopeful = pending[top_k[pending] < self._few]
        if self._few < probabilities.shape[1] and len(hopeful):
            some = probabilities if len(hopeful) == len(rows) else probabilities[hopeful]
            values, ids = (t.numpy() for t in some.topk(self._few, dim=1))
            order = np.lexsort((ids, -values))  # equal ones by id
            values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
            is_settled, count = _filter(values, top_p[hopeful], top_k[hopeful], min_p[hopeful], is_all=False)
            done = hopeful[is_settled]
            tokens[done] = _invert_few(values[is_settled], ids[is_settled], count[is_settled], uniform[done])
            pending = np.setdiff1d(pending, done, assume_unique=True)
        if len(pending):
            every = probabilities[pending].numpy()
            descending = np.sort(every, axis=1)[:, ::-1]
            _, count = _filter(descending, top_p[pending], top_k[pending], min_p[pending], is_all=True)
            tokens[pending] = _invert(_largest(every, descending, count), uniform[pending])
        return tokens


def _edit(logits: Tensor, edits: Edits) -> Tensor:
    """[E, vocab]: the logits of the rows that have edits, with them."""
    scores = logits[torch.from_numpy(edits.rows)]
    if len(edits.bias):
        at = torch.from_numpy(edits.bias_row), torch.from_numpy(edits.bias_token)
        scores[at] += torch.from_numpy(edits.bias)
    if len(edits.seen_token):
        row = torch.from_numpy(edits.seen_row)
        at = row, torch.from_numpy(edits.seen_token)
        count = torch.from_numpy(edits.seen_count)
        repetition, presence, frequency = (
            torch.from_numpy(penalty)[row] for penalty in (edits.repetition, edits.presence, edits.frequency)
        )
        old = scores[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        scores[at] = new - frequency * count - presence * (count > 0)
    if len(edits.banned_token):
        scores[torch.from_numpy(edits.banned_row), torch.from_numpy(edits.banned_token)] = -torch.inf
    return scores


def _softmax(
    logits: Tensor, edited: Tensor | None, peak: NDArray[np.float32], rows: NDArray[np.int64], batch: SamplingBatch
) -> Tensor:
    """[len(rows), vocab, padded with zeros to whole blocks] float32 probabilities at the rows' temperatures."""
    vocab = logits.shape[1]
    scores = logits.new_full((len(rows), -(-vocab // BLOCK) * BLOCK), -torch.inf)
    scores[:, :vocab] = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows)]
    if edited is not None and batch.edits is not None:
        _, to, source = np.intersect1d(rows, batch.edits.rows, assume_unique=True, return_indices=True)
        scores[torch.from_numpy(to), :vocab] = edited[torch.from_numpy(source)]
    # The maximum goes first: a small temperature must not make infinities of finite logits.
    scores -= torch.from_numpy(peak[rows]).unsqueeze(1)
    scores /= torch.from_numpy(batch.temperature[rows]).unsqueeze(1)
    return torch.softmax(scores, dim=1)


def _invert(probabilities: NDArray[np.float32], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """[R]: the first token at which the sum of [R, blocks * BLOCK] probabilities exceeds uniform * total."""
    rows = np.arange(len(uniform))
    blocks = probabilities.reshape(len(rows), -1, BLOCK)
    sums = blocks.sum(axis=2, dtype=np.float64).cumsum(axis=1)
    target = uniform * sums[:, -1]
    block = (sums > target[:, None]).argmax(axis=1)
    before = np.where(block > 0, sums[rows, block - 1], 0.0)
    inside = blocks[rows, block].astype(np.float64)
    is_beyond = inside.cumsum(axis=1) > (target - before)[:, None]
    # A block's sum and the sum of its tokens one by one may differ in the last bit: then it is the last possible one.
    last = BLOCK - 1 - (inside > 0)[:, ::-1].argmax(axis=1)
    return block * BLOCK + np.where(is_beyond.any(axis=1), is_beyond.argmax(axis=1), last)


def _invert_few(
    values: NDArray[np.float32], ids: NDArray[np.int64], count: NDArray[np.int64], uniform: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The same over the first `count` of a few candidates [R, n]."""
    rows = np.arange(len(ids))
    kept = np.where(np.arange(ids.shape[1]) < count[:, None], values, 0.0)
    order = ids.argsort(axis=1)
    sums = np.take_along_axis(kept, order, axis=1).cumsum(axis=1, dtype=np.float64)
    place = (sums > (uniform * sums[:, -1])[:, None]).argmax(axis=1)
    chosen: NDArray[np.int64] = ids[rows, order[rows, place]]
    return chosen


def _largest(
    values: NDArray[np.float32], descending: NDArray[np.float32], count: NDArray[np.int64]
) -> NDArray[np.float32]:
    """[R, n] values with all but the `count` largest of each row set to 0; of equal ones the first stay."""
    least = np.take_along_axis(descending, count[:, None] - 1, axis=1)
    keep = values > least
    equal = values == least
    wanted = count - keep.sum(axis=1)
    keep |= equal & (equal.cumsum(axis=1) <= wanted[:, None])
    return np.where(keep, values, np.float32(0))


def _filter(
    values: NDArray[np.float32],
    top_p: NDArray[np.float64],
    top_k: NDArray[np.int64],
    min_p: NDArray[np.float64],
    is_all: bool,
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """How many tokens min_p, top_k and top_p leave, from the largest probabilities of each row, descending.

    Returns
        is_settled  [R] whether these tokens suffice to know it; all do if they are all there are
        count       [R] at least 1; meaningless where not settled
    """
    values = values.astype(np.float64)
    least = values[:, -1]
    # What is not here is not likelier than the last one, which may have equals that are not here.
    known = np.full(len(values), values.shape[1]) if is_all else (values > least[:, None]).sum(axis=1)
    is_complete = is_all | (least == 0)

    unlimited = np.iinfo(np.int64).max
    threshold = min_p * values[:, 0]
    passing = np.minimum((values >= threshold[:, None]).sum(axis=1), known)
    count = np.where(is_complete | (least < threshold), passing, unlimited)
    count = np.minimum(count, np.where(top_k > 0, top_k, unlimited))
    is_settled = is_complete | (count <= known)
    count = np.maximum(np.minimum(count, known), 1)

    sums = values.cumsum(axis=1)
    mass = np.take_along_axis(sums, count[:, None] - 1, axis=1)[:, 0]
    is_cut = (top_k > 0) | (min_p > 0)
    wanted = top_p * np.where(is_cut, mass, 1.0)
    # A token stays if those before it have not reached the mass that is wanted.
    nucleus = 1 + (sums[:, :-1] < wanted[:, None]).sum(axis=1)
    is_settled |= ~is_cut & (known > 0) & (mass >= wanted)
    return is_settled, np.where(top_p < 1, np.minimum(count, nucleus), count)


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: NDArray[np.integer], count: NDArray[np.int64]) -> list[TokenLogprob]:
    """Logprob and rank of one token for each row of raw logits [R, vocab], and the `count` [R] likeliest ones."""
    every = torch.log_softmax(logits, dim=1)
    chosen = torch.from_numpy(tokens.astype(np.int64)).unsqueeze(1)
    logprob = every.gather(1, chosen)[:, 0].tolist()
    rank = ((logits > logits.gather(1, chosen)).sum(dim=1) + 1).tolist()
    wanted = np.minimum(count, logits.shape[1]).tolist()
    ids: list[list[int]] = [[] for _ in wanted]
    top: list[list[float]] = [[] for _ in wanted]
    if max(wanted) > 0:
        likeliest = _likeliest(logits, max(wanted))
        ids, top = likeliest.tolist(), every.gather(1, likeliest).tolist()
    return [
        TokenLogprob(logprob[i], rank[i], list(zip(ids[i][:most], top[i][:most], strict=True)))
        for i, most in enumerate(wanted)
    ]


def _likeliest(raw: Tensor, count: int) -> Tensor:
    """[R, count] ids of the largest logits, descending; equal ones by id."""
    values, ids = raw.topk(count, dim=1)
    ids, order = ids.sort(dim=1)
    values, order = torch.sort(values.gather(1, order), dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    # topk takes any of several equal last ones; sort those rows as a whole.
    tied = ((raw >= values[:, -1:]).sum(dim=1) > count).nonzero()[:, 0]
    if len(tied):
        ids[tied] = torch.sort(raw[tied], dim=1, descending=True, stable=True).indices[:, :count]
    return ids
