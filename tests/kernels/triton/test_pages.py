"""Pages written and rewritten by Triton's kernels: every byte as the reference writes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import PagedKV, Rest
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import quantize_fp8
from winnow.kernels.triton import pages
from winnow.kernels.triton.device import page_formats

from ..build import Held, State, assert_same_bits, build, int32, randn
from ..repacking import Move, Repack, plan

F32, BF16, INT8, INT4, INT2, FP8, F16, *_ = PageFormat

# Powers of two and others, in tokens and in channels, of which int2's blocks have 32 in one and 16 in the other.
LAYOUTS = [PageLayout(32, F32), PageLayout(80, BF16, 32)]


def _page(layout: PageLayout, fmt: PageFormat, keys: Tensor, values: Tensor, ops: Backend) -> Tensor:
    """An arena of which one page was written in `fmt`, from one lane's tokens [capacity, D]."""
    kv = PagedKV.allocate(layout, 3, 1, 1, 1, 1)
    kv.data.fill_(255)
    count, one, none = int32([len(keys)]), int32([1]), int32([0])
    ops.write_lanes(kv, 0, 0, keys[None], values[None], count, none, int32([[1]]), one, fmt)
    return kv.data


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("fmt", page_formats())
def test_a_page_is_encoded_bit_for_bit(
    triton: Backend, reference: Backend, layout: PageLayout, fmt: PageFormat
) -> None:
    size = (layout.capacity(fmt), layout.head_dim)
    normal = randn(*size) + 4 * (torch.arange(size[1]) % 8 == 0)
    sides = {
        "as models have them": (normal, randn(*size, seed=2) ** 3),
        "between two codes": ((8 * randn(*size, seed=3)).round(), randn(*size, seed=4).bfloat16().float()),
        "beyond half precision": (1e6 * randn(*size, seed=5), torch.full(size, 7e4)),
        "below the least scale": (1e-8 * randn(*size, seed=6), torch.zeros(size)),
    }
    for name, (keys, values) in sides.items():
        written, expected = (_page(layout, fmt, keys, values, ops) for ops in (triton, reference))
        assert torch.equal(written, expected), name


def test_pages_that_are_opened_are_not_written(triton: Backend) -> None:
    layout, fmt = PageLayout(32, F32), PageFormat.MUSTAFAR50
    with pytest.raises(ValueError, match="no pages in mustafar50"):
        _page(layout, fmt, *randn(2, layout.capacity(fmt), 32), triton)


def test_every_number_is_rounded_to_e4m3_as_torch_rounds_it(triton: Backend) -> None:
    """All 16 bits of the upper half of f32 within ±448, and the numbers halfway between codes with their neighbours."""
    layout = PageLayout(256, F32, 256)
    capacity = layout.capacity(FP8)
    bits = torch.arange(0, 0x43E1).int() << 16
    halfway = (
        torch.arange(0, 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn).float().unfold(0, 2, 1).mean(-1)
    ).view(torch.int32)
    bits = torch.cat([bits, *(halfway + d for d in (-1, 0, 1))])
    numbers = torch.cat([bits, bits | -(2**31)]).view(torch.float32)
    values = torch.zeros(capacity * 256)
    values[: len(numbers)] = numbers
    values = values.view(capacity, 256)
    codes, scale = quantize_fp8(values[None])
    assert float(scale) == 1.0
    at = layout.offsets(FP8)
    page = _page(layout, FP8, values, values, triton)[1]
    assert torch.equal(page[at.values : at.k_scale].view(capacity, 256), codes[0].view(torch.uint8))
    assert torch.equal(page[: at.values].view(256, capacity).T, codes[0].view(torch.uint8))


HELD = {
    "open pages, ragged": Held((0, 17, 40, 16), rows=0),
    "one token": Held((1,)),
    "three parts": Held((5, 20), sealed=(2, 0, 1), rest=(1, 2)),
    "fp8 and float pages": Held((5, 20), sealed=(1, 2), fmt=FP8, rest=(1, 0), rest_fmt=BF16),
}


@pytest.mark.parametrize("held", HELD.values(), ids=HELD.keys())
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_lanes_are_read_as_the_reference_reads_them(
    triton: Backend, reference: Backend, layout: PageLayout, held: Held
) -> None:
    state = build(layout, [held], layers=2)
    for layer in range(2):
        slot = int(state.batch.slots[0])
        for part, expected in zip(
            triton.read_lanes(state.kv, slot, layer), reference.read_lanes(state.kv, slot, layer), strict=True
        ):
            assert_same_bits(part, expected)


