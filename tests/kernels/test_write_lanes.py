"""Writing given tokens to lanes: what `repack` moves, taken in hand and put down again, must give the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import Held, State, build, int32, randn
from .repacking import Move, Repack, plan
from .test_repack import MOVES

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat


def _write(ops: Backend, state: State, repack: Repack) -> None:
    """The move of `repack`, layer by layer, with the tokens read and written in f32."""
    for layer in range(state.kv.table.shape[1]):
        lanes = ops.read_lanes(state.kv, repack.slot, layer)
        counts = repack.counts[layer]
        moved = [torch.full((2, int(counts.max()) + 1, state.kv.layout.head_dim), torch.nan) for _ in lanes]
        for head in range(2):
            stay = int(repack.start[layer, head]) * state.kv.layout.capacity(repack.fmt)
            for part, lane in zip(moved, lanes, strict=True):
                part[head, : int(counts[head])] = lane[head, repack.tokens[layer, head][stay:]]
        positions = torch.full(moved[0].shape[:2], -1, dtype=torch.int32)
        for head, lane in enumerate(repack.positions(state.kv)[layer]):
            stay, count = int(repack.start[layer, head]) * state.kv.layout.capacity(repack.fmt), int(counts[head])
            positions[head, :count] = lane[stay : stay + count]
        _put(ops, state, repack, layer, *moved, positions)


def _put(
    ops: Backend,
    state: State,
    repack: Repack,
    layer: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> None:
    parts = (part[layer] for part in (repack.counts, repack.start, repack.dst_table, repack.dst_sealed))
    ops.write_lanes(state.kv, repack.slot, layer, keys, values, *parts, repack.fmt, positions)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
@pytest.mark.parametrize("compute", [F32, BF16])
def test_lays_tokens_out_as_repack_does(ops: Backend, reference: Backend, move: Move, compute: PageFormat) -> None:
    arenas = []
    for run in (
        lambda state, repack: _write(ops, state, repack),
        lambda state, repack: repack.run(reference, state.kv),
    ):
        state = build(PageLayout(32, compute), [move.held, Held((20,))], layers=2, kv_heads=2, spare=160)
        tables = [part.clone() for part in (state.kv.table, state.kv.kept, state.kv.sealed)]
        run(state, plan(state, int(state.batch.slots[0]), move))
        assert all(
            torch.equal(part, old)
            for part, old in zip((state.kv.table, state.kv.kept, state.kv.sealed), tables, strict=True)
        )
        arenas.append(state.kv.data)
    assert torch.equal(*arenas)


def _spoil(name: str, value: int) -> Callable[[Repack], object]:
    return lambda repack: getattr(repack, name)[1, 1].view(-1)[0].fill_(value)


SPOILED: dict[str, Callable[[Repack], object]] = {
    "more tokens than are given": _spoil("counts", 10_000),
    "a negative count": _spoil("counts", -1),
    "a negative start": _spoil("start", -1),
    "more sealed pages than tokens fill": _spoil("dst_sealed", 2),
    "negative sealed": _spoil("dst_sealed", -1),
    "a page beyond the arena": _spoil("dst_table", 10_000),
    "no page": _spoil("dst_table", -1),
    "a slot that is not there": lambda repack: setattr(repack, "slot", 9),
    "a table of another number of lanes": lambda repack: setattr(repack, "dst_table", repack.dst_table[:, :1]),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_refuses_what_leaves_its_array(ops: Backend, spoil: Callable[[Repack], object]) -> None:
    state = build(PageLayout(16), [Held((5,)), Held((20,), rows=2)], layers=2)
    repack = plan(state, int(state.batch.slots[1]), Move(Held((20,)), INT4, keep=(7,)))
    arena, target = state.kv.data.clone(), repack.written()
    spoil(repack)
    with pytest.raises((IndexError, ValueError)):
        _put(ops, state, repack, 1, randn(2, 7, 16), randn(2, 7, 16))
    others = torch.ones(arena.shape[0], dtype=torch.bool)
    others[target] = False
    assert torch.equal(state.kv.data[others], arena[others])


@pytest.mark.parametrize("layer", [-1, 2])
def test_refuses_a_layer_that_is_not_there(ops: Backend, layer: int) -> None:
    state = build(PageLayout(16), [Held((20,))], layers=2)
    repack = plan(state, int(state.batch.slots[0]), Move(Held((20,)), INT4, keep=(7,)))
    parts = (repack.counts[0], repack.start[0], repack.dst_table[0], repack.dst_sealed[0])
    with pytest.raises((IndexError, ValueError)):
        ops.write_lanes(state.kv, repack.slot, layer, randn(2, 7, 16), randn(2, 7, 16), *parts, INT4)
    for shape in ((1, 7, 16), (2, 7, 8)):
        with pytest.raises((IndexError, ValueError)):
            ops.write_lanes(state.kv, repack.slot, 0, randn(*shape), randn(*shape), *parts, INT4)


def test_refuses_positions_of_other_tokens(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((20,))], layers=2)
    repack = plan(state, int(state.batch.slots[0]), Move(Held((20,)), INT4, keep=(7,)))
    parts = (repack.counts[0], repack.start[0], repack.dst_table[0], repack.dst_sealed[0])
    with pytest.raises(ValueError, match="positions"):
        ops.write_lanes(state.kv, repack.slot, 0, randn(2, 7, 16), randn(2, 7, 16), *parts, INT4, int32([[1], [2]]))
