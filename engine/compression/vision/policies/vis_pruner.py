"""VisPruner: important tokens, and others without duplicates (Zhang et al., 2024, arXiv:2412.01818).

    important = the tokens with most of the class token's attention, floor(important * keep) of them
    diverse   = what is left of the rest when, round by round, it is cut into two halves (every other token, at first in
                the order of attention) and the `step` tokens of one that are most like a token of the other are dropped

Tokens are alike by the cosine of what the tower's last layer puts out. A round leaves the first half's survivors, the
most duplicated first, and then the second half. Each crop has its share of `keep`, as in the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import shared_out, unit

if TYPE_CHECKING:
    from torch import Tensor


class VisPruner:
    """Keep what the tower's class token looks at, and of the rest what is not said twice."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.HIDDEN})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        important: float = Field(
            0.5, ge=0, le=1, allow_inf_nan=False, description="part of `keep` that goes by attention"
        )
        step: int = Field(8, ge=1, le=1024, description="duplicates that a round drops")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        attention = image.signals.attention(-1)[patches]
        units = unit(image.signals.hidden(-1)[patches])
        chosen = []
        for crop, part in shared_out(image, keep):
            order = attention[crop].sort(descending=True, stable=True).indices
            important = int(part * params.important)
            diverse = _distinct(units[crop], order[important:], part - important, params.step)
            chosen += [crop[order[:important]], crop[diverse]]
        return kept(image, patches[torch.cat(chosen)])


def _distinct(units: Tensor, left: Tensor, count: int, step: int) -> Tensor:
    """[count] int64: what stays of the indices `left`."""
    import torch

    if count == 0:
        return left[:0]
    like = units @ units.T
    while len(left) > count:
        first, second = left[::2], left[1::2]
        nearest = like.index_select(0, first).index_select(1, second).amax(1)
        duplicates = nearest.sort(descending=True, stable=True).indices
        left = torch.cat((first[duplicates[min(step, len(left) - count) :]], second))
    return left
