"""Prefill in stages: upper layers read only the tokens of the prompt that a lower layer has chosen.

    stage 0   layers [0, l]       over the whole prompt, chunk by chunk; what they hand on is kept beside the pages
    stage 1   layers (l, last]    over the chosen rows, at their own positions

Lanes of upper layers never hold what was not chosen. A stage begins when the one before it is over, whatever the
chunks, so that a choice is made over the whole prompt. What is handed on is one hidden state a token, in memory of its
own, until the prompt is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from winnow.engine.pages import Ints
from winnow.kernels.host import to_device


@dataclass(eq=False)
class Staging:
    """How far a sequence has got with its prompt."""

    bounds: tuple[int, ...]
    """First layer of each stage, and the number of layers"""
    rows: Ints
    """[rows] positions that this stage reads, ascending"""
    stage: int = 0
    done: int = 0
    """Rows that it has read"""
    hidden: Tensor | None = None
    """[rows, hidden size] float32: what it reads; the prompt's own tokens if None"""
    handed: Tensor | None = None
    """[rows, hidden size] float32: what it hands on"""

    @classmethod
    def begin(cls, bounds: tuple[int, ...], prompt_tokens: int) -> Staging:
        return cls(bounds, np.arange(prompt_tokens, dtype=np.int32))

    @property
    def layers(self) -> range:
        return range(self.bounds[self.stage], self.bounds[self.stage + 1])

    @property
    def left(self) -> int:
        return len(self.rows) - self.done

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.bounds) - 2

    def hand_on(self, hidden: Tensor) -> None:
        """Keeps what the stage's layers made [count, hidden size] of its next rows."""
        if self.handed is None:
            self.handed = hidden.new_empty((len(self.rows), hidden.shape[-1]))
        self.handed[self.done : self.done + len(hidden)] = hidden

    def next(self, chosen: Ints) -> None:
        """Begins the next stage with these of the rows (ascending indices)."""
        assert self.handed is not None
        rows = to_device(torch.from_numpy(chosen).long(), self.handed.device)
        self.hidden, self.handed = self.handed[rows], None
        self.rows = self.rows[chosen]
        self.stage += 1
        self.done = 0

    def growth(self, count: int, upto: int) -> Ints:
        """[layers] tokens that lanes gain when the stage reads `count` more rows; later stages gain `upto`."""
        gains = np.zeros(self.bounds[-1], np.int32)
        gains[self.layers.start : self.layers.stop] = count
        gains[self.layers.stop :] = upto
        return gains
