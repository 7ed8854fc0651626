"""The arena by itself: pages taken, shared, copied and given back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.engine.pages import Ints, OutOfPages, PageArena
from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout

LAYERS, HEADS = 2, 2
NONE = np.empty(0, np.int32)


@pytest.fixture
def arena(ops: Backend) -> PageArena:
    return PageArena(PageLayout(16), pages=64, slots=4, layers=LAYERS, kv_heads=HEADS, ops=ops)


def ints(*values: int) -> Ints:
    return np.array(values, np.int32)


def lanes(*values: int) -> Ints:
    """[layers, kv_heads]"""
    return ints(*values).reshape(LAYERS, HEADS)


def opened(arena: PageArena, tokens: int, fmt: PageFormat = PageFormat.F32) -> int:
    slot = arena.open_slot(fmt)
    arena.extend(ints(slot), ints(tokens))
    return slot


def held(arena: PageArena) -> int:
    arena.check_integrity(NONE)
    return arena.total - arena.free_count


@pytest.mark.parametrize(("tokens", "pages"), [(1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_extend_takes_pages_where_they_are_needed(arena: PageArena, tokens: int, pages: int) -> None:
    slot = arena.open_slot(PageFormat.F32)
    for step in range(1, tokens + 1):
        wanted = int(arena.pages_to_extend(ints(slot), ints(1))[0])
        before = arena.free_count
        arena.extend(ints(slot), ints(1))
        assert before - arena.free_count == wanted
        assert (arena.kept[slot] == step).all()
    at_once = opened(arena, tokens)
    assert len(arena.held(slot)) == len(arena.held(at_once)) == pages * arena.lanes
    assert held(arena) == 2 * pages * arena.lanes
    assert arena.close_slot(slot) == pages * arena.lanes
    assert arena.close_slot(at_once) == pages * arena.lanes
    assert held(arena) == 0


def test_extend_serves_several_sequences_at_once(arena: PageArena) -> None:
    slots = ints(opened(arena, 5), opened(arena, 31))
    assert arena.pages_to_extend(slots, ints(40, 2)).tolist() == [8, 4]
    arena.extend(slots, ints(40, 2))
    assert arena.kept[slots].max((1, 2)).tolist() == [45, 33]
    assert held(arena) == 4 * (3 + 3)


def test_ragged_lanes_take_pages_one_by_one(arena: PageArena) -> None:
    slot = opened(arena, 40)
    table = arena.table[slot].copy()
    assert arena.replace(slot, table, lanes(1, 1, 2, 3), lanes(15, 16, 31, 40), lanes(0, 0, 0, 0)) == 5
    assert arena.pages_to_extend(ints(slot), ints(1)).tolist() == [1]
    arena.extend(ints(slot), ints(2))
    assert arena.columns[slot].tolist() == [[2, 2], [3, 3]]
    assert held(arena) == 10


def test_sealed_pages_count_by_their_own_capacity(arena: PageArena) -> None:
    packed = arena.layout.capacity(PageFormat.INT4)
    slot = opened(arena, packed + 3, PageFormat.INT4)
    arena.replace(slot, arena.table[slot].copy(), lanes(2, 2, 2, 2), lanes(*[packed + 3] * 4), lanes(1, 1, 1, 1))
    assert held(arena) == 8
    assert arena.pages_to_extend(ints(slot, slot), ints(13, 14)).tolist() == [0, 4]
    report = arena.report(slot, packed + 3)
    assert report.bytes_held == 8 * arena.layout.page_bytes
    assert report.bytes_uncompressed == 4 * arena.layout.pages(packed + 3) * arena.layout.page_bytes


def test_out_of_pages_changes_nothing(arena: PageArena) -> None:
    opened(arena, 16 * 15)
    asked: list[int] = []
    arena.reclaim = asked.append
    with pytest.raises(OutOfPages):
        arena.take(5)
    assert asked == [1]
    assert held(arena) == 60
    assert len(arena.take(4)) == 4


def test_the_table_grows_and_keeps_what_it_had(ops: Backend) -> None:
    arena = PageArena(PageLayout(16), pages=1000, slots=2, layers=1, kv_heads=1, ops=ops)
    width = arena.kv.table.shape[-1]
    slot = opened(arena, 16 * width)
    before = arena.table[slot].copy()
    arena.extend(ints(slot), ints(16 * 3 * width))
    assert arena.kv.table.shape[-1] >= 4 * width
    assert np.array_equal(arena.table[slot, ..., :width], before)
    assert len(arena.held(slot)) == 4 * width
    arena.close_slot(slot)
    arena.check_integrity(NONE)


def fill(arena: PageArena, slot: int) -> None:
    """Every byte of the sequence's pages says which page it is."""
    pages = torch.from_numpy(arena.held(slot)).long()
    arena.kv.data[pages] = pages.to(torch.uint8)[:, None].expand(-1, arena.layout.page_bytes)


