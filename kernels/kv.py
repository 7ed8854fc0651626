"""The two structures that every kernel reads: the paged KV memory and the rows of one step.

A lane's tokens lie in its pages in order. Its first `sealed` pages are full and in the slot's sealed format, the next
`rest` pages are full and in its second one; the pages after them are in the compute format, and the last of those may
be partly filled:

    table[slot, layer, head] -> [ sealed | sealed | ... | rest | ... | open | open | -1 ... ]
                                  formats[slot]           rest_formats[slot]  layout.compute

The order of a lane's tokens is that of their positions, but for plans that mix formats: there important tokens come
first, and `positions` says which they are. The newest tokens are last in any lane. Where `rest` pages span layers, the
lanes of a head in two layers have the same ones; no other page is in two places of a slot.

Kernels never allocate pages and never change `kept`, `sealed` or `table`: the engine does, before and after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.bases import Bases, Rope
from winnow.kernels.layer_merge import LayerMerge
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reading import ReadState
from winnow.kernels.vote import Vote


@dataclass(frozen=True, slots=True)
class Energy:
    """What queries of a window put into each channel."""

    sums: Tensor
    """[layers, kv_heads, head_dim] f64: of the squares of queries after RoPE, of all query heads of a lane"""
    first: int
    """The window: rows at the positions from `first` up to, not with, `last`"""
    last: int


@dataclass(slots=True)
class PagedKV:
    """One arena of pages and the lane tables, which the kernels read in place."""

    layout: PageLayout
    data: Tensor
    """[pages, page_bytes] uint8"""
    table: Tensor
    """[slots, layers, kv_heads, width] int32: page ids; -1 where the lane has no page"""
    kept: Tensor
    """[slots, layers, kv_heads] int32: tokens a lane holds, with the step's new tokens counted already"""
    sealed: Tensor
    """[slots, layers, kv_heads] int32: leading pages in the slot's sealed format; the rest is in the compute format"""
    formats: Tensor
    """[slots] uint8: the sealed PageFormat"""
    rest: Tensor
    """[slots, layers, kv_heads] int32: full pages in the slot's second sealed format, behind the `sealed` ones"""
    rest_formats: Tensor
    """[slots] uint8: the second sealed PageFormat"""
    mass: dict[int, Tensor] = field(default_factory=dict)
    """slot -> [layers, kv_heads, capacity] f32: attention mass by lane index, for plans that score with it"""
    earlier_mass: dict[int, Tensor] = field(default_factory=dict)
    """slot -> its mass when the newest queries began to vote, for plans that hear them apart from the others"""
    votes: dict[int, Vote] = field(default_factory=dict)
    """slot -> how its mass is counted; `Vote()` where there is none"""
    noise: dict[int, Tensor] = field(default_factory=dict)
    """slot -> shaped as its mass, f32: added to the logits of votes that are noisy, by lane index"""
    moments: dict[int, Tensor] = field(default_factory=dict)
    """slot -> [layers, q_heads, 1 + head_dim, head_dim] f64: sums over the voting rows' queries before RoPE, of q, and
    of the outer products of q with itself, whose upper triangle counts"""
    energy: dict[int, Energy] = field(default_factory=dict)
    """slot -> what the queries of its window have put into each channel so far, until it is asked for"""
    channels: dict[int, Tensor] = field(default_factory=dict)
    """slot -> [layers, kv_heads, head_dim] uint8: 1 for the channels of keys that stay where pages do not hold all"""
    positions: dict[int, Tensor] = field(default_factory=dict)
    """slot -> [layers, kv_heads, capacity] int32: positions by lane index, for plans that evict; otherwise position
    and lane index are the same"""
    log_weights: dict[int, Tensor] = field(default_factory=dict)
    """slot -> [layers, kv_heads, capacity] f32, finite: added to the scores of a lane's tokens, by lane index. The log
    of how many tokens a token stands for; a slot without any counts each token once"""
    reading: dict[int, ReadState] = field(default_factory=dict)
    """slot -> how its rows choose what they read; those of other slots read all"""
    bases: dict[PageFormat, Bases] = field(default_factory=dict)
    """What pages of these formats hold coordinates in"""
    rope: Rope | None = None
    """For formats that hold keys as they are before it"""
    stale: set[int] = field(default_factory=set)
    """Slots whose rows of `table` were changed since a backend that has its own copy of it looked"""
    native: Any = field(default=None, repr=False, compare=False)
    """A backend's own handle"""

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.data.device

    @property
    def sides(self) -> tuple[dict[int, Tensor], ...]:
        """What slots hold outside the arena."""
        ballots = self.mass, self.earlier_mass, self.noise, self.moments
        return *ballots, self.channels, self.positions, self.log_weights

    @classmethod
    def allocate(
        cls,
        layout: PageLayout,
        pages: int,
        slots: int,
        layers: int,
        kv_heads: int,
        width: int,
        device: torch.device | None = None,
    ) -> PagedKV:
        """An arena of `pages` pages with empty lanes. The arena's memory is reserved but not touched.

        Pages are in the memory of `device`, where what slots hold beside them must be too; tables are in the host's.
        """
        lanes = (slots, layers, kv_heads)
        return cls(
            layout=layout,
            data=torch.empty((pages, layout.page_bytes), dtype=torch.uint8, device=device),
            table=torch.full((*lanes, width), -1, dtype=torch.int32),
            kept=torch.zeros(lanes, dtype=torch.int32),
            sealed=torch.zeros(lanes, dtype=torch.int32),
            formats=torch.full((slots,), int(layout.compute), dtype=torch.uint8),
            rest=torch.zeros(lanes, dtype=torch.int32),
            rest_formats=torch.full((slots,), int(layout.compute), dtype=torch.uint8),
        )


