"""Repacks as the engine asks for them: which tokens stay, which pages they go to, and the tables afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import as_float, decode_pages, encode_pages
from winnow.kernels.reference.formats import Place
from winnow.kernels.reference.lanes import lane_positions

from .build import Held, State, int32

Lane = tuple[int, int]


@dataclass(frozen=True)
class Move:
    """One repack of a sequence. The tuples go by lane and are repeated; pages are counted in the new format."""

    held: Held
    fmt: PageFormat
    keep: tuple[int, ...] | None = None
    """tokens to keep behind the first `start` pages, chosen at random; None: all of them, and no list"""
    start: tuple[int, ...] = (0,)
    residual: int = 0
    """at least so many of the newest tokens stay in the compute format"""
    fresh: bool = False
    """to fresh pages; otherwise to the lane's own as far as it has them"""


@dataclass
class Repack:
    """The arguments of one `repack`, and the lane tables that the engine would write after it."""

    slot: int
    fmt: PageFormat
    keep: Tensor | None
    counts: Tensor
    start: Tensor
    dst_table: Tensor
    dst_sealed: Tensor
    tokens: dict[Lane, Tensor]
    """lane indices of the old lane that the new lane holds, the first `start` pages included"""

    def run(self, ops: Backend, kv: PagedKV) -> None:
        keep = None if self.keep is None else self.keep.to(kv.device)
        ops.repack(kv, self.slot, keep, self.counts, self.start, self.dst_table, self.dst_sealed, self.fmt)

    def positions(self, kv: PagedKV) -> Tensor:
        """[layers, kv_heads, most] int32: where the new lanes' tokens stand in the text, as long as the tables are the
        old ones."""
        lanes = {lane: lane_positions(kv, self.slot, *lane)[index] for lane, index in self.tokens.items()}
        positions = torch.zeros(*self.counts.shape, max(map(len, lanes.values())), dtype=torch.int32)
        for (layer, head), lane in lanes.items():
            positions[layer, head, : len(lane)] = lane
        return positions

    def commit(self, kv: PagedKV) -> None:
        """Writes the sequence's new tables, as the engine does."""
        kv.positions[self.slot] = self.positions(kv)
        leading = torch.arange(self.dst_table.shape[2]) < self.start[..., None]
        old = torch.nn.functional.pad(kv.table[self.slot], (0, self.dst_table.shape[2] - kv.table.shape[3]), value=-1)
        wider = torch.full((*kv.table.shape[:3], self.dst_table.shape[2]), -1, dtype=torch.int32)
        wider[..., : kv.table.shape[3]] = kv.table
        wider[self.slot] = torch.where(leading, old, self.dst_table)
        kv.table = wider
        kv.kept[self.slot] = self.start * kv.layout.capacity(self.fmt) + self.counts
        kv.sealed[self.slot] = self.dst_sealed
        kv.formats[self.slot] = int(self.fmt)

    def written(self) -> Tensor:
        """[n] int64: ids of the pages that the repack writes."""
        return self.dst_table[self.dst_table >= 0].long()


def plan(state: State, slot: int, move: Move, seed: int = 0) -> Repack:
    """Chooses tokens and pages for a move; fresh pages come from `state.free`."""
    kv, layout, rng = state.kv, state.kv.layout, torch.Generator().manual_seed(seed)
    lanes = [(layer, head) for layer in range(kv.table.shape[1]) for head in range(kv.table.shape[2])]
    capacity = layout.capacity(move.fmt)
    tokens, counts, start, sealed = {}, [], [], []
    for i, lane in enumerate(lanes):
        first = move.start[i % len(move.start)]
        behind = torch.arange(first * capacity, int(kv.kept[slot][lane]))
        if move.keep is not None:
            count = min(move.keep[i % len(move.keep)], behind.numel())
            behind = behind[torch.randperm(behind.numel(), generator=rng)[:count].sort().values]
        tokens[lane] = torch.cat([torch.arange(first * capacity), behind])
        counts.append(behind.numel())
        start.append(first)
        sealed.append(first + max(behind.numel() - move.residual, 0) // capacity)
    width = max(kv.table.shape[3], *(s + layout.pages(c) for s, c in zip(sealed, counts, strict=True)))
    table = torch.full((len(lanes), width), -1, dtype=torch.int32)
    for i, lane in enumerate(lanes):
        columns = sealed[i] + layout.pages(counts[i] - (sealed[i] - start[i]) * capacity)
        own = [] if move.fresh else [page for page in kv.table[slot][lane][:columns].tolist() if page >= 0]
        missing = columns - max(len(own), start[i])
        pages, state.free = state.free[:missing].tolist(), state.free[missing:]
        table[i, start[i] : columns] = torch.tensor([*own[start[i] :], *pages], dtype=torch.int32)
    keep = None
    if move.keep is not None:
        chosen = [tokens[lane][first * capacity :] for lane, first in zip(lanes, start, strict=True)]
        keep = torch.full((len(lanes), max(counts) + 2), -1, dtype=torch.int32)
        for row, indices in zip(keep, chosen, strict=True):
            row[: indices.numel()] = indices
    return Repack(
        slot,
        move.fmt,
        keep=None if keep is None else _by_lane(kv, keep),
        counts=_by_lane(kv, int32(counts)),
        start=_by_lane(kv, int32(start)),
        dst_table=_by_lane(kv, table),
        dst_sealed=_by_lane(kv, int32(sealed)),
        tokens=tokens,
    )


def stored(
    layout: PageLayout,
    parts: Sequence[Tensor],
    fmt: PageFormat,
    full: int,
    rest_fmt: PageFormat = PageFormat.INT2,
    rest_full: int = 0,
    *,
    place: Place,
) -> list[Tensor]:
    """What keys and values [n, D] become: the first `full` tokens in pages of `fmt`, the next `rest_full` in pages of
    `rest_fmt`, what is left in the compute format; `place` is theirs."""
    done, sides = 0, ([], [])  # type: tuple[int, tuple[list[Tensor], list[Tensor]]]
    for count, one in ((full, fmt), (rest_full, rest_fmt)):
        at = replace(place, positions=place.positions[done : done + count])
        raw = encode_pages(parts[0][done : done + count], parts[1][done : done + count], layout, one, at)
        pages = torch.nn.functional.pad(raw, (0, layout.page_bytes - raw.shape[1]))
        for side, numbers in zip(sides, decode_pages(pages, layout, one, at), strict=True):
            side.append(numbers)
        done += count
    return [
        torch.cat([*side, as_float(part[done:], layout.compute).float()])
        for side, part in zip(sides, parts, strict=True)
    ]


def _by_lane(kv: PagedKV, rows: Tensor) -> Tensor:
    return rows.unflatten(0, (kv.table.shape[1], kv.table.shape[2])).contiguous()
