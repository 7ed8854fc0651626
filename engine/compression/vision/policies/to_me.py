"""ToMe: merge similar tokens within the vision tower (Bolya et al., 2022, arXiv:2210.09461).

    similarity(a, b) = cos(key(a), key(b)),  key = mean over heads
    each a of one set looks for the most similar b of the other; the most similar pairs merge:
    x = sum(size * x) / sum(size),  size = sum(size)

Tokens are dealt in turn into two sets. Every layer takes the same number of tokens away, between attention and MLP, and
what is left is attended to in proportion to its size.

Where we depart: the reference takes r tokens from each layer, half of them at most, and lets the number that is left
follow; here `keep` is what is left, and a layer that has to lose more than half of its tokens matches a second time.
"""

from __future__ import annotations

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.encoder import LayerTokens, Reduction, linear_counts
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.matching import dealt
from winnow.engine.compression.vision.policy import IMAGES


class ToMe:
    """Merge the most similar tokens of each layer of the vision tower."""

    signals = frozenset({VisionSignal.KEYS})
    reads_text = False
    kinds = IMAGES

    class Params(PolicyParams):
        pass

    def counts(self, layers: int, patches: int, keep: int, params: Params) -> list[int]:
        return linear_counts(layers, patches, keep)

    def reduce(self, tokens: LayerTokens, count: int, params: Params) -> Reduction:
        return dealt(tokens).merged(len(tokens) - count)
