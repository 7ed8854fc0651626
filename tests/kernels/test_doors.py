"""Every index is checked at the kernel's door: a bad one raises, and no page changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import Held, State, build, int32, randn
from .repacking import Move, Repack, plan

refused = pytest.raises((IndexError, ValueError))


def _state() -> State:
    """Two sequences; the second, whose rows the tests spoil, has two rows in lanes of a sealed page and 20 tokens."""
    return build(PageLayout(16), [Held((5,)), Held((20,), rows=2, sealed=(1,), first_vote=0, evicted=True)], layers=2)


def _put(name: str, value: int) -> Callable[[State, int], object]:
    """Spoils a lane table of layer 1, head 1."""
    return lambda state, slot: getattr(state.kv, name)[slot, 1, 1].fill_(value)


def _page(column: int, value: int) -> Callable[[State, int], object]:
    return lambda state, slot: state.kv.table[slot, 1, 1, column].fill_(value)


def _batch(name: str, numbers: list[int]) -> Callable[[State, int], object]:
    return lambda state, slot: setattr(state.batch, name, int32(numbers))


BATCHES: dict[str, Callable[[State, int], object]] = {
    "a slot beyond the table": _batch("slots", [0, 3]),
    "a negative slot": _batch("slots", [0, -1]),
    "row bounds beyond the rows": _batch("cu_rows", [0, 1, 9]),
    "row bounds that fall": _batch("cu_rows", [0, 5, 3]),
    "row bounds that begin below 0": _batch("cu_rows", [-1, 1, 3]),
    "row bounds that leave rows out": _batch("cu_rows", [1, 2, 3]),
    "too few row bounds": _batch("cu_rows", [0, 3]),
    "too few positions": _batch("positions", [4, 5]),
    "the page of the new rows beyond the arena": _page(2, 10_000),
    "no page for the new rows": _page(2, -1),
    "more rows than kept tokens": _put("kept", 1),
    "more kept tokens than the table is wide": _put("kept", 100_000),
    "negative kept": _put("kept", -5),
    "negative sealed": _put("sealed", -1),
}
batches = pytest.mark.parametrize("spoil", BATCHES.values(), ids=BATCHES.keys())


def _attend(ops: Backend, state: State, layer: int = 1, window: int = 0) -> None:
    ops.attention(randn(3, 4, 16), state.batch, state.kv, layer, 0.25, window)


def _write(ops: Backend, state: State, layer: int = 1) -> None:
    table = randn(300, 8)
    ops.rope_write(randn(3, 8 * 16), table, table, state.batch, state.kv, layer, None, None, 1e-6)


def test_what_the_tests_below_spoil_is_fine(ops: Backend) -> None:
    state = _state()
    _write(ops, state)
    _attend(ops, state)
    _attend(ops, state, window=8)


@batches
def test_attention_refuses(ops: Backend, spoil: Callable[[State, int], object]) -> None:
    state = _state()
    spoil(state, int(state.batch.slots[1]))
    with refused:
        _attend(ops, state)


@batches
def test_rope_write_refuses(ops: Backend, spoil: Callable[[State, int], object]) -> None:
    state = _state()
    lane = state.kv.table[int(state.batch.slots[1]), 1, 1].clone()
    arena = state.kv.data.clone()
    spoil(state, int(state.batch.slots[1]))
    with refused:
        _write(ops, state)
    others = torch.ones(arena.shape[0], dtype=torch.bool)
    others[state.kv.table[state.kv.table >= 0].clamp(max=arena.shape[0] - 1).long()] = False
    others[lane[0]] = True  # the sealed page is never written to
    assert torch.equal(state.kv.data[others], arena[others])


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(ops: Backend, layer: int) -> None:
    state = _state()
    with refused:
        _attend(ops, state, layer)
    with refused:
        _write(ops, state, layer)
    with refused:
        ops.read_lanes(state.kv, 0, layer)


@pytest.mark.parametrize("page", [-1, 10_000])
def test_a_page_of_an_old_token_that_is_not_in_the_arena(ops: Backend, page: int) -> None:
    for column in (0, 1):  # sealed, open
        state = _state()
        slot = int(state.batch.slots[1])
        state.kv.table[slot, 1, 1, column] = page
        with refused:
            _attend(ops, state)
        with refused:
            ops.read_lanes(state.kv, slot, 1)


@pytest.mark.parametrize("position", [-1, 300])
def test_a_position_without_cos_and_sin(ops: Backend, position: int) -> None:
    state = _state()
    state.batch.positions = int32([4, 5, position])
    with refused:
        _write(ops, state)


def test_side_state_that_is_shorter_than_a_lane(ops: Backend) -> None:
    state = _state()
    slot = int(state.batch.slots[1])
    state.kv.mass[slot] = torch.zeros(2, 2, 19)
    with refused:
        _attend(ops, state)
    state = _state()
    state.kv.positions[slot] = torch.zeros(2, 2, 19, dtype=torch.int32)
    with refused:
        _attend(ops, state, window=8)
    state = _state()
    state.kv.log_weights[slot] = torch.zeros(2, 2, 19)
    with refused:
        _attend(ops, state)


def test_a_sealed_page_is_not_written_to(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((1,), sealed=(1,))])
    state.batch.cu_rows, state.batch.positions = int32([0, 2]), int32([95, 96])
    with refused:
        ops.rope_write(randn(2, 128), randn(200, 8), randn(200, 8), state.batch, state.kv, 0, None, None, 1e-6)


@pytest.mark.parametrize("shape", [(3, 7 * 16), (3, 8 * 16 - 1), (2, 8 * 16)], ids=["heads", "dim", "rows"])
def test_projections_that_do_not_fit(ops: Backend, shape: tuple[int, int]) -> None:
    state, table = _state(), randn(300, 8)
    if shape == (3, 7 * 16):  # three query heads for two KV heads
        shape = (3, 5 * 16)
    with refused:
        ops.rope_write(randn(*shape), table, table, state.batch, state.kv, 0, None, None, 1e-6)


@pytest.mark.parametrize("norm", [8, 24])
def test_head_norms_that_do_not_fit(ops: Backend, norm: int) -> None:
    state, table, weight = _state(), randn(300, 8), torch.ones(16)
    for weights in ((torch.ones(norm), weight), (weight, torch.ones(norm))):
        with refused:
            ops.rope_write(randn(3, 128), table, table, state.batch, state.kv, 0, *weights, 1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 16), (3, 4, 32), (2, 4, 16)], ids=["heads", "dim", "rows"])
def test_queries_that_do_not_fit(ops: Backend, shape: tuple[int, int, int]) -> None:
    state = _state()
    with refused:
        ops.attention(randn(*shape), state.batch, state.kv, 0, 0.25, 0)


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_is_not_there(ops: Backend, slot: int) -> None:
    state = _state()
    with refused:
        ops.read_lanes(state.kv, slot, 0)
    repack = plan(state, int(state.batch.slots[1]), Move(Held((20,), sealed=(1,)), PageFormat.INT4, keep=(7,)))
    repack.slot = slot
    with refused:
        repack.run(ops, state.kv)


@pytest.mark.parametrize("token", [-1, 9, 2**31 - 1])
def test_a_token_beyond_the_vocabulary(ops: Backend, token: int) -> None:
    with refused:
        ops.embed(int32([3, token]), ops.pack(randn(9, 8), "f32"))


@pytest.mark.parametrize("page", [-1, 10_000])
def test_a_copy_from_or_to_a_page_that_is_not_there(ops: Backend, page: int) -> None:
    state = _state()
    arena = state.kv.data.clone()
    for src, dst in ((page, 0), (0, page)):
        with refused:
            ops.copy_pages(state.kv, int32([src]), int32([dst]))
    with refused:
        ops.copy_pages(state.kv, int32([0, 1]), int32([2, 3, 4]))
    assert torch.equal(state.kv.data, arena)


def _spoil(name: str, value: int) -> Callable[[Repack], object]:
    return lambda repack: getattr(repack, name)[1, 1].view(-1)[0].fill_(value)


REPACKS: dict[str, Callable[[Repack], object]] = {
    "a token beyond the lane": lambda repack: repack.keep[1, 1, 6].fill_(10_000),  # type: ignore[index]
    "a negative token": _spoil("keep", -1),
    "more tokens than are listed": _spoil("counts", 10),
    "a negative count": _spoil("counts", -1),
    "a negative start": _spoil("start", -1),
    "more sealed pages than tokens fill": _spoil("dst_sealed", 2),
    "negative sealed": _spoil("dst_sealed", -1),
    "a page beyond the arena": _spoil("dst_table", 10_000),
    "no page": _spoil("dst_table", -1),
}


@pytest.mark.parametrize("spoil", REPACKS.values(), ids=REPACKS.keys())
def test_repack_refuses(ops: Backend, spoil: Callable[[Repack], object]) -> None:
    state = _state()
    arena = state.kv.data.clone()
    repack = plan(state, int(state.batch.slots[1]), Move(Held((20,), sealed=(1,)), PageFormat.INT4, keep=(7,)))
    target = repack.written()
    spoil(repack)
    with refused:
        repack.run(ops, state.kv)
    others = torch.ones(arena.shape[0], dtype=torch.bool)
    others[target] = False
    assert torch.equal(state.kv.data[others], arena[others])


def test_repack_refuses_more_tokens_than_the_lane_holds(ops: Backend) -> None:
    state = _state()
    repack = plan(state, int(state.batch.slots[1]), Move(Held((20,), sealed=(1,)), PageFormat.INT4))
    repack.counts += 1
    with refused:
        repack.run(ops, state.kv)


@pytest.mark.parametrize("cols", [7, 9], ids=["too few", "too many"])
def test_a_product_of_sizes_that_do_not_fit(ops: Backend, cols: int) -> None:
    w = ops.pack(randn(9, 8), "f32")
    with refused:
        ops.linear(randn(3, cols), w)
    with refused:
        ops.linear(randn(3, 8), w, torch.empty(3, 8))
    with refused:
        ops.linear(randn(3, 8), w, accumulate=True)
    with refused:
        ops.pack(randn(9, 8), "f32", randn(8))
    with refused:
        ops.rms_norm(randn(3, 8), torch.ones(16), 1e-6)
