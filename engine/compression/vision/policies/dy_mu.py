"""DyMU: merge as many tokens as an image has to spare (Wang et al., 2025, arXiv:2504.17040).

    each a looks for its most similar b as in `to_me`;  pairs with similarity(a, b) > threshold(layer) merge

A plain image leaves fewer tokens than a busy one. `keep` is the most that are left: where too few pairs are above the
threshold, the most similar of the others merge as well, so that each layer leaves at most what `to_me` would.

Thresholds are the model's: `winnow thresholds` finds them on a folder of images, as the reference does, so that these
lose r tokens in each layer in the mean. Without them `keep` alone says how much of an image merges.

Where we depart: virtual unmerging is left out. It has the language model attend as though a merged token stood at the
places of all patches that it is made of, each with a key turned to its own position; pages hold one key per token, and
attention over keys that are not there could not be exact.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.encoder import LayerTokens, Reduction, linear_counts
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.matching import dealt
from winnow.engine.compression.vision.policy import IMAGES

Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class DyMU:
    """Merge what is more similar than a threshold in each layer of the vision tower."""

    signals = frozenset({VisionSignal.KEYS})
    reads_text = False
    kinds = IMAGES

    class Params(PolicyParams):
        thresholds: list[Cosine] | None = Field(
            None,
            min_length=1,
            max_length=128,
            description="cosine above which a pair merges, by layer; the last one holds for all further layers",
        )

    def counts(self, layers: int, patches: int, keep: int, params: Params) -> list[int]:
        return linear_counts(layers, patches, keep)

    def reduce(self, tokens: LayerTokens, count: int, params: Params) -> Reduction:
        pairs = dealt(tokens)
        drop = len(tokens) - count
        if params.thresholds is not None:
            threshold = params.thresholds[min(tokens.layer, len(params.thresholds) - 1)]
            drop = max(drop, int((pairs.similarity > threshold).sum()))
        return pairs.merged(drop)
