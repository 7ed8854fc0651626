"""Bytes that kernels ask for, against the layout's formula; and that they touch no pages but those of their lanes.

`conftest.py` watches every test of this folder for accesses out of bounds. Here lanes are as ragged as they get.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.errors import InterpreterError

from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.layout import VECTOR, PageFormat, PageLayout
from winnow.kernels.reading import ReadMode, ReadRule, ReadState

from ..build import Held, State, build, int32, randn
from .bytes import watching

pytestmark = pytest.mark.skipif(not knobs.runtime.interpret, reason="accesses are seen in the interpreter")

Q_HEADS = 4
ASKED = {
    PageFormat.BF16: 1.05,
    PageFormat.INT8: 1.15,
    PageFormat.INT4: 1.15,
    PageFormat.INT2: 13.0,
    PageFormat.FP8: 1.1,
    PageFormat.F16: 1.05,
}
"""How often a byte is asked for. Rows of pages are read up to whole vectors; in int2 each number asks for its byte, and
each token for the scales of its channels"""
RAGGED = [
    Held((1,)),  # one token
    Held((9, 1), sealed=(0, 2), evicted=True, first_vote=0),  # a lane without full pages beside one of nothing else
    Held((40, 70), rows=37, sealed=(1, 0), rest=(0, 2), first_vote=3),  # a chunk
    Held((33,), sealed=(2,), rest=(1,), weighted=True),  # page boundary + 1
    Held((8,), rows=8, sealed=(2,), rest=(1,)),  # its full pages are those of the one before
]


@pytest.fixture
def ops() -> Backend:
    """The backend itself, on the memory that is watched."""
    return backend("triton")


@triton.jit
def _copy(x: tl.tensor, y: tl.tensor, shift: tl.tensor, SIZE: tl.constexpr) -> None:
    at = shift + tl.arange(0, SIZE)
    tl.store(y + tl.arange(0, SIZE), tl.load(x + at))


@pytest.mark.parametrize("shift", [-1, 1])
def test_an_access_out_of_bounds_fails(shift: int) -> None:
    memory = torch.zeros(5, 16)
    with pytest.raises(InterpreterError, match="reads 1 numbers out of bounds"):
        _copy[(1,)](memory[1], memory[3], shift, SIZE=16)
    memory[2].data_ptr()  # somebody asks for an address, and may keep it
    if shift == 1:
        _copy[(1,)](memory[1], memory[3], shift, SIZE=16)


def test_programs_that_write_the_same_fail() -> None:
    x, y = torch.zeros(2, 16)
    with pytest.raises(AssertionError, match="two programs write the same 64 bytes"):
        _copy[(2,)](x, y, 0, SIZE=16)


@pytest.mark.parametrize("fmt", ASKED, ids=lambda fmt: fmt.label)
def test_decode_asks_for_what_pages_hold(ops: Backend, fmt: PageFormat) -> None:
    layout = PageLayout(64, PageFormat.BF16, 32)
    sealed, tokens = (0, 77) if fmt is PageFormat.BF16 else (3, 13)
    state = build(layout, [Held((tokens,), sealed=(sealed,), fmt=fmt)], kv_heads=1)
    with watching() as watch:
        ops.attention(randn(1, Q_HEADS, 64).bfloat16(), state.batch, state.kv, 0, 0.125, 0)
    asked, distinct = watch.read(state.kv.data, "attend")
    held = sealed * layout.offsets(fmt).end + tokens * layout.token_bytes(layout.compute)
    # Keys come in whole vectors; and where tokens are masked, the scales of a page that need not be the lane's: at the
    # end of the sealed ones, and of the tile behind them.
    vectors = -tokens % VECTOR * 64 * 2
    scales = layout.offsets(fmt).end - layout.offsets(fmt).k_scale if fmt.is_quantized else 0
    assert held <= distinct <= held + vectors + 2 * scales
    assert asked <= ASKED[fmt] * held


def attention(ops: Backend, state: State, window: int = 0) -> None:
    ops.attention(randn(state.rows, Q_HEADS, 32).bfloat16(), state.batch, state.kv, 0, 0.125, window)


def reading(ops: Backend, state: State) -> None:
    kv, q = state.kv, randn(state.rows, Q_HEADS, 32).bfloat16()
    rule = ReadRule(torch.full((1,), int(ReadMode.CHOSEN), dtype=torch.uint8), tokens=40)
    for slot in state.batch.slots[:2].tolist():
        kv.reading[slot] = ReadState.empty(rule, 1, 2, Q_HEADS, 32)
        kv.reading[slot].resize(int(kv.kept[slot].max()), kv.table.shape[3])
    ops.choose_reads(q, state.batch, kv, 0, 0.125, 0)
    ops.attention(q, state.batch, kv, 0, 0.125, 0)


def writing(ops: Backend, state: State) -> None:
    tables = randn(2, 4096, 16)
    qkv = randn(state.rows, (Q_HEADS + 4) * 32).bfloat16()
    ops.rope_write(qkv, tables[0], tables[1], state.batch, state.kv, 0, None, None, 1e-5)


def repacking(ops: Backend, state: State) -> None:
    """The longest sequence keeps what its first lane has, but for a token, in pages of its own."""
    kv, slot = state.kv, int(state.batch.slots[3])
    keep = torch.arange(1, int(kv.kept[slot].min()), dtype=torch.int32).expand(1, 2, -1).contiguous()
    none, table = int32([[0, 0]]), torch.full((1, 2, 40), -1, dtype=torch.int32)
    pages = kv.layout.pages(keep.shape[2])
    table[0, :, :pages] = state.free[: 2 * pages].view(2, pages)
    ops.repack(kv, slot, keep, none + keep.shape[2], none, table, none + 1, PageFormat.INT8)
    kv.table = torch.cat([kv.table, torch.full((6, 1, 2, 40), -1, dtype=torch.int32)], dim=3)
    kv.table[slot, 0, :, -40:] = table[0]
    ops.read_lanes(kv, int(state.batch.slots[1]), 0)


@pytest.mark.parametrize("call", [attention, reading, writing, repacking])
def test_ragged_lanes(ops: Backend, call: Callable[[Backend, State], None]) -> None:
    """Nothing is read or written but pages of the lanes, those included that two sequences share."""
    state = build(PageLayout(32, PageFormat.BF16, 32), RAGGED, spare=60)
    kv, (first, second) = state.kv, state.batch.slots[3:].tolist()
    kv.table[second, ..., :3] = kv.table[first, ..., :3]
    with watching() as watch:
        call(ops, state)
    own = kv.table[kv.table >= 0].long()
    for by_writes in (False, True):
        touched = watch.touched(kv.data, by_writes).view(kv.data.shape).any(1)
        touched[own] = False
        if not by_writes:
            touched[0] = False  # what is masked may be looked up there
        assert not touched.any(), f"pages {touched.nonzero().flatten().tolist()} are of no lane"
