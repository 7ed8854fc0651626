"""Token correlation: dense crops keep more (Zhang et al., 2024, arXiv:2407.14439, "Token-level Correlation-guided
Compression").

    redundant(token) if more than `repeats` of its crop's tokens have keys of cosine >= `similarity` to its own
    density(crop)    = 1 - redundant tokens / tokens
    share(crop)      = keep * density * size / sum of them
    sampled          = the crop's share, drawn without replacement with chances that go by the class token's attention

Keys and attention are those of the last layer that is run. Draws go by the image and the knob `seed`: the tokens of
largest log attention - log(-log(u)), with u uniform in [0, 1), which is such a sample (Gumbel-top-k).

An image of one crop is sampled alone. The paper keeps as many tokens as the densities say; here they share `keep`. Its
code never came: the thresholds' values are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.hashing import uniform
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import crops, likeness, share, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class TokenCorr:
    """Give more to crops whose tokens differ, and draw tokens by what the tower's class token looks at."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.KEYS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        similarity: float = Field(
            0.7, ge=-1, le=1, allow_inf_nan=False, description="cosine from which on two tokens say the same"
        )
        repeats: float = Field(
            0.05,
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="part of a crop's tokens that say what a redundant one says",
        )
        seed: int = Field(0, ge=0, lt=1 << 32, description="another one draws other tokens")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        attention = image.signals.attention(-1)[patches]
        keys = unit(image.signals.keys(-1)[patches])
        drawn = uniform(seed, patches.new_tensor([params.seed]), patches[None, None])[0, 0]
        scores = attention.log() - (-drawn.log()).log()
        members = crops(image)
        weights = [len(crop) - _redundant(keys[crop], params) for crop in members]
        parts = share(keep, weights, [len(crop) for crop in members])
        chosen = [crop[top(scores[crop], part)] for crop, part in zip(members, parts, strict=True)]
        return kept(image, patches[torch.cat(chosen)])


def _redundant(units: Tensor, params: TokenCorr.Params) -> int:
    """How many tokens of a crop say what others say."""
    redundant = 0
    for first, like in likeness(units):
        like.diagonal(first).fill_(-2)
        redundant += int((like.ge(params.similarity).sum(1) > params.repeats * len(units)).sum())
    return redundant
