"""Which pages the rewritten lanes of a sequence go to."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from winnow.engine.pages import Ints, OutOfPages, PageArena
from winnow.engine.prefix_cache import PrefixCache


def destination(
    arena: PageArena,
    cache: PrefixCache | None,
    slot: int,
    start: Ints,
    columns: Ints,
    sealed: Ints | None = None,
    rest_start: Ints | None = None,
    shared: NDArray[np.bool_] | None = None,
) -> tuple[Ints, Ints]:
    """The lanes' new pages [layers, kv_heads, n]: own ones where nobody else refers to them, else fresh ones.

    The first `start` stay, and the first `rest_start` of the second format, which go to column `sealed`. Where `shared`
    [layers, kv_heads, n] says so a lane has the page of the layer below. Also the fresh ones alone.
    """
    sealed = start if sealed is None else sealed
    rest_start = np.zeros_like(start) if rest_start is None else rest_start
    width = max(1, int(columns.max()))
    old = arena.table[slot]
    place, old_place = np.arange(width), np.arange(old.shape[-1])
    behind = place - sealed[..., None]
    stays = (place < start[..., None]) | ((behind >= 0) & (behind < rest_start[..., None]))
    source = np.where(place < start[..., None], place, behind + arena.sealed[slot][..., None])
    staying = np.take_along_axis(old, source.clip(0, old.shape[-1] - 1), -1)
    written = ~stays & (place < columns[..., None])
    if shared is not None:
        written &= ~shared
    old_behind = old_place - arena.sealed[slot][..., None]
    leaves = (old_place >= start[..., None]) & ((old_behind < 0) | (old_behind >= rest_start[..., None]))
    leaves &= old_place < arena.columns[slot][..., None]

    def mine() -> tuple[Ints, np.ndarray]:
        """The table with our own pages put to use, and what is missing."""
        own = leaves & (arena.refs[old] == 1)
        pool = np.take_along_axis(old, np.argsort(~own, -1, kind="stable"), -1)
        rank = np.cumsum(written, -1) - 1
        has_own = written & (rank < own.sum(-1)[..., None])
        used = np.take_along_axis(pool, rank.clip(0, old.shape[-1] - 1), -1)
        table = np.where(stays, staying, np.where(has_own, used, np.int32(-1)))
        return table, written & ~has_own

    table, needs_fresh = mine()
    try:
        arena.ensure(int(needs_fresh.sum()))
    except OutOfPages:
        if cache is None:
            raise
        # The cache's own references can go: then the pages are ours and are rewritten in place.
        cache.forget(arena.held(slot))
        table, needs_fresh = mine()
        arena.ensure(int(needs_fresh.sum()))
    fresh = arena.take(int(needs_fresh.sum()))
    table[needs_fresh] = fresh
    if shared is not None:
        table[1:] = np.where(shared[1:], table[:-1], table[1:])
    return table, fresh
