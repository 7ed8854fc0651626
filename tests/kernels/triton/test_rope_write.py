"""Queries, and keys and values in their pages, as the reference has them: in all types, beside dimensions that blocks
do not divide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from ..build import Held, State, assert_same_bits, build, one_sequence, randn

F32, BF16, INT8, INT4, INT2, FP8, F16, *_ = PageFormat
TYPES = {F32: (torch.float32, torch.int32), BF16: (torch.bfloat16, torch.int16), F16: (torch.float16, torch.int16)}
"""Of a page's numbers, and of their bits"""
STEPS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
HELD = [
    Held((60,), rows=1, fmt=INT8, sealed=(1,)),
    Held((33, 40), rows=33),
    Held((9, 20), rows=7, fmt=INT4, sealed=(1, 0), rest=(0, 1)),
    Held((1,)),
    Held((17,), rows=2, sealed=(0, 2)),
]


def _tables(dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(400)[:, None] * 10000.0 ** -(torch.arange(dim // 2) * 2 / dim)
    return 1.2 * angles.cos(), 1.2 * angles.sin()


def _run(ops: Backend, state: State, qkv: Tensor, norms: tuple[Tensor | None, Tensor | None]) -> Tensor:
    return ops.rope_write(qkv, *_tables(state.kv.layout.head_dim), state.batch, state.kv, 1, *norms, 1e-6)


@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize(
    ("pages", "dtype"),
    [
        (F32, torch.float32),
        (F32, torch.bfloat16),
        (BF16, torch.float32),
        (BF16, torch.bfloat16),
        (F16, torch.float16),
    ],
)
def test_as_the_reference(triton: Backend, reference: Backend, dim: int, pages: PageFormat, dtype: torch.dtype) -> None:
    state = build(PageLayout(dim, pages), HELD, layers=2)
    theirs = state.copy()
    qkv = randn(state.rows, 8 * dim).to(dtype)
    norms = (randn(dim, seed=8), randn(dim, seed=9) if dim > 16 else None)
    q, expected = _run(triton, state, qkv, norms), _run(reference, theirs, qkv.float(), norms)
    assert q.dtype == dtype
    torch.testing.assert_close(q.float(), expected, atol=5e-6, rtol=STEPS[dtype])
    number, bits = TYPES[pages]
    actual, wanted = (kv.data.view(bits) for kv in (state.kv, theirs.kv))
    differ = actual != wanted
    numbers = (part[differ].view(number).float() for part in (actual, wanted))
    # Not a number where nothing should have been written
    torch.testing.assert_close(*numbers, atol=5e-6, rtol=2 * STEPS[number])
    assert differ.float().mean() < 0.1


def test_a_row_has_the_same_bits_in_any_company(triton: Backend) -> None:
    state = build(PageLayout(32, BF16), HELD, layers=2)
    qkv, norms = randn(state.rows, 8 * 32).bfloat16(), (randn(32, seed=8), randn(32, seed=9))
    together = state.copy()
    q = _run(triton, together, qkv, norms)
    alone = state.copy()
    for index in range(len(HELD)):
        alone.batch, rows = one_sequence(state.batch, index)
        assert_same_bits(_run(triton, alone, qkv[rows], norms).float(), q[rows].float())
    assert torch.equal(alone.kv.data, together.kv.data)


def test_rows_are_turned_by_their_angles(triton: Backend) -> None:
    state = build(PageLayout(32, BF16), HELD, layers=2)
    qkv, norms = randn(state.rows, 8 * 32).bfloat16(), (randn(32, seed=8), randn(32, seed=9))
    angles = torch.randint(0, 400, (state.rows,), generator=torch.Generator().manual_seed(3)).int()
    turned, there = state.copy(), state.copy()
    turned.batch.angles = angles
    there.batch.positions = angles
    assert_same_bits(_run(triton, turned, qkv, norms), _run(triton, there, qkv, norms))
    assert_same_bits(turned.kv.data, there.kv.data)


@pytest.mark.parametrize("angle", [-1, 400])
def test_an_angle_outside_the_tables(triton: Backend, angle: int) -> None:
    state = build(PageLayout(32, BF16), HELD[3:4], layers=2)
    state.batch.angles = torch.tensor([angle], dtype=torch.int32)
    with pytest.raises(IndexError):
        _run(triton, state, randn(1, 8 * 32).bfloat16(), (None, None))
