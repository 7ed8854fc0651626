"""The arena: who holds which page, and what every lane's table says.

    lane:  [ shared prefix | sealed | rest | open ]     one row of `table` for each sequence, layer and KV head

A page is free, or referenced by sequences and by the prefix cache; it returns to the free list when the last reference
is dropped. A sequence refers to a page once, though lanes of two layers may share it. What a sequence holds outside the
arena (positions, bounds of pages, ...: `PagedKV`) counts as its memory too: for as many bytes the slot holds pages that
hold nothing, its ballast. Every operation is vectorised over lanes; nothing here reads or writes page contents except
copy-on-write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.engine.lanes import Lanes
from winnow.engine.messages import CompressionReport
from winnow.engine.ranks import ALONE, Ranks
from winnow.engine.report import joined, report_of
from winnow.kernels.dispatch import Backend
from winnow.kernels.host import to_device
from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import PageFormat, PageLayout

Ints = NDArray[np.int32]

NO_PAGES: Ints = np.empty(0, np.int32)

WIDTH = 64
"""Pages that a lane's row of the table has room for at first"""


class OutOfPages(Exception):
    """No page is free and none can be reclaimed. Never leaves the engine: the scheduler preempts."""


class PageArena:
    """All pages of a device, and the lanes that draw from them."""

    def __init__(
        self, layout: PageLayout, pages: int, slots: int, layers: int, kv_heads: int, ops: Backend, ranks: Ranks = ALONE
    ):
        """`ranks`: who has the lanes of the other heads; these are this process'."""
        self.layout = layout
        self.ranks = ranks
        self.lanes = layers * kv_heads
        # The last page is nobody's: rows that only fill a step up write there.
        self.kv = PagedKV.allocate(layout, pages + 1, slots, layers, kv_heads, WIDTH, ops.device())
        self.refs: Ints = np.zeros(pages, np.int32)
        self.columns: Ints = np.zeros((slots, layers, kv_heads), np.int32)
        """Pages of each lane: the entries of `table` in use"""
        self._ops = ops
        self._free: Ints = np.arange(pages - 1, -1, -1, dtype=np.int32)
        self.free_count = pages
        self._slots = list(range(slots - 1, -1, -1))
        self._tail_shared = np.zeros(slots, bool)
        self._ballast: dict[int, Ints] = {}
        """Pages that stand for memory outside the arena"""
        self.capacity: Ints = np.zeros(1 + max(PageFormat), np.int32)
        self.capacity[list(PageFormat)] = [layout.capacity(fmt) for fmt in PageFormat]
        self.reclaim: Callable[[int], None] = lambda pages: None
        """Asks the prefix cache to give back at least so many pages"""
        self._view()

    def _view(self) -> None:
        self.table: Ints = self.kv.table.numpy()
        self.kept: Ints = self.kv.kept.numpy()
        self.sealed: Ints = self.kv.sealed.numpy()
        self.formats: NDArray[np.uint8] = self.kv.formats.numpy()
        self.rest: Ints = self.kv.rest.numpy()
        self.rest_formats: NDArray[np.uint8] = self.kv.rest_formats.numpy()

    @property
    def total(self) -> int:
        return len(self.refs)

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    # Pages -----------------------------------------------------------------------------------------------------------

    def ensure(self, count: int) -> None:
        """Sees to it that so many pages are free, at each rank as many as it says; OutOfPages at all if they are not
        at one."""
        if self.ranks.most(count - self.free_count) > 0:
            self.reclaim(count - self.free_count)
            if self.ranks.most(count - self.free_count) > 0:
                raise OutOfPages

    def take(self, count: int) -> Ints:
        """Pages with one reference each; OutOfPages leaves everything as it was. Where ranks share a model they are
        free already: by `ensure`, or by the scheduler."""
        if count > self.free_count and self.ranks.size == 1:
            self.reclaim(count - self.free_count)
        if count > self.free_count:
            raise OutOfPages
        pages = self._free[self.free_count - count : self.free_count].copy()
        self.free_count -= count
        self.refs[pages] = 1
        return pages

    def share(self, pages: Ints) -> None:
        """One more reference to each of these distinct pages."""
        self.refs[pages] += 1

    def release(self, pages: Ints) -> int:
        """Drops one reference to each of these distinct pages; returns how many became free."""
        self.refs[pages] -= 1
        freed = pages[self.refs[pages] == 0]
        self._free[self.free_count : self.free_count + len(freed)] = freed
        self.free_count += len(freed)
        return len(freed)

    # Sequences -------------------------------------------------------------------------------------------------------

    def open_slot(self, fmt: PageFormat, rest: PageFormat | None = None) -> int:
        """A row of empty lanes whose sealed pages will be in `fmt`, those behind them in `rest`."""
        slot = self._slots.pop()
        self.formats[slot] = fmt
        self.rest_formats[slot] = self.layout.compute if rest is None else rest
        return slot

    def close_slot(self, slot: int) -> int:
        """Drops everything the sequence holds; returns the pages that became free."""
        freed = self.release(self.held(slot))
        self.table[slot] = -1
        self.kv.stale.add(slot)
        self.kept[slot] = self.sealed[slot] = self.rest[slot] = self.columns[slot] = 0
        self._tail_shared[slot] = False
        for side in self.kv.sides:
            side.pop(slot, None)
        self.kv.reading.pop(slot, None)
        self.kv.votes.pop(slot, None)
        self.kv.energy.pop(slot, None)
        freed += self.release(self._ballast.pop(slot, NO_PAGES))
        self._slots.append(slot)
        return freed

    def held(self, slot: int) -> Ints:
        """[pages] of all lanes of the sequence, each once."""
        rows: Ints = self.table[slot]
        own = np.arange(rows.shape[-1]) < self.columns[slot][..., None]
        if PageFormat(self.rest_formats[slot]).spans_layers:
            own[1:] &= ~self._shared_with_next(slot)
        return rows[own]

    def _shared_with_next(self, slot: int) -> NDArray[np.bool_]:
        """[layers - 1, kv_heads, width]: entries that the lane of the same head, one layer up, has as well."""
        rows, behind = self.table[slot], np.arange(self.table.shape[-1]) - self.sealed[slot][..., None]
        is_rest = (behind >= 0) & (behind < self.rest[slot][..., None])
        return is_rest[:-1] & is_rest[1:] & (rows[:-1] == rows[1:])

    def ballast(self, slot: int) -> int:
        """Pages that the slot holds for what lies outside the arena."""
        return len(self._ballast.get(slot, NO_PAGES))

    def hold(self, slot: int, size: int) -> None:
        """Makes the slot's ballast what `size` bytes fill; OutOfPages leaves it as it was."""
        wanted, pages = -(-size // self.layout.page_bytes), self._ballast.get(slot, NO_PAGES)
        if wanted > len(pages):
            self._ballast[slot] = np.concatenate([pages, self.take(wanted - len(pages))])
        elif wanted < len(pages):
            self._ballast[slot] = pages[:wanted]
            self.release(pages[wanted:])

    def pages_to_extend(self, slots: Ints, counts: Ints) -> NDArray[np.int64]:
        """[B] pages that each sequence must get to take `counts` [B] more tokens in every lane, or [B, layers]."""
        missing = (self.columns_for(slots, counts) - self.columns[slots]).clip(0).reshape(len(slots), -1)
        copies = np.where(self._tail_shared[slots], self.lanes, 0)
        return missing.sum(1, dtype=np.int64) + copies

    def extend(self, slots: Ints, counts: Ints) -> None:
        """Makes room for `counts` new tokens in every lane of the sequences [B], or of their layers [B, layers], and
        counts them as kept."""
        for slot in slots[self._tail_shared[slots]]:
            self._unshare_tail(int(slot))
        wanted = self.columns_for(slots, counts)
        self._reserve_width(int(wanted.max()))
        have = self.columns[slots]
        missing = (wanted - have).clip(0)
        total = int(missing.sum())
        if total:
            pages = self.take(total)
            self.table.reshape(-1, self.table.shape[-1])[self._cells(slots, have, missing)] = pages
            self.columns[slots] = np.maximum(wanted, have)
            self.kv.stale.update(slots[missing.any((1, 2))].tolist())
        self.kept[slots] += _by_lane(counts)

    def truncate(self, slots: Ints, counts: Ints) -> None:
        """Drops the newest `counts` [B] tokens of every lane of some distinct sequences, and the pages left empty.

        What was written is as if it had never been: a page that becomes partly filled again and that others refer to
        is copied before the next token is written to it. ValueError, and nothing done, where a lane holds fewer tokens
        or has them in sealed pages.
        """
        kept = self.kept[slots] - counts.reshape(-1, 1, 1)
        open_tokens = kept - self.sealed_tokens(slots)
        if (open_tokens < 0).any() or (counts < 0).any():
            raise ValueError("only tokens in a lane's open pages can be dropped")
        self.kept[slots] = kept
        have, wanted = self.columns[slots], self.columns_for(slots, np.zeros_like(counts))
        table = self.table.reshape(-1, self.table.shape[-1])
        surplus = have - wanted
        if surplus.any():
            cells = self._cells(slots, wanted, surplus)
            pages, times = np.unique(table[cells], return_counts=True)
            self.refs[pages] -= (times - 1).astype(np.int32)  # of sequences that share a page several may drop it
            self.release(pages)
            table[cells] = -1
            self.columns[slots] = wanted
            self.kv.stale.update(slots.tolist())
        lanes = slots.astype(np.int64)[:, None] * self.lanes + np.arange(self.lanes)
        tails = table[lanes, wanted.reshape(lanes.shape) - 1].reshape(wanted.shape)
        is_shared = (open_tokens % self.layout.page_tokens > 0) & (self.refs[tails] > 1)
        self._tail_shared[slots] |= is_shared.any((1, 2))
        for slot, full in zip(slots.tolist(), open_tokens // self.layout.page_tokens, strict=True):
            if (mass := self.kv.mass.get(slot)) is not None:
                left = to_device(self.kv.kept[slot][..., None], mass.device)
                mass.masked_fill_(torch.arange(mass.shape[-1], device=mass.device) >= left, 0)
            if (reading := self.kv.reading.get(slot)) is not None:
                has_grid = PageFormat(int(self.formats[slot])).is_integer
                reading.forget_newest(torch.from_numpy(full if has_grid else full + self.sealed[slot]))

    def _cells(self, slots: Ints, first: Ints, count: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row and column, in the table of all lanes one below the other, of `count` entries from `first` on in each
        lane of the sequences; both are [B, layers, kv_heads]."""
        flat = count.reshape(-1)
        lane = np.repeat(np.arange(flat.size), flat)
        within = np.arange(len(lane)) - np.repeat(np.cumsum(flat) - flat, flat)
        rows = np.repeat(slots.astype(np.int64), self.lanes)[lane] * self.lanes + lane % self.lanes
        return rows, first.reshape(-1)[lane] + within

    def columns_for(self, slots: Ints, counts: Ints) -> Ints:
        """[B, layers, kv_heads] pages that lanes need to take `counts` [B] or [B, layers] more tokens."""
        open_tokens = self.kept[slots] - self.sealed_tokens(slots) + _by_lane(counts)
        columns: Ints = self.sealed[slots] + self.rest[slots] + -(-open_tokens // np.int32(self.layout.page_tokens))
        return columns

    def sealed_tokens(self, slots: Ints) -> Ints:
        """[B, layers, kv_heads] tokens in the full pages of both formats."""
        sealed, rest = self.capacity[self.formats[slots]], self.capacity[self.rest_formats[slots]]
        return self.sealed[slots] * sealed[:, None, None] + self.rest[slots] * rest[:, None, None]

    def _reserve_width(self, width: int) -> None:
        """Grows the table to at least `width` columns, at least twofold: who knows its address looks it up anew."""
        old = self.table.shape[-1]
        if width <= old:
            return
        width = max(width, 2 * old)
        table = torch.full((*self.kv.table.shape[:3], width), -1, dtype=torch.int32)
        table[..., :old] = self.kv.table
        self.kv.table = table
        self._view()

    def adopt(self, slot: int, pages: Ints, tokens: int) -> None:
        """Starts an empty sequence with the shared, full pages [layers, kv_heads, n] of a prefix of `tokens` tokens."""
        count = pages.shape[-1]
        self._reserve_width(count)
        self.table[slot, :, :, :count] = pages
        self.kv.stale.add(slot)
        self.columns[slot] = count
        self.kept[slot] = tokens
        self.share(pages.reshape(-1))

    def fork(self, source: int, target: int) -> None:
        """Gives the empty sequence `target` all that `source` holds; the next token of either copies its open page.

        OutOfPages, where there are none to stand for its side state, leaves everything as it was.
        """
        self.restore(target, Lanes.of(self, source, self._ballast.get(source, NO_PAGES)))
        self._tail_shared[source] = True

    def note(self, slot: int) -> Lanes:
        """What a sequence holds now, as it will stay: with a reference of its own to each page, and pages for its own
        copy of the side state. Its next token copies its open page. OutOfPages leaves everything as it was."""
        count = self.ballast(slot)
        self.ensure(count)
        ballast = self.take(count)
        lanes = Lanes.of(self, slot, ballast)
        self.share(lanes.held)
        self._tail_shared[slot] = True
        sides = tuple(None if side is None else side.clone() for side in lanes.sides)
        return replace(lanes, sides=sides)

    def restore(self, slot: int, lanes: Lanes) -> None:
        """Gives an empty sequence what another held; its next token copies the open page. OutOfPages leaves everything
        as it was."""
        self.share(lanes.held)  # first: to find free pages the prefix cache may drop what it has of these
        try:
            self.ensure(len(lanes.ballast))
        except OutOfPages:
            self.release(lanes.held)
            raise
        self._ballast[slot] = self.take(len(lanes.ballast))
        width = lanes.table.shape[-1]
        self._reserve_width(width)
        self.table[slot, :, :, :width] = lanes.table
        self.kv.stale.add(slot)
        self.columns[slot], self.kept[slot] = lanes.columns, lanes.kept
        self.sealed[slot], self.rest[slot] = lanes.sealed, lanes.rest
        self.formats[slot], self.rest_formats[slot] = lanes.formats
        self._tail_shared[slot] = True
        for side, noted in zip(self.kv.sides, lanes.sides, strict=True):
            if noted is not None:
                side[slot] = noted.clone()
        if lanes.vote is not None:
            self.kv.votes[slot] = lanes.vote

    def _unshare_tail(self, slot: int) -> None:
        """Copies the partly filled last page of each lane where others refer to it too."""
        open_tokens = self.kept[slot] - self.sealed_tokens(np.array([slot], np.int32))[0]
        partial = open_tokens % self.layout.page_tokens > 0
        layer, head = np.nonzero(partial)
        column = self.columns[slot][layer, head] - 1
        pages = self.table[slot][layer, head, column]
        shared = self.refs[pages] > 1
        if shared.any():
            fresh = self.take(int(shared.sum()))
            self._ops.copy_pages(self.kv, torch.from_numpy(pages[shared]), torch.from_numpy(fresh))
            self.table[slot, layer[shared], head[shared], column[shared]] = fresh
            self.kv.stale.add(slot)
            self.release(pages[shared])
        self._tail_shared[slot] = False

    def replace(self, slot: int, table: Ints, columns: Ints, kept: Ints, sealed: Ints, rest: Ints | None = None) -> int:
        """Gives the lanes new tables [layers, kv_heads, n]; drops the pages that they no longer name.

        The new pages must have been taken already. Returns the pages that became free.
        """
        old, width = self.held(slot), table.shape[-1]
        self._reserve_width(width)
        in_use = np.arange(width) < columns[..., None]
        dropped = np.setdiff1d(old, table[in_use])
        self.kv.stale.add(slot)
        self.table[slot] = -1
        self.table[slot, :, :, :width] = np.where(in_use, table, -1)
        self.columns[slot], self.kept[slot], self.sealed[slot] = columns, kept, sealed
        self.rest[slot] = 0 if rest is None else rest
        if (reading := self.kv.reading.get(slot)) is not None:
            reading.forget_pages()
        return self.release(dropped)

    # What it looks like ----------------------------------------------------------------------------------------------

    def report(self, slot: int, seen: int) -> CompressionReport:
        """What the sequence holds now, at all ranks, beside what `seen` tokens hold uncompressed."""
        return joined(report_of(self, slot, seen), self.ranks)

    def check_integrity(self, cached: Ints) -> None:
        """AssertionError unless free + referenced = all, and the counts match the tables and the `cached` pages."""
        counted = np.zeros(self.total, np.int32)
        used = [slot for slot in range(len(self.table)) if slot not in self._slots]
        for slot in used:
            pages = np.concatenate([self.held(slot), self._ballast.get(slot, NO_PAGES)])
            assert len(np.unique(pages)) == len(pages), f"slot {slot} has a page in two lanes"
            assert pages.min(initial=0) >= 0 and pages.max(initial=0) < self.total, f"slot {slot} names no page"
            np.add.at(counted, pages, 1)
            side_bytes = sum(side[slot].nbytes for side in self.kv.sides if slot in side)
            side_bytes += self.kv.reading[slot].nbytes if slot in self.kv.reading else 0
            assert side_bytes <= self.ballast(slot) * self.layout.page_bytes, f"no page stands for what {slot} notes"
        np.add.at(counted, cached, 1)
        assert np.array_equal(counted, self.refs), "reference counts differ from the tables"
        free = self._free[: self.free_count]
        assert len(np.unique(free)) == len(free) and not self.refs[free].any(), "a free page is in use"
        assert len(free) + np.count_nonzero(self.refs) == self.total, "pages are lost"
        slots = np.array(used, np.int32)
        if len(used):
            wanted = self.columns_for(slots, np.zeros(len(used), np.int32))
            assert np.array_equal(wanted, self.columns[slots]), "a lane has pages it does not need"
        idle = np.array(self._slots, np.int64)
        assert not self.columns[idle].any() and not self.kept[idle].any(), "a closed slot holds tokens"


def _by_lane(counts: Ints) -> Ints:
    """[B] or [B, layers] -> [B, layers or 1, 1]"""
    return counts.reshape(len(counts), -1, 1)