def test_a_fork_shares_all_pages_and_copies_the_open_one(arena: PageArena) -> None:
    first = opened(arena, 20)
    fill(arena, first)
    second = arena.open_slot(PageFormat.F32)
    arena.fork(first, second)
    assert held(arena) == 8
    assert np.array_equal(arena.held(first), arena.held(second))
    assert arena.pages_to_extend(ints(first, second), ints(1, 1)).tolist() == [4, 4]

    shared = arena.table[first].copy()
    arena.extend(ints(second), ints(1))
    assert held(arena) == 12
    assert np.array_equal(arena.table[first], shared)
    assert np.array_equal(arena.table[second, ..., 0], shared[..., 0])
    copies = arena.table[second, ..., 1]
    assert not np.isin(copies, shared).any()
    assert np.array_equal(arena.kv.data.numpy()[copies], arena.kv.data.numpy()[shared[..., 1]])

    arena.extend(ints(first), ints(1))  # nobody else refers to its open pages any more
    assert held(arena) == 12
    assert np.array_equal(arena.table[first], shared)
    assert arena.close_slot(first) == 4
    assert arena.close_slot(second) == 8
    assert held(arena) == 0


def test_a_fork_of_full_pages_copies_none(arena: PageArena) -> None:
    first = opened(arena, 32)
    second = arena.open_slot(PageFormat.F32)
    arena.fork(first, second)
    arena.extend(ints(first, second), ints(1, 1))
    assert held(arena) == 8 + 4 + 4
    assert np.array_equal(arena.table[first, ..., :2], arena.table[second, ..., :2])


def test_a_fork_has_side_state_of_its_own(arena: PageArena) -> None:
    first = opened(arena, 3)
    arena.kv.mass[first] = torch.ones(LAYERS, HEADS, 3)
    arena.kv.positions[first] = torch.arange(3, dtype=torch.int32).expand(LAYERS, HEADS, 3).clone()
    second = arena.open_slot(PageFormat.F32)
    arena.fork(first, second)
    arena.kv.mass[first] += 1
    assert (arena.kv.mass[second] == 1).all()
    arena.close_slot(first)
    assert arena.kv.mass.keys() == arena.kv.positions.keys() == {second}


def test_adopted_pages_are_shared(arena: PageArena) -> None:
    first = opened(arena, 40)
    second = arena.open_slot(PageFormat.INT8)
    arena.adopt(second, arena.table[first, ..., :2], 32)
    assert (arena.kept[second] == 32).all()
    arena.extend(ints(second), ints(1))
    assert held(arena) == 12 + 4
    assert arena.close_slot(first) == 4
    assert arena.close_slot(second) == 12


def test_replaced_pages_are_dropped_once(arena: PageArena) -> None:
    first = opened(arena, 40)
    second = arena.open_slot(PageFormat.F32)
    arena.fork(first, second)
    fresh = arena.take(4).reshape(LAYERS, HEADS, 1)
    assert arena.replace(second, fresh, lanes(1, 1, 1, 1), lanes(9, 9, 9, 9), lanes(0, 0, 0, 0)) == 0
    assert held(arena) == 12 + 4
    assert arena.close_slot(first) == 12
    assert arena.close_slot(second) == 4


