"""Lanes of one sequence on the host, all at once: where their tokens lie, and which pages tokens are to go to.

Every index that comes in from outside is checked here, as kernels/reference/lanes.py and pages.py do, before a kernel
reads or writes anything. Arrays go by lane, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.reference.lanes import check_slot, sealed_formats
from winnow.kernels.triton.device import upload

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lanes:
    """Where the tokens of lanes are: in three parts, the sealed pages, those in the second format, the open ones."""

    formats: tuple[PageFormat, PageFormat, PageFormat]
    tokens: Ints
    """[4, N]: lane index at which each part begins, and at which the last ends"""
    columns: Ints
    """[4, N]: the same in columns of the table"""
    table: NDArray[np.int32]
    """[N, width]"""

    @classmethod
    def of(cls, kv: PagedKV, slot: int, layers: slice = slice(None)) -> Lanes:
        check_slot(kv, slot)
        kept, sealed, rest = (ints(part[slot, layers]) for part in (kv.kept, kv.sealed, kv.rest))
        formats = (*sealed_formats(kv, slot), kv.layout.compute)
        second = sealed * kv.layout.capacity(formats[0])
        third = second + rest * kv.layout.capacity(formats[1])
        if min(sealed.min(), rest.min(), (kept - third).min()) < 0:
            raise ValueError(f"slot {slot}: a lane's full pages hold more tokens than it keeps")
        opened = sealed + rest
        columns = opened + -(-(kept - third) // kv.layout.page_tokens)
        table = kv.table[slot, layers].flatten(0, 1).numpy()
        if columns.max() > table.shape[1]:
            raise IndexError(f"a lane of {columns.max()} pages in a table {table.shape[1]} wide")
        none = np.zeros_like(kept)
        return cls(formats, np.stack([none, second, third, kept]), np.stack([none, sealed, opened, columns]), table)

    def leading(self, fmt: PageFormat, page_tokens: int) -> Ints:
        """[N]: full pages in `fmt` that each lane begins with."""
        sealed = self.columns[1]
        count = sealed if self.formats[0] is fmt else np.zeros_like(sealed)
        if fmt is self.formats[2]:
            goes_on = (count == sealed) & (self.columns[2] == sealed)
            count = count + np.where(goes_on, (self.tokens[3] - self.tokens[2]) // page_tokens, 0)
        return count

    def pages(self, pages: int, first: int) -> NDArray[np.int32]:
        """[N, W]: the table from column `first` to the last one in use; IndexError for a page beyond `pages`."""
        end = self.columns[3]
        table = self.table[:, first : max(int(end.max()), first + 1)]
        in_use = np.arange(first, first + table.shape[1]) < end[:, None]
        check_pages(table[in_use], pages)
        return table


@dataclass(frozen=True)
class Pages:
    """Pages to be written in one format, in the order of their lanes."""

    fmt: PageFormat
    items: Ints
    """[4, n]: page, lane, first of the lane's tokens that go there, how many do"""

    def among(self, first: int, last: int) -> tuple[int, int]:
        """The range of those of lanes `first` to `last` - 1."""
        begin, end = np.searchsorted(self.items[1], [first, last])
        return int(begin), int(end)


def destinations(
    kv: PagedKV, counts: Ints, table: NDArray[np.int32], parts: list[tuple[Ints, Ints, PageFormat]]
) -> list[Pages]:
    """Which of `counts` [N] tokens go to which pages of `table` [N, W].

    Each part (from, to, format) takes full pages to its columns, and what is left goes to open pages behind the last.
    """
    layout, width = kv.layout, table.shape[1]
    done, written = np.zeros_like(counts), []
    for first, last, fmt in parts:
        capacity = layout.capacity(fmt)
        taken = (last - first) * capacity
        if first.min() < 0 or taken.min() < 0 or (taken > counts - done).any():
            raise ValueError(f"the tokens do not fill the pages in {fmt.label}")
        if last.max() > width:
            raise IndexError(f"a lane of {last.max()} pages in a table {width} wide")
        written.append(_listed(fmt, capacity, first, taken, done, table))
        done = done + taken
    closed, capacity = parts[-1][1], layout.page_tokens
    if (closed + -(-(counts - done) // capacity)).max() > width:
        raise IndexError(f"a lane has more pages than its table of {width} columns")
    written.append(_listed(layout.compute, capacity, closed, counts - done, done, table))
    for part in written:
        check_pages(part.items[0], len(kv.data))
    return written


def _listed(fmt: PageFormat, capacity: int, first: Ints, tokens: Ints, done: Ints, table: NDArray[np.int32]) -> Pages:
    """The pages from column `first` on that take `tokens` tokens of each lane, the first of which is `done`."""
    count = -(-tokens // capacity)
    lane = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(lane)) - np.repeat(np.cumsum(count) - count, count)
    begin = place * capacity
    page = table[lane, first[lane] + place]
    return Pages(fmt, np.stack([page, lane, done[lane] + begin, np.minimum(tokens[lane] - begin, capacity)]))


def check_pages(ids: NDArray[np.signedinteger], pages: int) -> None:
    """IndexError unless all are among `pages` pages."""
    if ids.size and not 0 <= ids.min() <= ids.max() < pages:
        raise IndexError(f"a page id is not in the arena of {pages} pages")


def ints(part: Tensor) -> Ints:
    """A host tensor's numbers in one row."""
    return part.reshape(-1).numpy().astype(np.int64)


def upload_together(parts: list[NDArray[np.signedinteger]]) -> list[Tensor]:
    """Each part on the device, int32 and aligned for vector loads, in one copy."""
    sizes = [-(-part.size // 4) * 4 for part in parts]
    together = np.zeros(sum(sizes), np.int32)
    begin = 0
    for part, size in zip(parts, sizes, strict=True):
        together[begin : begin + part.size] = part.reshape(-1)
        begin += size
    pieces = upload(torch.from_numpy(together)).split(sizes)
    return [piece[: part.size].view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
