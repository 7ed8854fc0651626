"""Attention gives a row the same bits alone, in any batch, and however its prompt was cut into chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import Held, assert_same_bits, build, chunk_of, one_sequence, randn, read_by
from .test_attention import MIXED, OPENED

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat
windows = pytest.mark.parametrize("window", [0, 20])


@windows
@pytest.mark.parametrize("compute", [F32, BF16])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_alone_and_in_a_batch(native: Backend, compute: PageFormat, group: int, window: int) -> None:
    held = [*MIXED, Held((1,)), Held((900, 700), sealed=(1, 0), first_vote=0), Held((130,), rows=130)]
    state = build(PageLayout(64, compute), read_by(native, held), kv_heads=2)
    untouched = state.copy()
    q = randn(state.rows, 2 * group, 64)
    together = native.attention(q, state.batch, state.kv, 0, 0.125, window)
    for index, slot in enumerate(state.batch.slots.tolist()):
        batch, rows = one_sequence(state.batch, index)
        alone = replace(untouched.copy(), batch=batch)
        assert_same_bits(native.attention(q[rows], alone.batch, alone.kv, 0, 0.125, window), together[rows])
        if slot in state.kv.mass:
            assert_same_bits(alone.kv.mass[slot], state.kv.mass[slot])


CUTS = {
    "one row at a time": range(202),
    "two chunks": [0, 77, 201],
    "at page boundaries": [0, 16, 32, 96, 112, 201],
    "a few rows, many, one": [0, 3, 190, 191, 201],
}


@windows
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize(
    "held",
    [
        pytest.param(Held((201,), rows=201, first_vote=0), id="a whole prompt"),
        pytest.param(Held((701,), rows=201, first_vote=90), id="behind a long prefix"),
        pytest.param(Held((220, 251), rows=201, sealed=(2, 1), first_vote=150), id="behind sealed pages"),
        *(
            pytest.param(
                Held((220, 251), rows=201, fmt=fmt, sealed=(2, 1), first_vote=150), id=f"behind {fmt.label} pages"
            )
            for fmt in OPENED
        ),
        pytest.param(Held((251,), rows=201, first_vote=0, weighted=True), id="tokens that stand for many"),
        pytest.param(Held((220, 251), rows=201, sealed=(1,), rest=(2, 1), first_vote=150), id="behind two formats"),
    ],
)
def test_a_prompt_cut_into_chunks(native: Backend, held: Held, cut: Iterable[int], window: int) -> None:
    if native.device().type == "cuda":
        pytest.skip("on a GPU a chunk's length chooses the tiles, and with them the order of sums")
    whole = build(PageLayout(32, BF16), [held], kv_heads=2)
    cut_up = whole.copy()
    slot, q = int(whole.batch.slots[0]), randn(201, 6, 32)
    expected = native.attention(q, whole.batch, whole.kv, 0, 0.2, window)
    for first, last in pairwise(cut):
        cut_up.kv.kept[slot] = whole.kv.kept[slot] - 201 + last
        batch = chunk_of(whole.batch, first, last)
        out = native.attention(q[first:last].contiguous(), batch, cut_up.kv, 0, 0.2, window)
        assert_same_bits(out, expected[first:last])
    assert_same_bits(cut_up.kv.mass[slot], whole.kv.mass[slot])


def test_page_ids_do_not_matter(native: Backend) -> None:
    outs = []
    for seed in (3, 4):
        state = build(PageLayout(32), [Held((30, 150), rows=5, sealed=(1, 0), fmt=INT8)], seed=3)
        if seed == 4:  # the same tokens, on pages turned round
            state.kv.data = state.kv.data.flip(0)
            taken = state.kv.table >= 0
            state.kv.table[taken] = state.kv.data.shape[0] - 1 - state.kv.table[taken]
        outs.append(native.attention(randn(5, 4, 32), state.batch, state.kv, 0, 0.2, 0))
    assert_same_bits(*outs)


def test_a_second_call_gives_the_same_bits(native: Backend) -> None:
    state = build(PageLayout(64), read_by(native, MIXED), kv_heads=2)
    q = randn(state.rows, 6, 64)
    first, second = (native.attention(q, s.batch, s.kv, 0, 0.125, 0) for s in (state.copy(), state.copy()))
    assert_same_bits(first, second)
    assert first.dtype == torch.float32
