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
        tokens, columns = np.zeros((2, 4, len(kept)), np.int64)
        tokens[1], tokens[3], columns[1] = sealed * kv.layout.capacity(formats[0]), kept, sealed
        np.add(tokens[1], rest * kv.layout.capacity(formats[1]), out=tokens[2])
        np.add(sealed, rest, out=columns[2])
        np.add(columns[2], -((tokens[2] - kept) // kv.layout.page_tokens), out=columns[3])
        if (tokens[1:] < tokens[:-1]).any():
            raise ValueError(f"slot {slot}: a lane's full pages hold more tokens than it keeps")
        table = kv.table[slot, layers].flatten(0, 1).numpy()
        if columns[3].max() > table.shape[1]:
            raise IndexError(f"a lane of {columns[3].max()} pages in a table {table.shape[1]} wide")
        return cls(formats, tokens, columns, table)

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
        if not 0 <= table.min() <= table.max() < pages:  # which may be so beyond a lane's own end
            check_pages(table[np.arange(first, first + table.shape[1]) < end[:, None]], pages)
        return table


@dataclass(frozen=True)
class Pages:
    """Pages to be written, format after format, and for each in the order of their lanes."""

    formats: list[PageFormat]
    items: NDArray[np.int32]
    """[4, n]: page, lane, first of the lane's tokens that go there, how many do"""
    ends: Ints
    """[formats, N]: where those of a lane end"""

    def among(self, part: int, first: int, last: int) -> tuple[int, int]:
        """The range of those that have the format `part` and are of lanes `first` to `last` - 1."""
        before = part * self.ends.shape[1] + first
        return int(self.ends.flat[before - 1]) if before else 0, int(self.ends[part, last - 1])


def destinations(
    kv: PagedKV, counts: Ints, table: NDArray[np.int32], parts: list[tuple[Ints, Ints, PageFormat]]
) -> Pages:
    """Which of `counts` [N] tokens go to which pages of `table` [N, W].

    Each part (from, to, format) takes full pages to its columns, and what is left goes to open pages behind the last.
    """
    layout, (lanes, width) = kv.layout, table.shape
    formats = [*(fmt for _, _, fmt in parts), layout.compute]
    capacity = np.array([layout.capacity(fmt) for fmt in formats])[:, None]
    first = np.stack([*(begin for begin, _, _ in parts), parts[-1][1]])
    taken = np.stack([end - begin for begin, end, _ in parts]) * capacity[:-1]
    done = np.zeros_like(first)
    np.cumsum(taken, 0, out=done[1:])
    tokens = np.concatenate([taken, (counts - done[-1])[None]])
    if first.min() < 0 or tokens.min() < 0:
        raise ValueError(f"the tokens do not fill the pages in {' and '.join(fmt.label for fmt in formats[:-1])}")
    pages = -(-tokens // capacity)
    if (first + pages).max() > width:
        raise IndexError(f"a lane of {(first + pages).max()} pages in a table {width} wide")
    # One item for each page: `row` says of which part and lane, `place` which of these it is.
    pages, ends = pages.ravel(), pages.cumsum()
    row = np.repeat(np.arange(len(pages)), pages)
    part, lane = np.divmod(row, lanes)
    place = np.arange(len(row)) - (ends - pages)[row]
    size = capacity[part, 0]
    items = np.empty((4, len(row)), np.int32)
    items[0] = table[lane, first.ravel()[row] + place]
    items[1] = lane
    items[2] = done.ravel()[row] + place * size
    items[3] = np.minimum(tokens.ravel()[row] - place * size, size)
    check_pages(items[0], len(kv.data))
    return Pages(formats, items, ends.reshape(len(formats), lanes))


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
