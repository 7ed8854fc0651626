"""Efficient Video Sampling: keep what has changed since the frame before (Bagrov et al., 2025, arXiv:2510.14624).

    score(token) = 1 - cos(token, token in the same cell of the previous frame);  in the first frame, infinite

The largest scores of the whole video stay: a still scene leaves little but its first frame, which always stays whole,
even where `keep` is less than that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import VIDEOS, View, kept
from winnow.engine.compression.vision.ranking import frames, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class EVS:
    """Keep the first frame of a video, and of the others what has changed since the frame before."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = VIDEOS

    class Params(PolicyParams):
        pass

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches, at = image.patches, frames(image)
        x = unit(image.embeddings[patches])[at]
        change = x.new_full(at.shape, float("inf"))
        change[1:] = 1 - (x[1:] * x[:-1]).sum(2)
        return kept(image, patches[top(change.flatten(), max(keep, at.shape[1]))])
