"""Sums of queries in the interpreter, against the reference."""

from __future__ import annotations

import pytest
import torch

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageLayout

from ..build import Held, build, randn

HELD = [Held((90,), rows=7, first_vote=2), Held((40,), first_vote=0), Held((9,), rows=9), Held((20,), rows=5)]
"""The third has no moments, and of the fourth no row votes."""


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(("dim", "group"), [(16, 1), (80, 3)])
def test_moments(triton: Backend, reference: Backend, dim: int, group: int, with_norm: bool) -> None:
    state = build(PageLayout(dim), HELD, layers=2)
    state.batch.first_vote[3] = 5
    for index in (0, 1, 3):
        slot = int(state.batch.slots[index])
        state.kv.moments[slot] = randn(2, 2 * group, 1 + dim, dim, seed=7).double()
    theirs, norm = state.copy(), 1 + 0.3 * randn(dim) if with_norm else None
    qkv = randn(state.rows, (2 * group + 4) * dim)
    for ops, one in ((triton, state), (reference, theirs)):
        ops.query_moments(qkv, one.batch, one.kv, 1, norm, 1e-6)
    tolerance = 1e-5 if with_norm else 0.0  # products are exact, sums in one order
    for slot, moments in theirs.kv.moments.items():
        seen = state.kv.moments[slot]
        torch.testing.assert_close(seen.triu(-1), moments.triu(-1), atol=tolerance, rtol=tolerance)