@pytest.mark.parametrize("damage", ["lost", "twice", "free", "kept", "closed", "columns"])
def test_integrity_is_checked(arena: PageArena, damage: str) -> None:
    slot, other = opened(arena, 40), opened(arena, 40)
    arena.check_integrity(NONE)
    if damage == "lost":
        arena.take(1)
    elif damage == "twice":
        arena.table[slot, 0, 0, 0] = arena.table[other, 0, 0, 0]
    elif damage == "free":
        arena.release(arena.table[slot, 0, 0, :1])
    elif damage == "kept":
        arena.kept[slot, 1, 1] += 16
    elif damage == "closed":
        arena.kept[arena.open_slot(PageFormat.F32)] = 1
    else:
        arena.columns[slot, 0, 1] -= 1
    with pytest.raises(AssertionError):
        arena.check_integrity(NONE)


# Pages that two layers share -----------------------------------------------------------------------------------------


def merged(arena: PageArena, tokens: int) -> int:
    """A sequence of two layers, whose first page is one for both lanes of a head."""
    packed = arena.layout.capacity(PageFormat.MINI_CACHE)
    slot = arena.open_slot(PageFormat.F32, PageFormat.MINI_CACHE)
    arena.extend(ints(slot), ints(tokens))
    columns = 1 - (packed - tokens) // 16
    table = arena.table[slot, :, :, :columns].copy()
    table[1, :, 0] = table[0, :, 0]
    arena.replace(slot, table, lanes(*[columns] * 4), lanes(*[tokens] * 4), lanes(0, 0, 0, 0), lanes(1, 1, 1, 1))
    return slot


def test_a_page_of_two_layers_is_held_once(arena: PageArena) -> None:
    packed = arena.layout.capacity(PageFormat.MINI_CACHE)
    slot = merged(arena, packed + 20)
    assert held(arena) == len(arena.held(slot)) == 2 + 4 * 2
    assert arena.report(slot, packed + 20).bytes_held == 10 * arena.layout.page_bytes
    arena.extend(ints(slot), ints(13))
    assert held(arena) == 2 + 4 * 3
    arena.truncate(ints(slot), ints(13))
    assert held(arena) == 2 + 4 * 2
    with pytest.raises(ValueError, match="open pages"):
        arena.truncate(ints(slot), ints(21))
    assert arena.close_slot(slot) == 10
    assert held(arena) == 0


def test_a_fork_shares_pages_of_two_layers(arena: PageArena) -> None:
    packed = arena.layout.capacity(PageFormat.MINI_CACHE)
    first = merged(arena, packed + 20)
    second = arena.open_slot(PageFormat.F32, PageFormat.MINI_CACHE)
    arena.fork(first, second)
    assert held(arena) == 10
    arena.extend(ints(second), ints(1))
    assert held(arena) == 10 + 4, "open pages are copied, pages of two layers are not"
    assert arena.close_slot(first) == 4
    assert arena.close_slot(second) == 10


def test_a_truncated_copy_of_a_partly_filled_page_is_its_own(arena: PageArena) -> None:
    """Where full pages of a second format lie before it, too."""
    packed = arena.layout.capacity(PageFormat.MINI_CACHE)
    assert packed % 16, "or the page would not be partly filled by any count"
    first = merged(arena, packed + 32)
    second = arena.open_slot(PageFormat.F32, PageFormat.MINI_CACHE)
    arena.fork(first, second)
    arena.extend(ints(second), ints(1))
    arena.truncate(ints(second), ints(1 + packed % 16))
    shared = arena.table[first, ..., 2].copy()
    assert np.array_equal(arena.table[second, ..., 2], shared)
    arena.extend(ints(second), ints(1))
    assert not np.isin(arena.table[second, ..., 2], shared).any()
    assert held(arena) == 10 + 4


