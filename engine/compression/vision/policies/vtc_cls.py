"""VTC-CLS: keep what the class token looks at in several layers (Wang et al., 2024, arXiv:2412.05819).

    score(token) = sum over the tower's last `layers` layers of the class token's attention, mean over heads

The reference sums layers 17 to 23 of CLIP's 24: the last seven that LLaVA runs. Where there is no class token, the
attention matrix's columns are summed. Crops compete for `keep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import top

if TYPE_CHECKING:
    from torch import Tensor


class VTCCLS:
    """Keep what the tower's class token looks at in its last layers."""

    signals = frozenset({VisionSignal.ATTENTION})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        layers: int = Field(7, ge=1, le=256, description="last layers of the tower that vote; all if it has less")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        voting = range(1, min(params.layers, image.signals.layers) + 1)
        scores = torch.stack([image.signals.attention(-layer) for layer in voting]).sum(0)
        return kept(image, image.patches[top(scores[image.patches], keep)])
