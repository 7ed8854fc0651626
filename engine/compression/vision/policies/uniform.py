"""Uniform: a control that spreads what it keeps evenly.

    kept(i) = floor((i + 1/2) * patches / keep),  i = 0 ... keep - 1

in the order in which the language model would read the patches: row by row, crop by crop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import evenly

if TYPE_CHECKING:
    from torch import Tensor


class Uniform:
    """Keep tokens at even distances."""

    signals: frozenset[VisionSignal] = frozenset()
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        pass

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches = image.patches
        return kept(image, patches[evenly(len(patches), keep)])
