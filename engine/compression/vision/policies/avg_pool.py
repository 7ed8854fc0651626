"""Average pooling: a control (Yao et al., 2024, arXiv:2405.20985, find it as good as trained projectors).

    merged(window) = mean over the tokens of k x k neighbours,  k the smallest with at most `keep` windows in all

k is whole, so that the number of tokens falls in steps: 1/4, 1/9, 1/16 ... of them. A window stands at its middle
token. Crops and frames are pooled alike; where even one token of each is more than `keep`, as many as fit stay.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View
from winnow.engine.compression.vision.pooling import grids, pooled, windows

if TYPE_CHECKING:
    from torch import Tensor


class AvgPool:
    """Average windows of neighbouring tokens; at most `keep` are left."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        pass

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        found = grids(image, keep, "avg_pool")
        for size in count(1):
            if sum(-(-grid.height // size) * -(-grid.width // size) for grid in found) <= keep:
                break
        return pooled(image, [(grid, windows(grid.height, size), windows(grid.width, size)) for grid in found])
