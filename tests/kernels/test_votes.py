"""Attention mass counted by every rule: against a loop over dense attention, and the same bits however rows came."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.vote import FAINT, Vote

from .build import Held, State, assert_same_bits, build, chunk_of, one_sequence, randn
from .on_device import OnDevice

F32, BF16, INT8 = PageFormat.F32, PageFormat.BF16, PageFormat.INT8

VOTES = {
    "fading": Vote(decay=0.9),
    "warm": Vote(temperature=1.7),
    "warming": Vote(heating=0.05, warm_from=180),
    "noisy": Vote(is_noisy=True),
    "noisy, warming and fading": Vote(decay=0.8, temperature=0.7, heating=0.01, is_noisy=True),
    "largest": Vote(reduce="max"),
    "largest of noisy": Vote(reduce="max", temperature=2.0, is_noisy=True),
}
votes = pytest.mark.parametrize("vote", VOTES.values(), ids=VOTES)


def _state(held: list[Held], vote: Vote, layout: PageLayout | None = None) -> State:
    """Whoever has mass counts it by `vote`; tokens that no row has seen have none."""
    state = build(layout or PageLayout(32, BF16), held, layers=2)
    for index, slot in enumerate(state.batch.slots.tolist()):
        if slot not in state.kv.mass:
            continue
        mass, rows = state.kv.mass[slot], int(state.batch.cu_rows[index + 1] - state.batch.cu_rows[index])
        for lane, kept in zip(mass.flatten(0, 1), state.kv.kept[slot].flatten().tolist(), strict=True):
            lane[kept - rows :] = 0
        state.kv.votes[slot] = vote
        if vote.is_noisy:
            state.kv.noise[slot] = randn(*mass.shape, seed=slot)
    return state


def _attend(ops: Backend, state: State, q: Tensor, window: int = 0) -> Tensor:
    return ops.attention(q, state.batch, state.kv, 1, 0.2, window)


HELD = [
    Held((200, 230), rows=70, first_vote=10),
    Held((31, 90), rows=5, sealed=(2, 1), fmt=INT8, first_vote=0),
    Held((40,), sealed=(1,), first_vote=0),
    Held((50,), rows=20),
]


@votes
@pytest.mark.parametrize("window", [0, 25])
def test_backends_agree(native: Backend, reference: Backend, vote: Vote, window: int) -> None:
    state = _state([*HELD, Held((90,), rows=33, first_vote=4, weighted=True)], vote)
    theirs, q = state.copy(), randn(state.rows, 6, 32)
    out, expected = _attend(native, state, q, window), _attend(reference, theirs, q, window)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert len(theirs.kv.mass) == 4
    for slot, mass in theirs.kv.mass.items():
        torch.testing.assert_close(state.kv.mass[slot], mass, atol=2e-5, rtol=2e-5)


@votes
def test_mass_is_what_the_rule_says(ops: Backend, vote: Vote) -> None:
    """Row by row and token by token, over lanes in f32."""
    state = _state([replace(held, fmt=F32) for held in HELD[:3]], vote, PageLayout(32))
    before, q = state.copy(), randn(state.rows, 6, 32)
    _attend(ops, state, q)
    for index, slot in enumerate(state.batch.slots.tolist()):
        batch, rows = one_sequence(state.batch, index)
        count, first = rows.stop - rows.start, int(batch.first_vote)
        for head in range(2):
            keys, wanted = state.keys[slot, 1, head].double(), before.kv.mass[slot][1, head].double()
            for row in range(first, count):
                seen = len(keys) - count + row + 1
                heat = vote.temperature + vote.heating * max(0, int(batch.positions[row]) - vote.warm_from)
                logits = 0.2 * q[rows.start + row, 3 * head : 3 * head + 3].double() @ keys[:seen].T
                if vote.is_noisy:
                    logits += state.kv.noise[slot][1, head, :seen]
                given = (logits / heat).softmax(-1)
                if vote.reduce == "max":
                    wanted[:seen] = wanted[:seen].maximum(given.amax(0))
                else:
                    wanted[: len(keys)] *= vote.decay
                    wanted[:seen] += given.sum(0)
            torch.testing.assert_close(state.kv.mass[slot][1, head].double(), wanted, atol=2e-5, rtol=2e-5)
        assert torch.equal(state.kv.mass[slot][0], before.kv.mass[slot][0]), "another layer's mass"


@votes
@pytest.mark.parametrize("window", [0, 20])
def test_chunks_and_batch_mates_change_no_bit(native: Backend, vote: Vote, window: int) -> None:
    """On a GPU chunks change the order of sums."""
    close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)
    same = close if isinstance(native, OnDevice) else assert_same_bits
    held = Held((220, 251), rows=201, sealed=(2, 1), first_vote=50)
    whole = _state([held, *HELD], vote)
    slot, q = int(whole.batch.slots[0]), randn(whole.rows, 6, 32)
    cut_up = whole.copy()
    expected = _attend(native, whole, q, window)
    batch, rows = one_sequence(cut_up.batch, 0)
    q, kept = q[rows], cut_up.kv.kept[slot].clone()
    for first, last in pairwise([0, 3, 77, 190, 191, 201]):
        cut_up.kv.kept[slot] = kept - 201 + last
        cut_up.batch = chunk_of(batch, first, last)
        same(_attend(native, cut_up, q[first:last].contiguous(), window), expected[first:last])
    same(cut_up.kv.mass[slot], whole.kv.mass[slot])


def test_what_has_faded_is_zero(ops: Backend) -> None:
    """Numbers too small to be stored in full would slow every later row down."""
    state = _state([Held((60,), rows=1, first_vote=0)], Vote(decay=0.5), PageLayout(16))
    slot = int(state.batch.slots[0])
    state.kv.mass[slot][:] = FAINT
    _attend(ops, state, torch.zeros(1, 4, 16), window=10)
    assert (state.kv.mass[slot][1, 0, :50] == 0).all()
    torch.testing.assert_close(state.kv.mass[slot][1, 0, 50:60], torch.full((10,), 0.2))


def test_the_plain_rule_is_that_of_a_slot_without_one(native: Backend) -> None:
    stated, silent = _state(HELD, Vote()), _state(HELD, Vote())
    silent.kv.votes.clear()
    q = randn(stated.rows, 6, 32)
    for state in (stated, silent):
        _attend(native, state, q)
    for slot, mass in stated.kv.mass.items():
        assert_same_bits(silent.kv.mass[slot], mass)


def test_noise_that_does_not_fit_the_mass(ops: Backend) -> None:
    state = _state(HELD[:1], Vote(is_noisy=True))
    state.kv.noise[int(state.batch.slots[0])] = torch.zeros(2, 2, 19)
    with pytest.raises((ValueError, IndexError)):
        _attend(ops, state, randn(state.rows, 6, 32))


@pytest.mark.parametrize(
    "rule",
    [{"decay": 0.0}, {"decay": 1.1}, {"temperature": 0.0}, {"heating": -1.0}, {"reduce": "max", "decay": 0.5}],
)
def test_rules_that_make_no_sense(rule: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is no rule|does not fade"):
        Vote(**rule)  # type: ignore[arg-type]
