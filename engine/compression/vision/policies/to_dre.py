"""ToDRE: keep a diverse few, which answer for all (Li et al., 2025, arXiv:2505.18757).

    next(token) = cosine distance to the nearest of those chosen so far, each time the largest (greedy k-center)

of what the language model reads. All crops are one set. Ours begins with the token that points away from the mean of
all most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import Likeness, spread, unit

if TYPE_CHECKING:
    from torch import Tensor


class ToDRE:
    """Keep tokens so that every other one is like one of them."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        pass

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches = image.patches
        units = unit(image.embeddings[patches])
        first = (units @ units.mean(0)).argmin(keepdim=True)
        return kept(image, patches[spread(Likeness(units), first, keep - 1)])
