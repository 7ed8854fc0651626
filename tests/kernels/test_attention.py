"""Attention over pages: every backend against dense attention, and against the reference in every odd case."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch
from winnow.kernels.layout import PageFormat, PageLayout

from .build import FORMATS, Held, State, build, one_sequence, randn, read_by

F32, BF16, INT8, INT4, INT2, FP8, F16, *_ = PageFormat
OPENED = [fmt for fmt in FORMATS if fmt.is_opened]

MIXED = [
    Held((12,), fmt=INT8, sealed=(0, 1)),
    Held((33,), rows=33, first_vote=20),
    Held((50, 24), rows=7, sealed=(2, 1), first_vote=0),
    Held((17, 2), rows=2, weighted=True),
    Held((20,), fmt=BF16, sealed=(2, 1)),
    Held((60, 20), fmt=INT2, sealed=(1, 2), first_vote=0),
    Held((20,), rows=3, fmt=FP8, sealed=(0, 3)),
    Held((30, 20), rows=3, sealed=(1, 2), rest=(2, 1), first_vote=1),
    *(Held((30, 7), rows=3, fmt=fmt, sealed=(2, 1), first_vote=1) for fmt in OPENED),
]
CASES = {
    "one token": [Held((1,))],
    "a prompt of a page - 1": [Held((15,), rows=15)],
    "a prompt of a page": [Held((16,), rows=16)],
    "a prompt of a page + 1": [Held((17,), rows=17)],
    "decode at a page - 1": [Held((15,))],
    "decode at a page": [Held((16,))],
    "decode at a page + 1": [Held((17,))],
    "decode at 128 tokens - 1, ± 0 and + 1": [Held((127,)), Held((128,)), Held((129,))],
    "decode over a thousand tokens": [Held((1025,)), Held((900, 200, 3), sealed=(4, 1, 0))],
    "an empty sealed part": [Held((40,), fmt=INT8, sealed=(0,), rows=3)],
    "an open part that is the new row alone": [Held((1,), sealed=(2,)), Held((1,))],
    "lanes of ragged kept length": [Held((40, 3, 17, 100), rows=3)],
    "ragged sealed counts": [Held((24, 150, 7), rows=2, sealed=(2, 0, 1))],
    "a long chunk over sealed and open pages": [Held((180,), rows=130, sealed=(1,))],
    "int8 sealed pages": [Held((30, 4), rows=4, fmt=INT8, sealed=(3, 1))],
    "int2 sealed pages": [Held((30, 4), rows=4, fmt=INT2, sealed=(3, 1))],
    "fp8 sealed pages": [Held((30, 4), rows=4, fmt=FP8, sealed=(3, 1))],
    **{
        f"{fmt.label} sealed pages": [Held((30, 4), rows=4, fmt=fmt, sealed=(3, 1), first_vote=2), Held((20,), fmt=fmt)]
        for fmt in OPENED
    },
    "opened pages of both formats": [
        Held((30, 4), rows=4, fmt=OPENED[0], sealed=(1, 2), rest=(2, 0), rest_fmt=OPENED[1], first_vote=0),
        Held((9, 17), rows=2, fmt=INT8, sealed=(1, 0), rest=(0, 2), rest_fmt=OPENED[1], first_vote=0),
    ],
    "a long chunk over opened pages": [Held((180,), rows=130, fmt=OPENED[0], sealed=(4, 1))],
    "f16 sealed pages": [Held((30, 4), rows=4, fmt=F16, sealed=(3, 1))],
    "sealed pages in a float format": [Held((30, 4), rows=4, fmt=BF16, sealed=(3, 1))],
    "two formats in a lane": [Held((30, 4), rows=4, sealed=(3, 1), rest=(1, 2), first_vote=0)],
    "the second format alone": [Held((3,), rows=3, sealed=(0,), rest=(2, 1), rest_fmt=INT8)],
    "a lane without the second format": [Held((30, 4), rows=4, fmt=INT8, sealed=(0, 2), rest=(1, 0), rest_fmt=INT4)],
    "decode and prefill in one batch, of different formats": MIXED,
    "a vote that starts inside a chunk": [Held((80,), rows=30, first_vote=11)],
    "every row of a long chunk votes": [Held((150,), rows=150, first_vote=0)],
    "a vote of the last row alone": [Held((80,), rows=30, first_vote=29)],
    "a decode row that votes over sealed pages": [Held((50, 20), sealed=(2, 1), first_vote=0)],
    "tokens that stand for many": [Held((50, 20), rows=4, sealed=(2, 1), first_vote=0, weighted=True), Held((40,))],
    "a long chunk over tokens that stand for many": [Held((180,), rows=130, sealed=(1,), weighted=True)],
    "mass, but no voter": [Held((80,), rows=30, first_vote=30), Held((9,), first_vote=1)],
}
cases = pytest.mark.parametrize("held", CASES.values(), ids=CASES.keys())


def _attend(ops: Backend, state: State, q: Tensor, window: int = 0, layer: int = 0) -> Tensor:
    return ops.attention(q, state.batch, state.kv, layer, q.shape[2] ** -0.5, window)


def _assert_parity(native: Backend, reference: Backend, state: State, group: int, window: int = 0) -> None:
    """Output and mass of both backends on the same memory; and no kernel of attention writes a page."""
    kv_heads, theirs, arena = state.kv.table.shape[2], state.copy(), state.kv.data.clone()
    q = randn(state.rows, group * kv_heads, state.kv.layout.head_dim, seed=5)
    expected = _attend(reference, theirs, q, window)
    out = _attend(native, state, q, window)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    assert state.kv.mass.keys() == theirs.kv.mass.keys()
    for slot, mass in theirs.kv.mass.items():
        torch.testing.assert_close(state.kv.mass[slot], mass, atol=2e-5, rtol=2e-5)
    assert torch.equal(state.kv.data, arena)


@cases
@pytest.mark.parametrize("compute", [F32, BF16, F16])
def test_attention_matches_the_reference(
    native: Backend, reference: Backend, held: list[Held], compute: PageFormat
) -> None:
    held = read_by(native, held)
    _assert_parity(native, reference, build(PageLayout(64, compute), held, kv_heads=3), group=3)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("compute", [F32, BF16])
def test_head_shapes(native: Backend, reference: Backend, group: int, dim: int, compute: PageFormat) -> None:
    held = [
        Held((20, 40), rows=9, sealed=(2, 1), evicted=True, first_vote=4),
        Held((30,), fmt=INT8, sealed=(0, 1)),
        Held((5,), fmt=INT2, sealed=(1, 2)),
        Held((5,), fmt=FP8, sealed=(2, 1)),
        *(Held((5,), fmt=fmt, sealed=(2, 1)) for fmt in OPENED),
        Held((20,), rows=20),
    ]
    state = build(PageLayout(dim, compute), read_by(native, held), seed=dim + group)
    _assert_parity(native, reference, state, group)


@pytest.mark.parametrize("page_tokens", [32, 64, 256])
def test_page_sizes(native: Backend, reference: Backend, page_tokens: int) -> None:
    held = [
        Held((40, 300), rows=5, sealed=(2, 0), fmt=INT8),
        Held((300,), rows=300, first_vote=250),
        Held((1,)),
        Held((9,), sealed=(1, 2), fmt=INT2),
        Held((9,), sealed=(1, 2), fmt=FP8),
        *(Held((9,), sealed=(1, 2), fmt=fmt) for fmt in OPENED),
    ]
    _assert_parity(native, reference, build(PageLayout(64, F32, page_tokens), read_by(native, held)), group=2)


WINDOWED = {
    "every token in place": [Held((100,), rows=1), Held((40,), rows=40, first_vote=3), Held((200,), rows=70)],
    "evicted positions": [
        Held((100, 30, 64), rows=1, evicted=True),
        Held((70, 60), rows=40, evicted=True, first_vote=0),
    ],
    "sealed pages left behind": [Held((30, 25), rows=3, sealed=(2, 1)), Held((26,), sealed=(2,))],
    "fewer tokens than the window": [Held((3,), rows=3), Held((1,))],
    "a window beyond several spans": [Held((1100,), rows=2), Held((900,), rows=60)],
}


@pytest.mark.parametrize("window", [1, 5, 16, 17, 90, 5000])
@pytest.mark.parametrize("held", WINDOWED.values(), ids=WINDOWED.keys())
def test_sliding_windows(native: Backend, reference: Backend, held: list[Held], window: int) -> None:
    _assert_parity(native, reference, build(PageLayout(32), held), group=2, window=window)


@pytest.mark.parametrize("window", [0, 10])
def test_a_layer_reads_its_own_pages(native: Backend, reference: Backend, window: int) -> None:
    held = [Held((40, 3, 17, 60, 20, 9), rows=3, first_vote=1), Held((20, 90), sealed=(1, 0))]
    state = build(PageLayout(32, BF16), held, layers=3, kv_heads=2)
    theirs, q = state.copy(), randn(state.rows, 4, 32)
    for layer in (2, 0, 1):
        out, expected = (_attend(ops, s, q, window, layer) for ops, s in ((native, state), (reference, theirs)))
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    for slot, mass in theirs.kv.mass.items():
        torch.testing.assert_close(state.kv.mass[slot], mass, atol=2e-5, rtol=2e-5)


@cases
@pytest.mark.parametrize("window", [0, 12])
def test_attention_is_dense_attention(ops: Backend, held: list[Held], window: int) -> None:
    # Sealed pages in f32 lose nothing, so that the tokens as they were made are the truth.
    held = [replace(h, fmt=F32, rest_fmt=F32) for h in held]
    state = build(PageLayout(64), held, kv_heads=2)
    before = state.copy()
    q = randn(state.rows, 6, 64)
    out = _attend(ops, state, q, window).view(-1, 6, 64)
    for index, slot in enumerate(state.batch.slots.tolist()):
        batch, rows = one_sequence(state.batch, index)
        count, vote = rows.stop - rows.start, int(batch.first_vote)
        for head in range(2):
            keys, values = state.keys[slot, 0, head], state.values[slot, 0, head]
            kept = keys.shape[0]
            mask = torch.ones(count, kept, dtype=torch.bool).tril(kept - count)
            if window:
                lane = state.kv.positions[slot][0, head, :kept] if slot in state.kv.positions else torch.arange(kept)
                mask &= lane > batch.positions[:, None] - window
            queries = q[rows, 3 * head : 3 * head + 3].transpose(0, 1).double()
            weights = state.kv.log_weights[slot][0, head, :kept] if slot in state.kv.log_weights else torch.zeros(kept)
            bias = weights.double().expand(count, -1).masked_fill(~mask, -torch.inf)
            dense = torch.nn.functional.scaled_dot_product_attention(
                queries, keys.double().expand(3, -1, -1), values.double().expand(3, -1, -1), attn_mask=bias
            )
            actual = out[rows, 3 * head : 3 * head + 3].transpose(0, 1).double()
            torch.testing.assert_close(actual, dense, atol=2e-5, rtol=1e-5)
            if slot in state.kv.mass:
                scores = queries @ keys.double().T / 8 + bias
                added = scores.softmax(-1)[:, vote:].sum((0, 1))
                mass = before.kv.mass[slot][0, head].double()
                mass[:kept] += added
                torch.testing.assert_close(state.kv.mass[slot][0, head].double(), mass, atol=2e-5, rtol=2e-5)


def test_scores_far_apart_leave_one_token(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((300,)), Held((40,), sealed=(1,), fmt=F32)], kv_heads=1)
    slots = state.batch.slots.tolist()
    winners = [int(state.keys[slot, 0, 0].norm(dim=1).argmax()) for slot in slots]
    q = torch.stack([1e4 * state.keys[slot, 0, 0][winner] for slot, winner in zip(slots, winners, strict=True)])
    out = _attend(ops, state, q[:, None])
    for row, (slot, winner) in enumerate(zip(slots, winners, strict=True)):
        torch.testing.assert_close(out[row], state.values[slot, 0, 0][winner], atol=1e-6, rtol=1e-6)


def test_the_batch_may_be_empty(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((3,))])
    none = torch.empty(0, dtype=torch.int32)
    state.batch = LaneBatch(none, torch.zeros(1, dtype=torch.int32), none, none)
    assert _attend(ops, state, torch.empty(0, 4, 16)).shape == (0, 64)


@pytest.mark.parametrize("window", [0, 9])
def test_a_sequence_without_rows_changes_nothing(ops: Backend, window: int) -> None:
    state = build(PageLayout(16), [Held((30,), rows=2), Held((30,), rows=0, first_vote=0), Held((5,))])
    q, mass = randn(state.rows, 4, 16), {slot: part.clone() for slot, part in state.kv.mass.items()}
    out = _attend(ops, state, q, window)
    alone, rows = one_sequence(state.batch, 2)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(ops.attention(q[rows], alone, state.kv, 0, 0.25, window), out[rows], atol=0, rtol=0)
    assert all(torch.equal(state.kv.mass[slot], part) for slot, part in mass.items())
