"""Downsampling: a control that many methods lose to (Liao et al., 2025, arXiv:2510.07143, with the image's pixels).

    merged(cell) = mean over the part of the token grid that the cell covers (area interpolation)

The new grid is the one of at most `keep` cells whose cells are shortest along their longer side, and of those the one
with most cells. A cell stands at its middle token. Crops and frames share `keep` by their sizes; where they are more
than `keep`, as many stay. Pixels are left as they are: the tower has seen the image in full.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View
from winnow.engine.compression.vision.pooling import areas, grids, pooled
from winnow.engine.compression.vision.ranking import share

if TYPE_CHECKING:
    from torch import Tensor


class Downsample:
    """Interpolate the token grid to a smaller one; at most `keep` tokens are left."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        pass

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        found = grids(image, keep, "downsample")
        sizes = [grid.height * grid.width for grid in found]
        pieces = []
        # Each grid has one token at least, and the others go by size.
        parts = share(min(keep, sum(sizes)) - len(found), sizes, [size - 1 for size in sizes])
        for grid, part in zip(found, parts, strict=True):
            height, width = _smaller(grid.height, grid.width, part + 1)
            pieces.append((grid, areas(grid.height, height), areas(grid.width, width)))
        return pooled(image, pieces)


def _smaller(height: int, width: int, keep: int) -> tuple[int, int]:
    """Rows and columns of the grid that is to stand for one of this size."""
    candidates = [(rows, min(width, keep // rows)) for rows in range(1, min(height, keep) + 1)]
    return min(candidates, key=lambda grid: (max(height / grid[0], width / grid[1]), -grid[0] * grid[1], grid[0]))
