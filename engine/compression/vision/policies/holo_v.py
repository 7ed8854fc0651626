"""HoloV: segments of the image share the budget (Zou et al., 2025, arXiv:2510.02912).

    spread(token)  = variance of its cosines to the other tokens of its segment
    score(token)   = attention + variance_weight * spread * (mean attention / mean spread)
    share(segment) = keep * mean score / sum of mean scores, and no more than the segment has

Segments are runs of tokens in the order in which the model would read them. Of each stay the tokens with most of the
class token's attention.

Where we depart: the reference takes the means in the last factor over the segment, so that the spread cancels out of
its mean score and has no effect; here they are the image's. It counts a token's cosine to itself as 0 in the variance,
weighs segments of one token by a thousandth of the others, and fills up with zeros what full segments cannot take; here
the other segments take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import likeness, share, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class HoloV:
    """Share the budget among segments by attention and variety, and keep what the class token looks at in each."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        segments: int = Field(16, ge=1, le=4096, description="parts that the image is cut into")
        variance_weight: float = Field(
            0.09, ge=0, le=100, allow_inf_nan=False, description="what variety counts beside attention"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        attention = image.signals.attention(-1)[patches]
        segments = torch.arange(len(patches)).tensor_split(min(params.segments, len(patches)))
        spread = torch.cat([_spread(unit(image.embeddings[patches[segment]])) for segment in segments])
        scores = attention + params.variance_weight * spread * (attention.mean() / spread.mean().clamp(min=1e-12))
        weights = [float(scores[segment].mean()) for segment in segments]
        parts = share(keep, weights, [len(segment) for segment in segments])
        chosen = [segment[top(attention[segment], part)] for segment, part in zip(segments, parts, strict=True)]
        return kept(image, patches[torch.cat(chosen)])


def _spread(units: Tensor) -> Tensor:
    """[n] variance of each row's cosines to the others; zeros for less than two others."""
    import torch

    others = len(units) - 1
    if others < 2:
        return units.new_zeros(len(units))
    parts = []
    for first, like in likeness(units):
        own = like.diagonal(first)
        apart = like - (like.sum(1) - own)[:, None] / others
        apart.diagonal(first).fill_(0)
        parts.append(apart.square().sum(1) / others)
    return torch.cat(parts)
