"""Images as vision policies are shown them, made up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.compression.vision.features import Features

LAYERS = 4


@dataclass(frozen=True)
class FakeSignals:
    """Numbers drawn once for each layer; zeros where a token stands for no patch."""

    is_patch: Tensor
    seed: int
    levels: int
    """Distinct values that are drawn: few make ties"""
    layers: int = LAYERS

    @property
    def nbytes(self) -> int:
        return self.is_patch.nbytes

    def attention(self, layer: int) -> Tensor:
        drawn = self._drawn(layer, 0, 1).squeeze(1) + 1
        return drawn / drawn.sum() * self.is_patch

    def keys(self, layer: int) -> Tensor:
        return self._drawn(layer, 1, 12)

    def hidden(self, layer: int) -> Tensor:
        return self._drawn(layer, 2, 10)

    def _drawn(self, layer: int, what: int, width: int) -> Tensor:
        assert -self.layers <= layer < 0
        return (
            drawn((len(self.is_patch), width), self.seed * 100 - layer * 10 + what, self.levels)
            * self.is_patch[:, None]
        )


def drawn(shape: tuple[int, ...], seed: int, levels: int = 0) -> Tensor:
    """Normal numbers, or with `levels` whole ones from 0 to levels - 1."""
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).float()
    return torch.randn(shape, generator=generator).abs() if len(shape) == 1 else torch.randn(shape, generator=generator)


def grid(crop: int, height: int, width: int, newlines: bool = False) -> list[tuple[int, int, int]]:
    """Places of a crop's tokens."""
    rows = [[(crop, row, column) for column in range(width)] for row in range(height)]
    return [place for row in rows for place in [*row, *([MARK] if newlines else [])]]


MARK = (-1, -1, -1)


def beside(crops: list[int], height: int, width: int) -> list[tuple[int, int, int]]:
    """Places of crops that stand side by side, row by row, each row with a newline."""
    return [
        place
        for row in range(height)
        for place in [*((crop, row, column) for crop in crops for column in range(width)), MARK]
    ]


def image(places: list[tuple[int, int, int]], hidden: int = 8, seed: int = 0, levels: int = 0) -> Features:
    """An image of this layout with random contents."""
    at = torch.tensor(places)
    return Features(
        embeddings=drawn((len(places), hidden), 7 + seed, levels),
        places=at,
        signals=FakeSignals(at[:, 0] >= 0, seed, levels),
    )
