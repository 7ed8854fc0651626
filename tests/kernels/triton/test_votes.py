"""Attention mass in the interpreter: rules of all kinds, lanes of three parts, chunks of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.lanes import lane_part, sequences
from winnow.kernels.reference.pages import read_lane
from winnow.kernels.triton.votes import add_votes
from winnow.kernels.vote import Vote

from ..build import Held, State, build, chunk_of, one_sequence, randn
from ..test_votes import VOTES

INT8, INT4, BF16 = PageFormat.INT8, PageFormat.INT4, PageFormat.BF16
HELD = [
    Held((50, 66), rows=30, first_vote=9),
    Held((9, 25), rows=3, sealed=(2, 1), fmt=INT8, rest=(1,), rest_fmt=INT4, first_vote=0, weighted=True, evicted=True),
    Held((20,), rows=9),
]
RULES = {"plain": Vote(), **{name: VOTES[name] for name in ("fading", "noisy, warming and fading", "largest")}}


def _state(held: list[Held], vote: Vote) -> State:
    state = build(PageLayout(16, BF16), held, layers=2)
    for slot, mass in state.kv.mass.items():
        mass[..., int(state.kv.kept[slot].min()) - 30 :] = 0  # of what rows of this step are the first to see
        state.kv.votes[slot] = vote
        if vote.is_noisy:
            state.kv.noise[slot] = randn(*mass.shape, seed=slot)
    return state


def _lse(q: Tensor, batch: LaneBatch, kv: PagedKV, scale: float, window: int) -> Tensor:
    """What `attention` hands over."""
    out = q.new_empty(q.shape[:2])
    for sequence in sequences(batch, kv, 1, len(q)):
        for head, block in enumerate(q[sequence.rows].chunk(2, 1)):
            keys, _ = read_lane(kv, sequence.slot, 1, head)
            logits = torch.einsum("rgd,nd->rgn", block, keys) * scale
            if sequence.slot in kv.log_weights:
                logits += lane_part(kv.log_weights[sequence.slot], 1, head, len(keys))
            index = torch.arange(len(keys))
            seen = index <= (len(keys) - sequence.count + torch.arange(sequence.count))[:, None]
            if window:
                at = (
                    lane_part(kv.positions[sequence.slot], 1, head, len(keys))
                    if sequence.slot in kv.positions
                    else index
                )
                seen &= at > batch.positions[sequence.rows][:, None] - window
            out[sequence.rows, 3 * head : 3 * head + 3] = logits.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)
    return out


def _count(state: State, q: Tensor, window: int = 0) -> None:
    add_votes(q, _lse(q, state.batch, state.kv, 0.2, window), state.batch, state.kv, 1, 0.2, window)


@pytest.mark.parametrize("window", [0, 25])
@pytest.mark.parametrize("vote", RULES.values(), ids=RULES)
def test_mass_is_the_reference_s(reference: Backend, vote: Vote, window: int) -> None:
    state = _state(HELD, vote)
    theirs, q = state.copy(), randn(state.rows, 6, 16)
    _count(state, q, window)
    reference.attention(q, theirs.batch, theirs.kv, 1, 0.2, window)
    assert len(theirs.kv.mass) == 2
    for slot, mass in theirs.kv.mass.items():
        torch.testing.assert_close(state.kv.mass[slot], mass, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("vote", [Vote(), RULES["noisy, warming and fading"]], ids=["plain", "of its own softmax"])
def test_chunks_change_no_more_than_rounding_and_batch_mates_nothing(vote: Vote) -> None:
    whole = _state(HELD, vote)
    alone, cut_up = whole.copy(), whole.copy()
    slot, q = int(whole.batch.slots[0]), randn(whole.rows, 6, 16)
    batch, rows = one_sequence(whole.batch, 0)
    _count(whole, q)
    alone.batch = batch
    _count(alone, q[rows])
    assert torch.equal(alone.kv.mass[slot], whole.kv.mass[slot])
    kept = whole.kv.kept[slot].clone()
    for first, last in ((0, 10), (10, 11), (11, 30)):
        cut_up.kv.kept[slot] = kept - 30 + last
        cut_up.batch = chunk_of(batch, first, last)
        _count(cut_up, q[rows][first:last])
    torch.testing.assert_close(cut_up.kv.mass[slot], whole.kv.mass[slot], atol=1e-5, rtol=1e-5)


def test_noise_that_does_not_fit_the_mass() -> None:
    state = _state(HELD[:1], RULES["noisy, warming and fading"])
    state.kv.noise[int(state.batch.slots[0])] = torch.zeros(2, 2, 19)
    with pytest.raises((ValueError, IndexError)):
        _count(state, randn(state.rows, 6, 16))
