"""Images as vision policies are shown them, made up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.registry import vision_policy

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
        drawn = self._drawn(layer, 0, 1).squeeze(1).abs() + 0.1
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


def image(
    places: list[tuple[int, int, int]],
    crop_grid: tuple[int, int] | None = None,
    seed: int = 0,
    levels: int = 0,
    hidden: int = 8,
) -> Features:
    """An image of this layout with random contents."""
    at = torch.tensor(places)
    return Features(
        embeddings=drawn((len(places), hidden), 7 + seed, levels),
        places=at,
        signals=FakeSignals(at[:, 0] >= 0, seed, levels),
        crop_grid=crop_grid,
    )


THUMBNAIL = grid(0, 4, 4)
LAYOUTS: dict[str, tuple[list[tuple[int, int, int]], tuple[int, int] | None]] = {
    "one row": (grid(0, 1, 7), None),
    "square": (grid(0, 6, 6), None),
    "wide, with newlines": (grid(0, 3, 8, newlines=True), None),
    "a newline at the end": ([*grid(0, 4, 4), MARK], None),
    "thumbnail and crops": (THUMBNAIL + beside([1, 2], 4, 4) + beside([3, 4], 4, 4), (2, 2)),
    "crops cut at the sides": (  # as LLaVA-NeXT leaves out what was padding: the outer column of each
        THUMBNAIL + [place for place in beside([1, 2], 4, 4) if place[:1] + place[2:] not in ((1, 0), (2, 3))],
        (1, 2),
    ),
    "crops one after the other, the thumbnail last": (  # as Idefics3 has them
        [place for crop in range(1, 7) for place in grid(crop, 4, 4)] + THUMBNAIL,
        (3, 2),
    ),
    "a crop of which the model left out rows and columns": (  # as OneVision shrinks large images
        THUMBNAIL + [place for place in beside([1], 4, 4) if place == MARK or (place[1] != 1 and place[2] != 2)],
        (1, 1),
    ),
    "frames": (grid(0, 4, 4) + grid(1, 4, 4) + grid(2, 4, 4), None),
    "frames, a newline at the end": ([place for frame in range(5) for place in grid(frame, 3, 5)] + [MARK], None),
    "frames of one token": ([place for frame in range(9) for place in grid(frame, 1, 1)], None),
}


def layouts(name: str) -> list[str]:
    """Those of the layouts that a policy prunes."""
    kinds = vision_policy(name).kinds
    return [layout for layout in LAYOUTS if ("video" if layout.startswith("frames") else "image") in kinds]
