"""Where things lie: the sequences of a batch, the pages of a lane, the page and place of a token.

Every index that comes in from outside is checked here, before it meets memory.

    token i of a lane, with S sealed pages of capacity C, R pages of capacity B in the second format, and open pages of
    capacity P:
        i < S·C                page i // C                      place i % C
        i - S·C = j < R·B      page S + j // B                  place j % B
        j - R·B = k >= 0       page S + R + k // P              place k % P
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a batch."""

    slot: int
    rows: slice
    """its rows in the batch"""
    count: int
    """how many"""
    first_vote: int


def sequences(batch: LaneBatch, kv: PagedKV, layer: int, rows: int) -> Iterator[Sequence]:
    """The sequences of a batch of `rows` rows, checked against `kv`."""
    check_layer(kv, layer)
    bounds = batch.cu_rows.tolist()
    count = batch.slots.shape[0]
    if len(bounds) != count + 1 or batch.first_vote.shape[0] != count:
        raise ValueError(f"{count} slots need {count + 1} row bounds and {count} first votes")
    if bounds[0] != 0 or bounds[-1] != rows or batch.positions.shape[0] != rows or bounds != sorted(bounds):
        raise ValueError(f"row bounds {bounds} do not cut {rows} rows")
    for slot, first, last, vote in zip(
        batch.slots.tolist(), bounds[:-1], bounds[1:], batch.first_vote.tolist(), strict=True
    ):
        check_slot(kv, slot)
        if last - first > int(kv.kept[slot, layer].min()):
            raise ValueError(f"slot {slot} has {last - first} rows, but a lane that keeps fewer tokens")
        if vote < 0:
            raise ValueError(f"first_vote {vote} is negative")
        yield Sequence(slot, slice(first, last), last - first, vote)


def check_layer(kv: PagedKV, layer: int) -> None:
    if not 0 <= layer < kv.table.shape[1]:
        raise IndexError(f"layer {layer} is not among {kv.table.shape[1]}")


def check_slot(kv: PagedKV, slot: int) -> None:
    if not 0 <= slot < kv.table.shape[0]:
        raise IndexError(f"slot {slot} is not among {kv.table.shape[0]}")


def check_pages(kv: PagedKV, pages: Tensor) -> Tensor:
    """The same page ids, as int64."""
    if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < kv.data.shape[0]:
        raise IndexError(f"a page id is not in the arena of {kv.data.shape[0]} pages")
    return pages.long()


def sealed_formats(kv: PagedKV, slot: int) -> tuple[PageFormat, PageFormat]:
    """Of the sealed pages and of those behind them."""
    return PageFormat(int(kv.formats[slot])), PageFormat(int(kv.rest_formats[slot]))


def sealed_tokens(kv: PagedKV, slot: int) -> Tensor:
    """[layers, kv_heads] int64: tokens in the full pages of both formats of each lane of a slot."""
    first, second = (kv.layout.capacity(fmt) for fmt in sealed_formats(kv, slot))
    return kv.sealed[slot].long() * first + kv.rest[slot].long() * second


def lane_pages(kv: PagedKV, slot: int, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Page ids of a lane's sealed pages, of those in its second format and of its open ones, int64."""
    sealed, rest = int(kv.sealed[slot, layer, head]), int(kv.rest[slot, layer, head])
    open_tokens = int(kv.kept[slot, layer, head]) - int(sealed_tokens(kv, slot)[layer, head])
    if sealed < 0 or rest < 0 or open_tokens < 0:
        raise ValueError(f"slot {slot}, layer {layer}, head {head}: {sealed} + {rest} pages hold more than is kept")
    count = sealed + rest + kv.layout.pages(open_tokens)
    if count > kv.table.shape[3]:
        raise IndexError(f"a lane of {count} pages in a table {kv.table.shape[3]} wide")
    pages = check_pages(kv, kv.table[slot, layer, head, :count])
    return pages[:sealed], pages[sealed : sealed + rest], pages[sealed + rest :]


def newest(kv: PagedKV, slot: int, layer: int, rows: int) -> tuple[Tensor, Tensor]:
    """Page id and place in it of the newest `rows` tokens of every head: each [rows, kv_heads] int64.

    They must be in open pages: a sealed page is never written to.
    """
    kept, full = kv.kept[slot, layer].long(), sealed_tokens(kv, slot)[layer]
    sealed = kv.sealed[slot, layer].long() + kv.rest[slot, layer].long()
    index = kept - rows + torch.arange(rows)[:, None] - full
    if index.numel() and int(index.min()) < 0:
        raise ValueError(f"slot {slot}: the {rows} newest tokens reach into sealed pages")
    column = sealed + index // kv.layout.page_tokens
    if column.numel() and int(column.max()) >= kv.table.shape[3]:
        raise IndexError(f"a lane of {int(column.max()) + 1} pages in a table {kv.table.shape[3]} wide")
    pages = kv.table[slot, layer].gather(1, column.T).T
    return check_pages(kv, pages), index % kv.layout.page_tokens


def lane_part(numbers: Tensor, layer: int, head: int, count: int) -> Tensor:
    """The first `count` numbers of one lane, a view of `numbers` [layers, kv_heads, capacity]."""
    if count > numbers.shape[2]:
        raise IndexError(f"{count} tokens in a lane, but numbers for {numbers.shape[2]}")
    return numbers[layer, head, :count]


def lane_positions(kv: PagedKV, slot: int, layer: int, head: int) -> Tensor:
    """[kept] int64: where a lane's tokens stand in the text."""
    kept = int(kv.kept[slot, layer, head])
    if slot not in kv.positions:
        return torch.arange(kept)
    return lane_part(kv.positions[slot], layer, head, kept).long()
