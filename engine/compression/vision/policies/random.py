"""Random: the control that every other policy has to beat.

    score(token) = hash(seed of the image, knob `seed`, token) in [0, 1);  the `keep` largest stay

The same image keeps the same tokens whenever it comes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.hashing import uniform
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import top

if TYPE_CHECKING:
    from torch import Tensor


class Random:
    """Keep tokens at random."""

    signals: frozenset[VisionSignal] = frozenset()
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        seed: int = Field(0, ge=0, lt=1 << 32, description="another one keeps other tokens")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches = image.patches
        scores = uniform(seed, patches.new_tensor([params.seed]), patches[None, None])[0, 0]
        return kept(image, patches[top(scores, keep)])
