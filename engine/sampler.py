"""From logits to tokens: the whole batch at once, each row as if it were alone.

The order is vLLM's: logit bias, repetition, frequency and presence penalties, end tokens banned below `min_tokens`,
temperature, min_p, top_k, top_p. Logprobs are those of the raw logits, before any of it.

Where we depart from vLLM:
- top_k keeps exactly k tokens; equal logits are decided by the lower id.
- What is drawn is the inverse of the distribution function, in token order, at a hash of (seed, step). A row's token
  is therefore bitwise the same whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.messages import TokenLogprob
from winnow.engine.ranks import ALONE, Ranks
from winnow.engine.sampling import Edits, SamplingBatch
from winnow.kernels.host import to_device, to_host

BLOCK = 128
"""Probabilities are summed in blocks of this many first; the draw then looks into one block only."""

FEW = 128
"""As many of the likeliest tokens are looked at first; most filters are decided among them."""

SORTED = 16
"""Rows of which all probabilities are sorted at a time: that takes many times their memory."""

UNIT = 2.0**-50
"""Probabilities are summed in units of this, as integers: their sums are the same in whatever order a device makes
them."""

BAD, UNSETTLED = -1, -2
"""In place of a token: the row's logits are NaN or infinite; it takes more than a few of the likeliest to know"""


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
    late: NDArray[np.bool_]
    """Rows whose token was not known before the host looked at it: `Drawn.ids` does not have it"""

    def draw(self, first: int, count: int = 1, guessed: int = 0, accepted: int = 0) -> Draw:
        """Of some neighbouring rows, the tokens of one sequence."""
        end = first + count
        logprobs = [self.logprobs[row] for row in range(first, end) if row in self.logprobs]
        is_bad = bool(self.bad[end - 1])
        return Draw(self.tokens[first:end].tolist(), is_bad, logprobs or None, guessed, accepted)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that are being drawn, where the logits are, and on their way to the host."""

    ids: Tensor
    """[R] int64: the tokens, for the next step to read there. Of a row that is bad or late, any token"""
    batch: SamplingBatch
    ranks: Ranks
    said: Callable[[], Tensor]
    """[R] the same in host memory: BAD, UNSETTLED or the token"""
    probabilities: Tensor | None
    """Of the rows that are drawn from them, if some may be unsettled: [rows, vocab up to whole blocks], in units"""
    logprobs: Logprobs | None
    """Of the rows that ask for them, in order"""

    @torch.inference_mode()
    def read(self) -> Sampled:
        """Waits for what came out, and for nothing that was launched later; but if a row is late, for all."""
        batch, said = self.batch, self.said().numpy().copy()
        late = said == UNSETTLED
        if self.probabilities is not None and late.any():
            place = np.flatnonzero(late[batch.drawn])
            some = self.probabilities[_there(self.probabilities.device, place)]
            said[late] = _draw_from_all(some, np.flatnonzero(late), batch).cpu().numpy()
        said = self.ranks.same(said)
        bad = said == BAD
        said[bad] = 0
        if self.logprobs is None:
            return Sampled(said, bad, {}, late)
        asked = batch.asked
        entries = zip(asked.tolist(), self.logprobs.read(said[asked], late[asked]), strict=True)
        return Sampled(said, bad, {row: entry for row, entry in entries if not bad[row]}, late)


class Sampler:
    """Stateless: whatever a choice carries from step to step is in `SamplingTable`."""

    def __init__(self, few: int = FEW, ranks: Ranks = ALONE):
        self._few = few
        self._ranks = ranks

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Sampled:
        """One token for each row of logits [R, vocab] float32, which are left as they are."""
        return self.launch(logits, batch).read()

    @torch.inference_mode()
    def launch(self, logits: Tensor, batch: SamplingBatch, is_sure: NDArray[np.bool_] | None = None) -> Drawn:
        """The same, under way when this returns: all is done where the logits are, and nothing is waited for.

        `is_sure` [R]: rows that must not be late, though all of their probabilities be sorted.
        """
        there = partial(_there, logits.device)
        is_sure = np.zeros(len(batch), bool) if is_sure is None else is_sure
        peak, tokens = logits.max(dim=1)
        is_fine, edited = peak.isfinite(), None
        if batch.edits is not None:
            rows = there(batch.edits.rows)
            edited = _edit(logits, batch.edits)
            peak[rows], tokens[rows] = edited.max(dim=1)
            is_fine &= peak.isfinite()

        drawn, probabilities = batch.drawn, None
        if len(drawn):
            probabilities = _softmax(logits, edited, peak, drawn, batch)
            tokens[there(drawn)] = self._draw(probabilities, drawn, batch, is_sure[drawn])
            if not (batch.is_filtered & ~is_sure)[drawn].any():
                probabilities = None
        said = torch.where(is_fine, tokens, BAD)
        ids, logprobs = said.clamp_min(0), None
        if len(asked := batch.asked):
            rows = there(asked)
            logprobs = Logprobs.launch(logits[rows], ids[rows], batch.logprobs[asked])
        return Drawn(ids, batch, self._ranks, to_host(said), probabilities, logprobs)

    def _draw(
        self, probabilities: Tensor, rows: NDArray[np.int64], batch: SamplingBatch, is_sure: NDArray[np.bool_]
    ) -> Tensor:
        """[R] tokens, UNSETTLED where all of a row's probabilities must be sorted to know, and it is not to be sure."""
        there = partial(_there, probabilities.device)
        filtered = np.flatnonzero(batch.is_filtered[rows])
        if not len(filtered):
            return _invert(probabilities.long(), there(batch.uniform[rows]))
        tokens = torch.full((len(rows),), UNSETTLED, device=probabilities.device)
        free = np.setdiff1d(np.arange(len(rows)), filtered, assume_unique=True)
        if len(free):
            tokens[there(free)] = _invert(probabilities[there(free)].long(), there(batch.uniform[rows[free]]))
        sure = filtered[is_sure[filtered]]
        for first in range(0, len(sure), SORTED):
            few = sure[first : first + SORTED]
            tokens[there(few)] = _draw_from_all(probabilities[there(few)], rows[few], batch)
        # Beyond top_k there must be one more: the last of the few may have equals that are not among them.
        hopeful = filtered[~is_sure[filtered] & (batch.top_k[rows[filtered]] < self._few)]
        if self._few < probabilities.shape[1] and len(hopeful):
            some = probabilities if len(hopeful) == len(rows) else probabilities[there(hopeful)]
            values, ids = _likeliest_first(*some.topk(self._few, dim=1))
            units = values.long()
            is_settled, count = _filter(units, _limits(rows[hopeful], batch, some.device), is_all=False)
            units = torch.where(torch.arange(self._few, device=some.device) < count[:, None], units, 0)
            chosen = _invert_few(units, ids, there(batch.uniform[rows[hopeful]]))
            tokens[there(hopeful)] = torch.where(is_settled, chosen, UNSETTLED)
        return tokens


