"""Attention in Triton against the reference, where the interpreter takes the GPU's place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from ..build import Held, State, build, randn

F32, BF16, INT8, INT4, INT2, FP8 = PageFormat


def _attend(ops: Backend, state: State, q: Tensor, window: int = 0, layer: int = 0) -> Tensor:
    return ops.attention(q, state.batch, state.kv, layer, q.shape[2] ** -0.5, window)


def _assert_parity(triton: Backend, reference: Backend, state: State, group: int, window: int = 0) -> None:
    heads, dim = state.kv.table.shape[2], state.kv.layout.head_dim
    q = randn(state.rows, group * heads, dim, seed=5)
    expected = _attend(reference, state, q, window)
    torch.testing.assert_close(_attend(triton, state, q, window), expected, atol=2e-5, rtol=1e-5)
    # In bf16 the error of a row is that of its weights and values, rounded to 8 bits.
    rounded = q.bfloat16()
    expected = _attend(reference, state, rounded.float(), window)
    torch.testing.assert_close(_attend(triton, state, rounded, window).float(), expected, atol=2e-2, rtol=2e-2)


CASES = {
    "one token": [Held((1,))],
    "decode and chunks over open pages": [Held((70, 33, 1)), Held((90,), rows=90), Held((40,), rows=2)],
    "every format, alone and as a second one": [
        Held((12,), fmt=INT8, sealed=(0, 2)),
        Held((5,), fmt=INT4, sealed=(2, 1), rest=(1, 0), rest_fmt=INT2),
        Held((17, 2), fmt=BF16, sealed=(2, 0), rest=(0, 2), rest_fmt=FP8),
        Held((20,), fmt=F32, sealed=(1, 3), rest=(2, 1), rest_fmt=INT8),
    ],
    "chunks over full pages": [
        Held((30,), rows=25, fmt=INT8, sealed=(0, 2)),
        Held((41, 30), rows=30, fmt=FP8, sealed=(0, 2), rest=(1, 0), rest_fmt=INT4),
        Held((3,), fmt=INT2, sealed=(1, 0)),
    ],
    "tokens that stand for many": [Held((50, 20), rows=4, sealed=(2, 1), weighted=True), Held((40,))],
    "a sequence without rows": [Held((30,), rows=2), Held((30,), rows=0), Held((5,))],
}


@pytest.mark.parametrize("held", CASES.values(), ids=CASES.keys())
def test_attention_matches_the_reference(triton: Backend, reference: Backend, held: list[Held]) -> None:
    compute = BF16 if all(F32 not in (one.fmt, one.rest_fmt) for one in held) else F32
    _assert_parity(triton, reference, build(PageLayout(64, compute), held), group=3)
