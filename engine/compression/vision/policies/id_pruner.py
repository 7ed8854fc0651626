"""IDPruner: importance and diversity by maximal marginal relevance (Tan et al., 2026, arXiv:2602.13315).

    importance  = class token's attention in the last layer that is run, scaled to 0 ... 1
    next(token) = relevance * importance - (1 - relevance) * its largest cosine to a token chosen so far

each time the largest; the first is the most important one. Cosines are those of what the language model reads.

Where we depart: the reference has a trained scorer for importance, of each model its own. All crops are one set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import Likeness, spread, unit

if TYPE_CHECKING:
    from torch import Tensor


class IDPruner:
    """Keep what the tower's class token looks at and what is unlike that, one token after the other."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        relevance: float = Field(
            0.5, ge=0, le=1, allow_inf_nan=False, description="what importance counts, beside novelty"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches = image.patches
        importance = image.signals.attention(-1)[patches]
        least, most = importance.aminmax()
        importance = (importance - least) / (most - least + 1e-6)
        like = Likeness(unit(image.embeddings[patches]), keep)
        worth = params.relevance * importance
        first = importance.argmax(keepdim=True)
        return kept(image, patches[spread(like, first, keep - 1, worth, 1 - params.relevance)])
