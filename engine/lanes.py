"""What one sequence holds at one moment, apart from the slot that it holds it in, and the room that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from winnow.kernels.vote import Vote

if TYPE_CHECKING:
    from winnow.engine.pages import Ints, PageArena


@dataclass(frozen=True)
class Lanes:
    """The rows of a slot in `PageArena`, and what it holds beside them."""

    table: Ints
    """[layers, kv_heads, n] pages; -1 where a lane has none"""
    columns: Ints
    """[layers, kv_heads], like the next three"""
    kept: Ints
    sealed: Ints
    rest: Ints
    formats: tuple[int, int]
    """Of sealed pages, and of those behind them"""
    sides: tuple[Tensor | None, ...]
    """`PagedKV.sides`"""
    vote: Vote | None
    held: Ints
    """[n] pages of all lanes, each once"""
    ballast: Ints
    """[n] pages that stand for the sides"""

    @classmethod
    def of(cls, arena: PageArena, slot: int, ballast: Ints) -> Lanes:
        """What a slot holds now: its rows are copied, its sides are not."""
        kv = arena.kv
        return cls(
            table=arena.table[slot, :, :, : int(arena.columns[slot].max())].copy(),
            columns=arena.columns[slot].copy(),
            kept=arena.kept[slot].copy(),
            sealed=arena.sealed[slot].copy(),
            rest=arena.rest[slot].copy(),
            formats=(int(arena.formats[slot]), int(arena.rest_formats[slot])),
            sides=tuple(side.get(slot) for side in kv.sides),
            vote=kv.votes.get(slot),
            held=arena.held(slot),
            ballast=ballast,
        )

    @property
    def pages(self) -> Ints:
        """[n] all that it refers to, each once."""
        return np.concatenate([self.held, self.ballast])

    @property
    def side_bytes(self) -> int:
        return sum(side.nbytes for side in self.sides if side is not None)


def room(count: int) -> int:
    """How many there is room for where there are `count`: at most an eighth more, or 15, so that growth is rare."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step
