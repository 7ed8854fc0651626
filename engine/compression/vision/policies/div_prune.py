"""DivPrune: keep the tokens that are least alike (Alvar et al., 2025, arXiv:2503.02175).

    distance(a, b) = 1 - cos(embedding a, embedding b)
    first(token)   = distance to its nearest neighbour;  next(token) = distance to the nearest of those chosen

each time the largest: a greedy solution of the max-min diversity problem. All crops are one set, as in the reference.
The reference may choose one of several equal tokens twice; here no token is chosen again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import Likeness, spread, unit

if TYPE_CHECKING:
    from torch import Tensor


class DivPrune:
    """Keep the tokens that are least alike."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        pass

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        units = unit(image.embeddings[image.patches])
        like = Likeness(units, len(units))
        loneliest = like.largest().argmin(keepdim=True)
        return kept(image, image.patches[spread(like, loneliest, keep - 1)])
