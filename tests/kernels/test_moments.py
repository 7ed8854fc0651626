"""Sums of queries before RoPE: against plain sums, and the same bits however rows came."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageLayout

from .build import Held, State, build, chunk_of, one_sequence, randn

HELD = [Held((90,), rows=70, first_vote=10), Held((40,), first_vote=0), Held((9,), rows=9), Held((20,), rows=5)]
"""The third has no moments, and of the fourth no row votes."""


def _state(dim: int, q_heads: int) -> State:
    state = build(PageLayout(dim), HELD, layers=2)
    state.batch.first_vote[3] = 5
    for slot in (state.batch.slots[i].item() for i in (0, 1, 3)):
        state.kv.moments[int(slot)] = randn(2, q_heads, 1 + dim, dim, seed=7).double()
    return state


def _count(ops: Backend, state: State, qkv: Tensor, norm: Tensor | None = None) -> None:
    ops.query_moments(qkv, state.batch, state.kv, 1, norm, 1e-6)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("dim", "group"), [(16, 1), (64, 3), (80, 7), (256, 2)])
def test_moments_are_sums(ops: Backend, dim: int, group: int, with_norm: bool) -> None:
    state = _state(dim, 2 * group)
    before, norm = state.copy(), 1 + 0.3 * randn(dim) if with_norm else None
    qkv = randn(state.rows, (2 * group + 4) * dim)
    _count(ops, state, qkv, norm)
    queries = qkv.unflatten(1, (-1, dim))[:, : 2 * group].double()
    if norm is not None:
        queries = queries / (queries.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm
    for index in (0, 1, 3):
        slot, (batch, rows) = int(state.batch.slots[index]), one_sequence(state.batch, index)
        voting = queries[rows][int(batch.first_vote) :]
        wanted = before.kv.moments[slot][1]
        wanted[:, 0] += voting.sum(0)
        wanted[:, 1:] += torch.einsum("rhi,rhj->hij", voting, voting)
        seen = state.kv.moments[slot][1]
        torch.testing.assert_close(seen[:, 0], wanted[:, 0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(seen[:, 1:].triu(), wanted[:, 1:].triu(), atol=1e-4, rtol=1e-5)
        assert torch.equal(state.kv.moments[slot][0], before.kv.moments[slot][0]), "another layer's moments"


def test_products_are_exact(native: Backend, reference: Backend) -> None:
    """So that both backends have the same bits, though one adds a block of rows at a time."""
    state = _state(64, 6)
    theirs, qkv = state.copy(), randn(state.rows, 10 * 64)
    _count(native, state, qkv)
    _count(reference, theirs, qkv)
    for slot, moments in theirs.kv.moments.items():
        assert torch.equal(state.kv.moments[slot].triu(-1), moments.triu(-1))


def test_chunks_and_batch_mates_change_no_bit(native: Backend) -> None:
    state = _state(32, 4)
    cut_up, slot, qkv = state.copy(), int(state.batch.slots[0]), randn(state.rows, 8 * 32)
    _count(native, state, qkv)
    batch, rows = one_sequence(cut_up.batch, 0)
    kept = cut_up.kv.kept[slot].clone()
    for first, last in pairwise([0, 3, 37, 69, 70]):
        cut_up.kv.kept[slot] = kept - 70 + last
        cut_up.batch = chunk_of(batch, first, last)
        _count(native, cut_up, qkv[rows][first:last].contiguous())
    assert torch.equal(cut_up.kv.moments[slot], state.kv.moments[slot])


@pytest.mark.parametrize("width", [7 * 16, 8 * 16 - 1], ids=["heads", "dim"])
def test_projections_that_do_not_fit(ops: Backend, width: int) -> None:
    state = _state(16, 4)
    with pytest.raises((ValueError, IndexError)):
        _count(ops, state, randn(state.rows, width))
    with pytest.raises((ValueError, IndexError)):
        ops.query_moments(randn(state.rows, 8 * 16), state.batch, state.kv, 2, None, 1e-6)