def _draw_from_all(probabilities: Tensor, rows: NDArray[np.int64], batch: SamplingBatch) -> Tensor:
    units = probabilities.long()
    if units.device.type == "cpu":  # NumPy sorts several times as fast
        descending = torch.from_numpy(np.sort(probabilities.numpy(), axis=1)[:, ::-1].copy()).long()
    else:
        descending = probabilities.sort(dim=1, descending=True).values.long()
    _, count = _filter(descending, _limits(rows, batch, units.device), is_all=True)
    return _invert(_largest(units, descending, count), _there(units.device, batch.uniform[rows]))


def _there(device: torch.device, host: NDArray[Any]) -> Tensor:
    return to_device(torch.from_numpy(host), device)


def _edit(logits: Tensor, edits: Edits) -> Tensor:
    """[E, vocab]: the logits of the rows that have edits, with them."""
    there = partial(_there, logits.device)
    scores = logits[there(edits.rows)]
    if len(edits.bias):
        scores[there(edits.bias_row), there(edits.bias_token)] += there(edits.bias)
    if len(edits.seen_token):
        row, count = there(edits.seen_row), there(edits.seen_count)
        at = row, there(edits.seen_token)
        repetition, presence, frequency = (
            there(penalty)[row] for penalty in (edits.repetition, edits.presence, edits.frequency)
        )
        old = scores[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        scores[at] = new - frequency * count - presence * (count > 0)
    if len(edits.banned_token):
        scores[there(edits.banned_row), there(edits.banned_token)] = -torch.inf
    return scores


def _softmax(
    logits: Tensor, edited: Tensor | None, peak: Tensor, rows: NDArray[np.int64], batch: SamplingBatch
) -> Tensor:
    """[len(rows), vocab, zeros up to whole blocks] float32: probabilities at the rows' temperatures, in units."""
    there, vocab = partial(_there, logits.device), logits.shape[1]
    scores = logits.new_full((len(rows), -(-vocab // BLOCK) * BLOCK), -torch.inf)
    wanted = there(rows)
    scores[:, :vocab] = logits if len(rows) == len(logits) else logits[wanted]
    if edited is not None and batch.edits is not None:
        _, to, source = np.intersect1d(rows, batch.edits.rows, assume_unique=True, return_indices=True)
        scores[there(to), :vocab] = edited[there(source)]
    # The maximum goes first: a small temperature must not make infinities of finite logits.
    scores -= peak[wanted].unsqueeze(1)
    scores /= there(batch.temperature[rows]).unsqueeze(1)
    return torch.softmax(scores, dim=1).mul_(1 / UNIT)


def _first_beyond(sums: Tensor, target: Tensor) -> Tensor:
    """[R]: the first place at which ascending sums [R, n] exceed the target [R]."""
    return (sums <= target[:, None]).sum(dim=1).clamp_max_(sums.shape[1] - 1)


def _invert(units: Tensor, uniform: Tensor) -> Tensor:
    """[R]: the first token at which the sum of [R, blocks * BLOCK] probabilities exceeds uniform [R] * total."""
    blocks = units.view(len(units), -1, BLOCK)
    sums = blocks.sum(dim=2).cumsum(dim=1)
    target = (uniform * sums[:, -1]).long()
    block = _first_beyond(sums, target)[:, None]
    inside = blocks.gather(1, block[..., None].expand(-1, 1, BLOCK))[:, 0]
    before = sums.gather(1, block)[:, 0] - inside.sum(dim=1)
    return block[:, 0] * BLOCK + _first_beyond(inside.cumsum(dim=1), target - before)


def _invert_few(units: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """The same over a few candidates [R, n]."""
    ids, order = ids.sort(dim=1)
    sums = units.gather(1, order).cumsum(dim=1)
    place = _first_beyond(sums, (uniform * sums[:, -1]).long())
    return ids.gather(1, place[:, None])[:, 0]


def _largest(units: Tensor, descending: Tensor, count: Tensor) -> Tensor:
    """[R, n] units with all but the `count` largest of each row set to 0; of equal ones the first stay."""
    least = descending.gather(1, count[:, None] - 1)
    keep, equal = units > least, units == least
    wanted = count - keep.sum(dim=1)
    keep |= equal & (equal.cumsum(dim=1) <= wanted[:, None])
    return torch.where(keep, units, 0)


def _limits(rows: NDArray[np.int64], batch: SamplingBatch, device: torch.device) -> Tensor:
    """[3, R] float64: top_p, top_k (infinite where there is no limit) and min_p."""
    top_k = np.where(batch.top_k[rows] > 0, batch.top_k[rows], np.inf)
    return _there(device, np.stack([batch.top_p[rows], top_k, batch.min_p[rows]]))


def _filter(units: Tensor, limits: Tensor, is_all: bool) -> tuple[Tensor, Tensor]:
    """How many tokens min_p, top_k and top_p leave, from the largest probabilities of each row [R, n], descending.

    Returns
        is_settled  [R] whether these tokens suffice to know it; all do if they are all there are
        count       [R] at least 1; meaningless where not settled
    """
    top_p, top_k, min_p = limits
    values = units.double()
    least = values[:, -1]
    # What is not here is not likelier than the last one, which may have equals that are not here.
    known = torch.full_like(least, units.shape[1]) if is_all else (values > least[:, None]).sum(dim=1).double()
    is_complete = (least == 0) | is_all

    threshold = min_p * values[:, 0]
    passing = torch.minimum((values >= threshold[:, None]).sum(dim=1).double(), known)
    count = torch.where(is_complete | (least < threshold), passing, torch.inf).minimum(top_k)
    is_settled = is_complete | (count <= known)
    count = count.minimum(known).clamp_min_(1).long()

    sums = units.cumsum(dim=1)
    mass = sums.gather(1, count[:, None] - 1)[:, 0]
    is_cut = top_k.isfinite() | (min_p > 0)
    wanted = top_p * torch.where(is_cut, mass, 1 / UNIT)
    # A token stays if those before it have not reached the mass that is wanted.
    nucleus = 1 + (sums[:, :-1] < wanted[:, None]).sum(dim=1)
    is_settled |= ~is_cut & (known > 0) & (mass >= wanted)
    return is_settled, torch.where(top_p < 1, count.minimum(nucleus), count)


def _likeliest_first(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Values [R, n] and the ids they belong to, descending; equal ones by id."""
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs that are being computed, and on their way to the host."""

    raw: Tensor
    """[R, vocab] logits"""
    count: NDArray[np.int64]
    """[R] how many of the likeliest tokens are asked for"""
    table: Callable[[], Tensor]
    """[R, 3 + 2 * most] float64, in which all is exact: whether the likeliest are settled, logprob and rank of the
    token, the likeliest tokens, and their logprobs"""

    @classmethod
    def launch(cls, raw: Tensor, tokens: Tensor, count: NDArray[np.int64]) -> Logprobs:
        """Of one token [R] for each row of raw logits, and of the `count` likeliest ones. Waits for nothing."""
        count = np.minimum(count, raw.shape[1])
        return cls(raw, count, to_host(_logprob_table(raw, tokens, int(count.max()), FEW)))

    def read(self, tokens: NDArray[np.integer], late: NDArray[np.bool_]) -> list[TokenLogprob]:
        """Waits for them. `tokens` [R] are others than those of `launch` where they are `late`."""
        table = self.table().numpy().copy()
        again = np.flatnonzero(late | (table[:, 0] == 0))
        if len(again):
            there = partial(_there, self.raw.device)
            some, own = self.raw[there(again)], there(tokens[again].astype(np.int64))
            table[again] = _logprob_table(some, own, int(self.count.max()), some.shape[1]).cpu().numpy()
        most = int(self.count.max())
        return [
            TokenLogprob(
                row[1], int(row[2]), list(zip(map(int, row[3 : 3 + n]), row[3 + most : 3 + most + n], strict=True))
            )
            for row, n in zip(table.tolist(), self.count.tolist(), strict=True)
        ]


@torch.inference_mode()
def token_logprobs(logits: Tensor, tokens: NDArray[np.integer], count: NDArray[np.int64]) -> list[TokenLogprob]:
    """Logprob and rank of one token for each row of raw logits [R, vocab], and the `count` [R] likeliest ones."""
    there = _there(logits.device, tokens.astype(np.int64))
    return Logprobs.launch(logits, there, count).read(tokens, np.zeros(len(tokens), bool))


def _logprob_table(raw: Tensor, tokens: Tensor, most: int, more: int) -> Tensor:
    """`Logprobs.table`. The `most` likeliest tokens of a row, of equal ones those with the lower ids, are settled if so
    many `more` are looked at that all equals of the last one are among them."""
    every, chosen = torch.log_softmax(raw, dim=1), tokens.unsqueeze(1)
    rank = (raw > raw.gather(1, chosen)).sum(dim=1, keepdim=True) + 1
    parts = [torch.ones_like(rank), every.gather(1, chosen), rank]
    if most:
        few = min(most + more, raw.shape[1])
        values, ids = _likeliest_first(*raw.topk(few, dim=1))
        likeliest = ids[:, :most]
        parts[0] = (raw >= values[:, most - 1 : most]).sum(dim=1, keepdim=True) <= few
        parts += [likeliest, every.gather(1, likeliest)]
    return torch.cat([part.double() for part in parts], dim=1)
