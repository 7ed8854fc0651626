"""Paged states that were built in host memory, on the device."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat, PageLayout

from ..kernels.build import Held, State, build, randn

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat

LLAMA, SMOLLM = (128, 8, 4), (64, 3, 3)
"""Head dimension, KV heads, query heads of each"""
SIDES = ("mass", "noise", "moments", "positions", "log_weights")

DECODE = [
    Held((1,)),
    Held((2100, 33, 700)),
    Held((40, 9, 32), sealed=(20, 3, 0), fmt=INT4),
    Held((1, 31), sealed=(17, 5), fmt=INT8),
    Held((5,), sealed=(9, 12), fmt=INT2),
    Held((64, 20), sealed=(11, 30), fmt=FP8),
    Held((50,), sealed=(3, 9), rest=(8, 1), evicted=True),
    Held((600,), weighted=True),
]
"""Lanes of one new row each, ragged, in all formats"""
CHUNKS = [
    Held((300,), rows=300),
    Held((129,), rows=128, sealed=(10,), fmt=INT8),
    Held((70, 90), rows=65, sealed=(5, 2), fmt=INT4, evicted=True),
    Held((40,), rows=33, sealed=(6,), fmt=FP8),
    Held((40,), rows=17, sealed=(4, 2), rest=(2, 1), fmt=INT8),
]
"""Prompts' chunks"""


def paged(held: list[Held], shape: tuple[int, int, int], layers: int = 1, seed: int = 0) -> State:
    """In host memory, with the pages that a GPU has."""
    return build(PageLayout(shape[0], BF16, 32), held, layers=layers, kv_heads=shape[1], seed=seed)


def moved(state: State, ops: Backend) -> State:
    """A copy of the state as the engine would hold it for a backend."""
    kv, to = state.kv, ops.device()
    sides = {name: {slot: part.to(to, copy=True) for slot, part in getattr(kv, name).items()} for name in SIDES}
    tables = {name: getattr(kv, name).clone() for name in ("table", "kept", "sealed", "rest")}
    there = replace(
        kv, data=kv.data.to(to, copy=True), **tables, **sides, votes=dict(kv.votes), native=None, stale=set()
    )
    return replace(state, kv=there, batch=fresh(state.batch))


def fresh(batch: LaneBatch) -> LaneBatch:
    """As it was before a backend saw it."""
    return LaneBatch(batch.slots, batch.cu_rows, batch.positions, batch.first_vote, batch.angles, batch.rope)


def queries(state: State, shape: tuple[int, int, int], seed: int = 5) -> Tensor:
    """[T, Hq, D] bf16, in host memory."""
    return randn(state.rows, shape[1] * shape[2], shape[0], seed=seed).bfloat16()


def attend(ops: Backend, kv: PagedKV, batch: LaneBatch, q: Tensor, window: int = 0, layer: int = 0) -> Tensor:
    return ops.attention(q, batch, kv, layer, q.shape[2] ** -0.5, window)


def assert_near(actual: Tensor, expected: Tensor, part: float = 1.5e-2) -> None:
    """Of bf16: the error is a small part of the whole, and no number is far off."""
    actual, expected = actual.cpu().double(), expected.double()
    assert bool(actual.isfinite().all())
    error = (actual - expected).norm() / expected.norm()
    assert error < part, f"‖error‖ is {error:.3g} of ‖expected‖"
    torch.testing.assert_close(actual, expected, atol=6 * part * float(expected.abs().mean()), rtol=4 * part)
