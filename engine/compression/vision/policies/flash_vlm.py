"""FlashVLM: what the text is about, fused with what stands out (Cai et al., 2025, arXiv:2512.20561).

    relevance(token) = softmax over the tokens of cos(token, mean direction of the text) / temperature
    score(token)     = text_weight * log relevance + (1 - text_weight) * log saliency

The best by score are kept, but for `diverse` of `keep`: those are, one after the other, the tokens least like any
chosen so far. Saliency is the class token's attention in the tower. Where there is no text, saliency decides alone.

No code came with the paper, and `text_weight` is ours. All crops are one set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import Likeness, spread, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class FlashVLM:
    """Keep what the text is about and the tower's class token looks at, and some of what is unlike that."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.EMBEDDINGS})
    reads_text = True
    kinds = ANY_KIND

    class Params(PolicyParams):
        temperature: float = Field(
            0.01, ge=1e-4, le=100, allow_inf_nan=False, description="of the softmax over cosines to the text"
        )
        text_weight: float = Field(
            0.5, ge=0, le=1, allow_inf_nan=False, description="what the text counts, beside saliency"
        )
        diverse: float = Field(
            0.5, ge=0, le=1, allow_inf_nan=False, description="part of `keep` that is chosen to be unlike the others"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches = image.patches
        units = unit(image.embeddings[patches])
        towards = unit(unit(text).sum(0, keepdim=True))[0]
        relevance = (units @ towards / params.temperature).log_softmax(0)
        saliency = image.signals.attention(-1)[patches].clamp(min=1e-12).log()
        scores = params.text_weight * relevance + (1 - params.text_weight) * saliency
        best = keep - min(keep - 1, int(keep * params.diverse))
        return kept(image, patches[spread(Likeness(units, keep - best), top(scores, best), keep - best)])
