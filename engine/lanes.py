"""What one sequence holds at one moment, apart from the slot that it holds it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from winnow.kernels.vote import Vote

if TYPE_CHECKING:
    from winnow.engine.pages import Ints


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
    ballast: Ints
    """[n] pages that stand for the sides"""

    @property
    def held(self) -> Ints:
        """[n] pages of all lanes."""
        return self.table[self.table >= 0]

    @property
    def pages(self) -> Ints:
        """[n] with those that stand for the sides."""
        return np.concatenate([self.held, self.ballast])

    @property
    def side_bytes(self) -> int:
        return sum(side.nbytes for side in self.sides if side is not None)
