"""Lanes of one sequence on the host, all at once: where their tokens lie, and which pages tokens are to go to.

Every index that comes in from outside is checked here, as kernels/reference/lanes.py and pages.py do, before a kernel
reads or writes anything. Arrays go by lane, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        kept, sealed, rest = (ints(part, (slot, layers)) for part in (kv.kept, kv.sealed, kv.rest))
        formats = (*sealed_formats(kv, slot), kv.layout.compute)
        tokens, columns = np.zeros((2, 4, len(kept)), np.int64)
        tokens[1], tokens[3], columns[1] = sealed * kv.layout.capacity(formats[0]), kept, sealed
        np.add(tokens[1], rest * kv.layout.capacity(formats[1]), out=tokens[2])
        np.add(sealed, rest, out=columns[2])
        np.add(columns[2], -((tokens[2] - kept) // kv.layout.page_tokens), out=columns[3])
        if (tokens[1:] < tokens[:-1]).any():
            raise ValueError(f"slot {slot}: a lane's full pages hold more tokens than it keeps")
        table = kv.table.numpy()[slot, layers].reshape(len(kept), -1)
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
class Source:
    """Tokens that are to be read."""

    present: dict[int, PageFormat]
    """The parts of the lanes where any of them may be"""
    described: Ints
    """[9, N]: how many of each lane, the first of them if they are not listed, `Lanes.tokens`, and the columns of
    `table` at which the three parts begin"""
    table: NDArray[np.int32]
    """[N, W]"""

    @classmethod
    def of(cls, kv: PagedKV, lanes: Lanes, counts: Ints, stay: Ints, column: int = 0) -> Source:
        """`counts` [N] tokens of each lane, none among the first `stay`, which no column before `column` holds."""
        behind = np.where(counts > 0, stay, lanes.tokens[3])
        parts = np.flatnonzero((np.maximum(lanes.tokens[:3], behind) < lanes.tokens[1:]).any(1)).tolist()
        described = np.concatenate([counts[None], stay[None], lanes.tokens, lanes.columns[:3] - column])
        present = {part: lanes.formats[part] for part in parts}
        return cls(present, described, lanes.pages(len(kv.data), column))

    @property
    def counts(self) -> Ints:
        return self.described[0]

    @property
    def arrays(self) -> tuple[Ints, NDArray[np.int32]]:
        """What kernels are told."""
        return self.described, self.table


@dataclass(frozen=True)
class Targets:
    """The pages that tokens are written to: in several parts, the last of which are open pages."""

    formats: list[PageFormat]
    tokens: Ints
    """[3, parts, N]: the column of `table` in which a part of a lane begins, the first of the lane's tokens that goes
    there, and how many do"""
    table: NDArray[np.int32]
    """[N, W]"""

    @classmethod
    def of(
        cls, kv: PagedKV, counts: Ints, table: NDArray[np.int32], parts: list[tuple[Ints, Ints, PageFormat]]
    ) -> Targets:
        """Where `counts` [N] tokens go, in order, in a `table` [N, width].

        Each part (from, to, format) takes full pages to its columns, and what is left goes to open pages behind the
        last.
        """
        formats = [*(fmt for _, _, fmt in parts), kv.layout.compute]
        tokens = np.zeros((3, len(formats), len(counts)), np.int64)
        column, first, taken = tokens
        taken[-1] = counts
        for part, (begin, end, fmt) in enumerate(parts):
            column[part], column[-1] = begin, end
            first[part] = counts - taken[-1]
            np.multiply(end - begin, kv.layout.capacity(fmt), out=taken[part])
            taken[-1] -= taken[part]
        np.subtract(counts, taken[-1], out=first[-1])
        if tokens.min() < 0:
            raise ValueError(f"the tokens do not fill the pages in {' and '.join(fmt.label for fmt in formats[:-1])}")
        capacity = np.array([kv.layout.capacity(fmt) for fmt in formats])
        end = column - taken // -capacity[:, None]
        if end.max() > table.shape[1]:
            raise IndexError(f"a lane of {end.max()} pages in a table {table.shape[1]} wide")
        start = int(column.min())
        table = table[:, start : max(int(end.max()), start + 1)]
        column -= start
        if not 0 <= table.min() <= table.max() < len(kv.data):  # which may be so where nothing is written
            place = np.arange(table.shape[1])
            is_written = (place >= column[..., None]) & (place < (end - start)[..., None])
            check_pages(table[is_written.any(0)], len(kv.data))
        return cls(formats, tokens, table)

    @property
    def arrays(self) -> tuple[Ints, NDArray[np.int32]]:
        """What kernels are told."""
        return self.tokens, self.table


def check_pages(ids: NDArray[np.signedinteger], pages: int) -> None:
    """IndexError unless all are among `pages` pages."""
    if ids.size and not 0 <= ids.min() <= ids.max() < pages:
        raise IndexError(f"a page id is not in the arena of {pages} pages")


def ints(part: Tensor, where: Any = ()) -> Ints:
    """A host tensor's numbers, or those of a part of it, in one row."""
    return part.numpy()[where].reshape(-1).astype(np.int64)


def upload_together(parts: Sequence[NDArray[np.signedinteger]]) -> Sequence[Tensor]:
    """Each part on the device in one row, int32 and aligned for vector loads, in one copy."""
    sizes = [-(-part.size // 4) * 4 for part in parts]
    together = np.zeros(sum(sizes), np.int32)
    begin = 0
    for part, size in zip(parts, sizes, strict=True):
        together[begin : begin + part.size] = part.reshape(-1)
        begin += size
    return upload(torch.from_numpy(together)).split(sizes)