@dataclass(frozen=True, slots=True)
class Rest:
    """The second sealed part of the lanes that `repack` writes."""

    start: Tensor
    """[layers, kv_heads] int32: its leading pages that stay as they are; they are in `fmt` already, and may have stood
    in other columns"""
    pages: Tensor
    """[layers, kv_heads] int32: its pages, `start` included"""
    fmt: PageFormat
    merge: LayerMerge | None = None
    """For `PageFormat.MINI_CACHE`: lanes of layers that are merged move the same tokens, to the same pages here"""


@dataclass(slots=True)
class LaneBatch:
    """The rows of one step, sequence after sequence: prefill chunks and decode tokens alike."""

    slots: Tensor
    """[B] int32"""
    cu_rows: Tensor
    """[B+1] int32: the rows of sequence b are cu_rows[b]:cu_rows[b+1]; they are its lanes' newest tokens"""
    positions: Tensor
    """[T] int32: position of each row"""
    first_vote: Tensor
    """[B] int32: first of the sequence's rows, counted from its own first, whose attention adds to the slot's mass and
    whose query adds to its moments; no row does from `rows` on, or in a slot without them"""
    angles: Tensor | None = None
    """[T] int32: the row of the rotation tables that each row is turned by, where it is not at its position; None where
    all are"""
    rope: tuple[Tensor, Tensor] | None = None
    """The step's own cos and sin, [n, head_dim / 2] float32, where rows are not turned by the model's"""
    choices: dict[int, Tensor] = field(default_factory=dict)
    """b -> [rows, kv_heads, tokens] uint8: lane tokens that the rows of a sequence in `PagedKV.reading` chose, in the
    last layer where they did"""
    native: Any = field(default=None, repr=False, compare=False)
    """A backend's own handle"""

    @property
    def turned_by(self) -> Tensor:
        """[T] int32: the row of the rotation tables for each row."""
        return self.positions if self.angles is None else self.angles

    def make_room_for_choices(self, kv: PagedKV) -> None:
        """Empty choices for the sequences that read by a rule; once a step, before its first layer."""
        bounds, heads = self.cu_rows.tolist(), kv.table.shape[2]
        reading = [b for b, slot in enumerate(self.slots.tolist()) if slot in kv.reading]
        rooms = [(bounds[b + 1] - bounds[b], heads, int(kv.kept[int(self.slots[b])].max())) for b in reading]
        # One piece of memory, in which each begins at a multiple of 16 bytes.
        sizes = [-(-math.prod(room) // 16) * 16 for room in rooms]
        pieces = torch.zeros(sum(sizes), dtype=torch.uint8, device=kv.device).split(sizes)
        for b, room, piece in zip(reading, rooms, pieces, strict=True):
            self.choices[b] = piece[: math.prod(room)].view(room)
