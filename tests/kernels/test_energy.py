"""Sums of squares of a window's queries: against plain sums, and the same bits however rows came."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import Energy
from winnow.kernels.layout import PageLayout

from .build import Held, State, build, chunk_of, one_sequence, randn

HELD = [Held((90,), rows=70), Held((40,), rows=5), Held((9,), rows=9), Held((20,), rows=20, evicted=True)]
WINDOWS = [(40, 72), None, (9, 41), (0, 10_000)]
"""Positions that count: the middle of the rows, nothing, none of the rows, all of them"""


def _state(dim: int) -> State:
    state = build(PageLayout(dim), HELD, layers=2)
    for slot, window in zip(state.batch.slots.tolist(), WINDOWS, strict=True):
        if window is not None:
            state.kv.energy[slot] = Energy(randn(2, 2, dim, seed=7).double().abs(), *window)
    return state


def _copy(state: State) -> State:
    copy = state.copy()
    copy.kv.energy = {slot: Energy(e.sums.clone(), e.first, e.last) for slot, e in state.kv.energy.items()}
    return copy


@pytest.mark.parametrize(("dim", "group"), [(16, 1), (64, 3), (80, 7), (256, 2)])
def test_sums_of_squares(ops: Backend, dim: int, group: int) -> None:
    state = _state(dim)
    before, q = _copy(state), randn(state.rows, 2 * group, dim)
    ops.query_energy(q, state.batch, state.kv, 1)
    for index, slot in enumerate(state.batch.slots.tolist()):
        if slot not in state.kv.energy:
            continue
        (batch, rows), energy = one_sequence(state.batch, index), before.kv.energy[slot]
        chosen = [r for r, position in enumerate(batch.positions.tolist()) if energy.first <= position < energy.last]
        assert len(chosen) == [32, 0, 0, 20][index]
        wanted = energy.sums[1] + q[rows][chosen].double().square().sum(0).unflatten(0, (2, group)).sum(1)
        torch.testing.assert_close(state.kv.energy[slot].sums[1], wanted)
        assert torch.equal(state.kv.energy[slot].sums[0], energy.sums[0]), "another layer's"


def test_squares_are_exact(native: Backend, reference: Backend) -> None:
    """So that both backends have the same bits."""
    state = _state(64)
    theirs, q = _copy(state), randn(state.rows, 6, 64)
    native.query_energy(q, state.batch, state.kv, 1)
    reference.query_energy(q, theirs.batch, theirs.kv, 1)
    for slot, energy in theirs.kv.energy.items():
        assert torch.equal(state.kv.energy[slot].sums, energy.sums)


def test_chunks_and_batch_mates_change_no_bit(ops: Backend) -> None:
    state = _state(32)
    cut_up, slot, q = _copy(state), int(state.batch.slots[0]), randn(state.rows, 4, 32)
    ops.query_energy(q, state.batch, state.kv, 1)
    batch, rows = one_sequence(cut_up.batch, 0)
    kept = cut_up.kv.kept[slot].clone()
    for first, last in pairwise([0, 3, 37, 69, 70]):
        cut_up.kv.kept[slot] = kept - 70 + last
        cut_up.batch = chunk_of(batch, first, last)
        ops.query_energy(q[rows][first:last].contiguous(), cut_up.batch, cut_up.kv, 1)
    assert torch.equal(cut_up.kv.energy[slot].sums, state.kv.energy[slot].sums)


def test_what_does_not_fit(ops: Backend) -> None:
    state = _state(16)
    with pytest.raises((ValueError, IndexError)):
        ops.query_energy(randn(state.rows, 4, 8), state.batch, state.kv, 1)
    with pytest.raises((ValueError, IndexError)):
        ops.query_energy(randn(state.rows, 4, 16), state.batch, state.kv, 2)
    with pytest.raises((ValueError, IndexError)):
        ops.query_energy(randn(state.rows, 3, 16), state.batch, state.kv, 1)