def test_no_other_page_may_be_in_two_lanes(arena: PageArena) -> None:
    slot = merged(arena, arena.layout.capacity(PageFormat.MINI_CACHE) + 20)
    arena.refs[arena.table[slot, 1, 0, 1]] = 0
    arena.table[slot, 1, 0, 1] = arena.table[slot, 0, 0, 1]
    with pytest.raises(AssertionError, match="two lanes"):
        arena.check_integrity(NONE)


# Truncation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 16, 33, 40])
@pytest.mark.parametrize("dropped", [0, 1, 15, 16, 17, 33])
def test_truncate_is_as_if_never_extended(arena: PageArena, tokens: int, dropped: int) -> None:
    slots = ints(opened(arena, tokens), opened(arena, 20))
    before = [rows[slots].copy() for rows in (arena.columns, arena.kept)]
    free = arena.free_count
    arena.extend(slots, ints(dropped, 3))
    arena.truncate(slots, ints(dropped, 3))
    for rows, wanted in zip((arena.columns, arena.kept), before, strict=True):
        assert np.array_equal(rows[slots], wanted)
    assert arena.free_count == free
    assert held(arena) == arena.total - free
    assert ((arena.table[slots] >= 0).sum(-1) == arena.columns[slots]).all()


def test_truncate_of_ragged_lanes(arena: PageArena) -> None:
    slot = opened(arena, 40)
    arena.replace(slot, arena.table[slot].copy(), lanes(1, 1, 2, 3), lanes(5, 16, 17, 40), lanes(0, 0, 0, 0))
    arena.truncate(ints(slot), ints(5))
    assert arena.kept[slot].tolist() == [[0, 11], [12, 35]]
    assert arena.columns[slot].tolist() == [[0, 1], [1, 3]]
    assert held(arena) == 5


def test_truncate_leaves_sealed_tokens_alone(arena: PageArena) -> None:
    packed = arena.layout.capacity(PageFormat.INT4)
    slot = opened(arena, packed + 3, PageFormat.INT4)
    arena.replace(slot, arena.table[slot].copy(), lanes(2, 2, 2, 2), lanes(*[packed + 3] * 4), lanes(1, 1, 1, 1))
    for count in (4, -1):
        with pytest.raises(ValueError, match="open pages"):
            arena.truncate(ints(slot), ints(count))
    assert (arena.kept[slot] == packed + 3).all()
    arena.truncate(ints(slot), ints(3))
    assert (arena.kept[slot] == packed).all()
    assert held(arena) == 4


def test_what_is_written_after_a_truncation_leaves_others_alone(arena: PageArena) -> None:
    """The page that is partly filled again is another sequence's full one."""
    first = opened(arena, 48)
    second = arena.open_slot(PageFormat.F32)
    arena.fork(first, second)
    both = ints(first, second)
    arena.truncate(both, ints(20, 40))
    assert arena.kept[both].max((1, 2)).tolist() == [28, 8]
    assert held(arena) == 4 * 2  # the third page is nobody's, the second the first one's
    arena.kv.data.zero_()
    shared = arena.table[second, ..., 0].copy()
    assert arena.pages_to_extend(both, ints(1, 1)).tolist() == [4, 4]  # room for a copy is asked for
    arena.extend(both, ints(1, 1))
    assert np.array_equal(arena.table[first, ..., 0], shared)
    assert not np.isin(arena.table[second, ..., 0], shared).any()
    assert held(arena) == 4 * 3


def test_truncate_forgets_attention_mass(arena: PageArena) -> None:
    slot = opened(arena, 10)
    arena.kv.mass[slot] = torch.ones(LAYERS, HEADS, 16)
    arena.truncate(ints(slot), ints(4))
    assert arena.kv.mass[slot].sum(-1).tolist() == [[6, 6], [6, 6]]
