"""Reading lanes and copying pages."""

from __future__ import annotations

import pytest
import torch

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import FORMATS, Held, assert_same_bits, build, int32, place_of, read_by
from .repacking import stored

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat

CASES = {
    "one token": [Held((1,))],
    "a page - 1, ± 0 and + 1": [Held((15,)), Held((16,)), Held((17,))],
    "ragged lanes, one of them empty": [Held((0, 40, 7), rows=0)],
    "no token": [Held((0,), rows=0)],
    "int4 pages and an open part": [Held((5, 20), sealed=(2, 1))],
    "int8 pages and no open part": [Held((0,), rows=0, sealed=(2, 3), fmt=INT8)],
    "int2 pages": [Held((5, 20), sealed=(2, 1), fmt=INT2)],
    "fp8 pages": [Held((5, 20), sealed=(2, 1), fmt=FP8)],
    "int4 and int2 pages": [Held((5, 20), sealed=(2, 0), rest=(1, 2))],
    **{f"{fmt.label} pages": [Held((5, 20), sealed=(2, 1), fmt=fmt)] for fmt in FORMATS if fmt.is_opened},
    "bf16 pages and ragged sealed counts": [Held((5,), sealed=(2, 0, 1), fmt=BF16)],
    "f32 pages": [Held((5,), sealed=(2, 0, 1), fmt=F32)],
}
cases = pytest.mark.parametrize("held", CASES.values(), ids=CASES.keys())


@cases
@pytest.mark.parametrize("dim", [16, 80, 128])
@pytest.mark.parametrize("compute", [F32, BF16])
def test_lanes_are_read_as_their_pages_store_them(
    ops: Backend, held: list[Held], dim: int, compute: PageFormat
) -> None:
    layout, held = PageLayout(dim, compute), read_by(ops, held)
    state = build(layout, held, layers=2, kv_heads=3)
    for slot, one in zip(state.batch.slots.tolist(), held, strict=True):
        for layer in range(2):
            kept = state.kv.kept[slot, layer]
            lanes = ops.read_lanes(state.kv, slot, layer)
            for part in lanes:
                assert part.dtype == torch.float32
                assert part.shape == (3, int(kept.max()), dim)
            for head in range(3):
                lane, count = (slot, layer, head), int(kept[head])
                full = int(state.kv.sealed[lane]) * layout.capacity(one.fmt)
                rest_full = int(state.kv.rest[lane]) * layout.capacity(one.rest_fmt)
                made = (state.keys[lane], state.values[lane])
                place = place_of(state.kv, *lane, torch.arange(count))
                expected = stored(layout, made, one.fmt, full, one.rest_fmt, rest_full, place=place)
                for part, tokens in zip(lanes, expected, strict=True):
                    assert_same_bits(part[head, :count], tokens)
                    assert not part[head, count:].any()


def test_a_free_slot_has_no_tokens(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((5,))])
    free = 1 - int(state.batch.slots[0])
    assert [part.shape for part in ops.read_lanes(state.kv, free, 0)] == [(2, 0, 16)] * 2


def test_pages_are_copied_whole(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((100, 20), sealed=(1,))])
    data = state.kv.data
    data.copy_(torch.randint(256, data.shape, generator=torch.Generator().manual_seed(0)))
    before, (first, second, third) = data.clone(), state.free[:3].tolist()
    ops.copy_pages(state.kv, int32([0, 4, 0]), int32([first, second, third]))
    before[first], before[second], before[third] = before[0].clone(), before[4].clone(), before[0].clone()
    assert torch.equal(data, before)
    ops.copy_pages(state.kv, int32([]), int32([]))
    assert torch.equal(data, before)
