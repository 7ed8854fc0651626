"""VisionZip: dominant tokens, and the others merged (Yang et al., 2024, arXiv:2412.04467).

    dominant   = the tokens with most of the class token's attention in the last layer that is run
    targets    = of the rest, every (rest // contextual)-th
    merged(t)  = mean of the target t and of the others that are nearest to it, by cosine of the layer's keys

`contextual` tokens of `keep` are such targets, the others dominant (the paper's 54 + 10 of 64).

Where we depart: the reference merges before the projector, and adds the mean of what it assigns to the target, which
doubles its length; ours averages what the language model reads. Keys are compared whole, not averaged over heads. The
class token, which the reference counts as dominant, is none of the model's inputs. Each crop has its share of `keep`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, View, kept
from winnow.engine.compression.vision.ranking import absorbed, rest, shared_out, top, unit

if TYPE_CHECKING:
    from torch import Tensor


class VisionZip:
    """Keep what the tower's class token looks at, and merge the rest into tokens at even distances."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.KEYS, VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    class Params(PolicyParams):
        contextual: float = Field(
            0.15625, ge=0, lt=1, allow_inf_nan=False, description="part of `keep` that the other tokens are merged into"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        attention = image.signals.attention(-1)[patches]
        keys = unit(image.signals.keys(-1)[patches])
        merged = image.embeddings[patches]
        chosen = []
        for crop, part in shared_out(image, keep):
            contextual = round(part * params.contextual)
            dominant = top(attention[crop], part - contextual)
            others = crop[rest(len(crop), dominant)]
            chosen.append(crop[dominant])
            if contextual:
                targets = torch.arange(contextual) * (len(others) // contextual)
                merged[others[targets]] = absorbed(merged[others], keys[others], targets)
                chosen.append(others[targets])
        index = torch.cat(chosen)
        return kept(image, patches[index], merged[index])