MOVES = {
    "evict": Move(Held((60, 3, 117)), BF16, keep=(9, 3, 40, 1), residual=99),
    "seal and leave a residual": Move(Held((300, 211)), INT4, residual=50),
    "seal what follows pages that are sealed": Move(Held((150,), sealed=(2, 1, 0)), INT4, start=(2, 1, 0)),
    "evict, then seal": Move(Held((200, 130)), INT8, keep=(110, 101, 3), residual=32),
    "evict sealed tokens": Move(Held((40, 9), sealed=(3, 1), fmt=INT2), INT2, keep=(250, 60)),
    "a sealed column becomes an open one": Move(Held((40,), sealed=(4,)), INT4, keep=(230,), residual=150),
    "seal to f16": Move(Held((70, 33)), F16, residual=9),
    "seal to a wider format": Move(Held((40,), fmt=INT4, sealed=(3, 1)), FP8, keep=(170, 80)),
    "keep no token of some lanes": Move(Held((60,)), INT4, keep=(20, 0)),
}


@pytest.mark.parametrize("name", MOVES)
def test_every_byte_of_a_move_matches_the_reference(triton: Backend, reference: Backend, name: str) -> None:
    layout, move = LAYOUTS[list(MOVES).index(name) % 2], MOVES[name]  # each in one of them
    assert torch.equal(_moved(triton, layout, move), _moved(reference, layout, move))


@pytest.mark.parametrize("scratch_bytes", [1, 40_000], ids=["lane by lane", "three lanes, then one"])
def test_lanes_that_do_not_fit_at_once_follow_each_other(
    triton: Backend, reference: Backend, monkeypatch: pytest.MonkeyPatch, scratch_bytes: int
) -> None:
    monkeypatch.setattr(pages, "SCRATCH_BYTES", scratch_bytes)
    layout, move = PageLayout(16), Move(Held((90, 45)), INT8, keep=(70, 40, 0, 33), residual=9)
    assert torch.equal(_moved(triton, layout, move), _moved(reference, layout, move))


def _moved(ops: Backend, layout: PageLayout, move: Move) -> Tensor:
    """The arena after a move in four lanes."""
    state = build(layout, [move.held, Held((20,))], layers=2, spare=60)
    plan(state, int(state.batch.slots[0]), move).run(ops, state.kv)
    return state.kv.data


def test_tokens_that_keep_their_format_keep_their_bits(triton: Backend) -> None:
    state = build(PageLayout(32, BF16), [Held((60, 37))], spare=16)
    slot, kv = int(state.batch.slots[0]), state.kv
    kv.data[:, ::7] = 0x3E  # bits that no rounding would leave as they are
    before = triton.read_lanes(kv, slot, 0)
    repack = plan(state, slot, Move(Held((60, 37)), BF16, keep=(99,), residual=99, fresh=True))
    repack.run(triton, kv)
    repack.commit(kv)
    for part, old in zip(triton.read_lanes(kv, slot, 0), before, strict=True):
        assert_same_bits(part, old)


@pytest.mark.parametrize("fresh", [False, True], ids=["in place", "to fresh pages"])
def test_a_second_format_is_laid_out_behind_the_first(triton: Backend, reference: Backend, fresh: bool) -> None:
    """Two lanes: one keeps a page of each part, the other nothing; tokens move in an order of their own."""
    layout, arenas = PageLayout(32, BF16), []
    first, second = layout.capacity(INT4), layout.capacity(INT2)
    for ops in (triton, reference):
        state = build(layout, [Held((70, 90), sealed=(2, 1), rest=(2, 1))], spare=24)
        kv, slot = state.kv, int(state.batch.slots[0])
        start, rest_start = int32([[1, 0]]), int32([[1, 0]])
        low = (2 * first, 2 * first + second)
        movable = [
            [t for t in range(first, int(kv.kept[slot, 0, 0])) if not low[0] <= t < low[1]],
            list(range(int(kv.kept[slot, 0, 1]))),
        ]
        chosen = [torch.tensor(tokens)[torch.randperm(len(tokens), generator=_seeded())][:-9] for tokens in movable]
        keep = torch.full((1, 2, max(map(len, chosen))), -1, dtype=torch.int32)
        for head, tokens in enumerate(chosen):
            keep[0, head, : len(tokens)] = tokens
        sealed, rest = int32([[2, 1]]), int32([[2, 2]])
        table = kv.table[slot].clone()
        if fresh:
            table[:] = state.free[: table.numel()].view(table.shape)
        else:  # own pages that do not stay, a sealed one for one of the second part
            table[0, 0, [1, 3]] = table[0, 0, [3, 1]]
        table = torch.cat([table, state.free[-24:].view(1, 2, 12)], dim=2)
        counts = int32([[len(tokens) for tokens in chosen]])
        ops.repack(kv, slot, keep, counts, start, table, sealed, INT4, Rest(rest_start, rest, INT2))
        arenas.append(kv.data)
    assert torch.equal(*arenas)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_leading_pages_in_the_compute_format_stay(triton: Backend) -> None:
    """The table knows no sealed ones among them."""
    state = build(PageLayout(32, BF16), [Held((60,))])
    kv, slot = state.kv, int(state.batch.slots[0])
    before, table = triton.read_lanes(kv, slot, 0), kv.table[slot].clone()
    two = int32([[2, 2]])
    keep = torch.arange(40, 60, dtype=torch.int32).expand(1, 2, 20)
    triton.repack(kv, slot, keep, int32([[20, 20]]), two, table, two, BF16)
    kv.kept[slot] = 52
    for part, old in zip(triton.read_lanes(kv, slot, 0), before, strict=True):
        assert_same_bits(part, torch.cat([old[:, :32], old[:, 40:]], dim=1))
    with pytest.raises(ValueError, match="stay"):
        triton.repack(kv, slot, None, int32([[4, 4]]), int32([[4, 4]]), table, int32([[4, 4]]), BF16)


