"""Attention in Triton against the reference, where the interpreter takes the GPU's place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reading import ReadMode, ReadRule, ReadState
from winnow.kernels.triton.config import attend_tile

from ..build import Held, State, assert_same_bits, build, one_sequence, randn

F32, BF16, INT8, INT4, INT2, FP8, F16, *_ = PageFormat


def _attend(ops: Backend, state: State, q: Tensor, window: int = 0, layer: int = 0) -> Tensor:
    return ops.attention(q, state.batch, state.kv, layer, q.shape[2] ** -0.5, window)


def _assert_parity(triton: Backend, reference: Backend, state: State, group: int, window: int = 0) -> None:
    """Outputs and masses, in both types of activations."""
    heads, dim = state.kv.table.shape[2], state.kv.layout.head_dim
    q = randn(state.rows, group * heads, dim, seed=5)
    # In bf16 the error of a row is that of its weights and values, rounded to 8 bits.
    for queries, tolerance in ((q, {"atol": 2e-5, "rtol": 1e-5}), (q.bfloat16(), {"atol": 2e-2, "rtol": 2e-2})):
        ours, theirs = state.copy(), state.copy()
        out = _attend(triton, ours, queries, window)
        assert out.dtype == queries.dtype
        torch.testing.assert_close(out.float(), _attend(reference, theirs, queries.float(), window), **tolerance)
        for slot, mass in theirs.kv.mass.items():
            torch.testing.assert_close(ours.kv.mass[slot], mass, **(tolerance | {"rtol": tolerance["atol"]}))


CASES = {
    "one token": [Held((1,))],
    "decode and chunks over open pages": [Held((70, 33, 1)), Held((90,), rows=90), Held((40,), rows=2)],
    "every format, alone and as a second one": [
        Held((12,), fmt=INT8, sealed=(0, 2)),
        Held((5,), fmt=INT4, sealed=(2, 1), rest=(1, 0), rest_fmt=INT2),
        Held((17, 2), fmt=BF16, sealed=(2, 0), rest=(0, 2), rest_fmt=FP8),
        Held((17, 2), fmt=F16, sealed=(2, 1), first_vote=0),
        Held((20,), fmt=F32, sealed=(1, 3), rest=(2, 1), rest_fmt=INT8),
    ],
    "chunks over full pages": [
        Held((30,), rows=25, fmt=INT8, sealed=(0, 2)),
        Held((41, 30), rows=30, fmt=FP8, sealed=(0, 2), rest=(1, 0), rest_fmt=INT4),
        Held((3,), fmt=INT2, sealed=(1, 0)),
    ],
    "tokens that stand for many": [Held((50, 20), rows=4, sealed=(2, 1), weighted=True), Held((40,))],
    "a sequence without rows": [Held((30,), rows=2), Held((30,), rows=0), Held((5,))],
    "lanes for several programs, and for one": [
        Held((600, 3), first_vote=0),  # in the second lane all shares but the first are empty
        Held((1,), sealed=(6, 2), rest=(0, 10), rest_fmt=INT8),  # the new row alone is open
    ],
}


@pytest.mark.parametrize("held", CASES.values(), ids=CASES.keys())
def test_attention_matches_the_reference(triton: Backend, reference: Backend, held: list[Held]) -> None:
    compute = BF16 if all(F32 not in (one.fmt, one.rest_fmt) for one in held) else F32
    _assert_parity(triton, reference, build(PageLayout(64, compute), held), group=3)


@pytest.mark.parametrize("held", [CASES["every format, alone and as a second one"], CASES["chunks over full pages"]])
def test_attention_in_f16(triton: Backend, reference: Backend, held: list[Held]) -> None:
    state = build(PageLayout(64, F16, 32), [*held, Held((70, 33), rows=2, first_vote=0), Held((90,), rows=90)])
    theirs, q = state.copy(), randn(state.rows, 6, 64, seed=5).half()
    out = _attend(triton, state, q)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), _attend(reference, theirs, q.float()), atol=4e-3, rtol=4e-3)
    for slot, mass in theirs.kv.mass.items():
        torch.testing.assert_close(state.kv.mass[slot], mass, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(("group", "dim"), [(1, 80), (7, 16), (20, 32), (3, 96), (4, 128), (2, 256)])
def test_head_shapes(triton: Backend, reference: Backend, group: int, dim: int) -> None:
    held = [
        Held((9, 20), rows=2, fmt=INT4, sealed=(0, 1), first_vote=1),
        Held((5,), fmt=INT2, sealed=(1, 0), rest=(0, 1), rest_fmt=FP8),
        Held((20,), rows=20, fmt=INT8, sealed=(1,)),
    ]
    _assert_parity(triton, reference, build(PageLayout(dim, BF16), held, kv_heads=1, seed=dim), group)


def test_pages_that_sequences_share(triton: Backend, reference: Backend) -> None:
    """The first pages of all lanes, sealed ones and open ones, as a prefix that was found is held."""
    held = [Held((70, 20), sealed=(2, 1)), Held((40,), rows=7, sealed=(2, 1)), Held((33,), rows=33), Held((50,))]
    state = build(PageLayout(64, BF16, 32), held)
    table, (first, second, third, fourth) = state.kv.table, state.batch.slots.tolist()
    table[second, 0, 0, :3], table[second, 0, 1, :1] = table[first, 0, 0, :3], table[first, 0, 1, :1]
    table[fourth, ..., :1] = table[third, ..., :1]
    _assert_parity(triton, reference, state, group=2)


def test_parts_of_a_chunk_in_blocks_of_their_own(
    triton: Backend, reference: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.kernels.triton.config.architecture", lambda: 80)
    assert [attend_tile(False, 1, 80, False, fmt).M for fmt in (INT4, BF16)] == [32, 64]
    held = [
        Held((90, 70), rows=70, fmt=INT4, sealed=(1, 0), rest=(0, 1), rest_fmt=INT2),
        Held((40,), rows=33, fmt=INT8, sealed=(1,)),
        Held((5,), fmt=INT4, sealed=(1,)),
    ]
    _assert_parity(triton, reference, build(PageLayout(80, BF16), held), group=1)


@pytest.mark.parametrize("window", [1, 70])
def test_sliding_windows(triton: Backend, reference: Backend, window: int) -> None:
    held = [
        Held((100,)),
        Held((60, 50), rows=9, evicted=True),
        Held((80,), rows=45),
        Held((26,), rows=9, sealed=(3,), evicted=True),
    ]
    _assert_parity(triton, reference, build(PageLayout(32), held), group=4, window=window)


def test_rows_read_what_they_chose(triton: Backend, reference: Backend) -> None:
    held = [Held((200,), sealed=(2, 1)), Held((40,), rows=3), Held((50, 30), rows=9, fmt=INT8, sealed=(1, 2))]
    state, rng = build(PageLayout(32), held, layers=2), torch.Generator().manual_seed(6)
    rule = ReadRule(torch.tensor([ReadMode.ALL_AND_CHOOSE, ReadMode.CHOSEN], dtype=torch.uint8), tokens=8)
    slots = state.batch.slots.tolist()
    for b in (0, 2):
        state.kv.reading[slots[b]] = ReadState.empty(rule, 2, 2, 4, 32)
        state.kv.reading[slots[b]].resize(0, state.kv.table.shape[3])
    state.batch.make_room_for_choices(state.kv)
    for b, choice in state.batch.choices.items():
        choice.copy_(torch.rand(choice.shape, generator=rng) < 0.1)
        for head, kept in enumerate(state.kv.kept[slots[b], 1].tolist()):
            for row in range(choice.shape[0]):
                choice[row, head, kept - choice.shape[0] + row] = 1
    q = randn(state.rows, 4, 32, seed=5)
    for layer in (0, 1):
        torch.testing.assert_close(
            _attend(triton, state, q, 0, layer), _attend(reference, state, q, 0, layer), atol=2e-5, rtol=1e-5
        )
    # Where nothing is chosen nothing is read: numbers that would spoil the rest.
    full, pages = int(state.kv.sealed[slots[0], 1, 0]), state.kv.table[slots[0], 1, 0]
    first = full * state.kv.layout.capacity(INT4)
    state.batch.choices[0][:, 0, first : first + 128] = 0
    expected = _attend(reference, state, q, 0, 1)
    state.kv.data[pages[full : full + 8].long()] = 255
    torch.testing.assert_close(_attend(triton, state, q, 0, 1), expected, atol=2e-5, rtol=1e-5)


def test_attention_adds_to_the_mass(triton: Backend, reference: Backend) -> None:
    held = [Held((40, 30), rows=20, first_vote=9, sealed=(1, 2)), Held((25,), sealed=(1,), first_vote=0), Held((9,))]
    state = build(PageLayout(32, BF16), held, layers=2)
    theirs, q = state.copy(), randn(state.rows, 6, 32)
    for ops, one in ((triton, state), (reference, theirs)):
        _attend(ops, one, q, 0, 1)
    for slot, mass in theirs.kv.mass.items():
        torch.testing.assert_close(state.kv.mass[slot], mass, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_batch_mates_change_no_bit(triton: Backend, dtype: torch.dtype) -> None:
    # Mates of other formats, a longer lane that makes the table wider, and side state that only they have.
    held = [
        Held((70,), rows=2, fmt=INT4, sealed=(2,)),
        Held((40,), rows=40, fmt=INT8, sealed=(1,)),
        Held((600,), fmt=FP8, sealed=(1,), rest=(2,), rest_fmt=INT2, weighted=True, evicted=True, first_vote=0),
    ]
    state = build(PageLayout(16, BF16), held, kv_heads=1)
    q = randn(state.rows, 2, 16).to(dtype)
    out = _attend(triton, state, q, window=50).float()
    for index in range(2):
        alone, rows = one_sequence(state.batch, index)
        narrow = replace(state.kv, table=state.kv.table[..., :12].contiguous())
        assert_same_bits(triton.attention(q[rows], alone, narrow, 0, 0.25, 50).float(), out[rows])


def test_what_does_not_fit_is_refused(triton: Backend) -> None:
    state = build(PageLayout(16), [Held((3,))])
    with pytest.raises(ValueError, match="KV heads"):
        _attend(triton, state, randn(1, 3, 16))
    with pytest.raises(ValueError, match="is not"):
        _attend(triton, state, randn(2, 4, 16))
    with pytest.raises(IndexError, match="layer 1"):
        _attend(triton, state, randn(1, 4, 16), layer=1)