def test_pages_are_copied_whole(triton: Backend) -> None:
    state = build(PageLayout(32, BF16), [Held((60,))])
    before, (first, second) = state.kv.data.clone(), state.free[:2].tolist()
    triton.copy_pages(state.kv, int32([2, 0]), int32([first, second]))
    triton.copy_pages(state.kv, int32([]), int32([]))
    before[[first, second]] = before[[2, 0]]
    assert torch.equal(state.kv.data, before)
    for page in (-1, 10_000):
        for src, dst in ((page, 0), (0, page)):
            with pytest.raises(IndexError):
                triton.copy_pages(state.kv, int32([src]), int32([dst]))


def _spoil(name: str, value: int) -> Callable[[Repack], object]:
    return lambda repack: getattr(repack, name)[1, 1].view(-1)[0].fill_(value)


REFUSED: dict[str, Callable[[Repack], object]] = {
    "a token beyond the lane": lambda repack: repack.keep[1, 1, 6].fill_(10_000),  # type: ignore[index]
    "a token twice": lambda repack: repack.keep[1, 1, 6].copy_(repack.keep[1, 1, 5]),  # type: ignore[index]
    "a negative token": _spoil("keep", -1),
    "more tokens than are listed": _spoil("counts", 10),
    "a negative count": _spoil("counts", -1),
    "a negative start": _spoil("start", -1),
    "more pages that stay than are sealed": _spoil("start", 2),
    "more sealed pages than tokens fill": _spoil("dst_sealed", 2),
    "negative sealed": _spoil("dst_sealed", -1),
    "a page beyond the arena": _spoil("dst_table", 10_000),
    "no page": _spoil("dst_table", -1),
    "a slot that is not there": lambda repack: setattr(repack, "slot", 3),
    "a table of another number of lanes": lambda repack: setattr(repack, "dst_table", repack.dst_table[:, :1]),
}


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_index_is_refused_before_a_page_changes(triton: Backend, spoil: Callable[[Repack], object]) -> None:
    state = _two()
    arena = state.kv.data.clone()
    repack = plan(state, int(state.batch.slots[1]), Move(Held((20,), sealed=(1,)), INT4, keep=(7,)))
    spoil(repack)
    with pytest.raises((IndexError, ValueError)):
        repack.run(triton, state.kv)
    assert torch.equal(state.kv.data, arena)


@pytest.mark.parametrize(("column", "page"), [(0, -1), (1, -1), (1, 10_000)])
def test_a_page_of_a_lane_that_is_not_in_the_arena_is_refused(triton: Backend, column: int, page: int) -> None:
    state = _two()
    slot = int(state.batch.slots[1])
    repack = plan(state, slot, Move(Held((20,), sealed=(1,)), INT4, keep=(7,)))
    state.kv.table[slot, 1, 1, column] = page
    with pytest.raises(IndexError):
        triton.read_lanes(state.kv, slot, 1)
    with pytest.raises(IndexError):
        repack.run(triton, state.kv)


def _two() -> State:
    return build(PageLayout(16), [Held((5,)), Held((20,), rows=2, sealed=(1,))], layers=2)
