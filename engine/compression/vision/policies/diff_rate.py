"""DiffRate: prune what is unimportant within the vision tower, then merge (Chen et al., 2023, arXiv:2305.17997).

    importance(i) = mean over heads of the class token's attention to i, in this layer;
                    in towers without one, of all patches' attention to i
    of the r tokens that a layer loses the least important go, and the others merge into what is left:
    into(a) = the b that stays with the largest cos(x(a), x(b)),  x = state behind the attention
    x = mean,  size = sum(size * similarity)

Where we depart: the paper trains how many tokens each layer prunes and merges, by gradient descent through a relaxed
choice. Without training every layer loses the same number, of which `merge` is the share that merges. A similarity
below zero counts as zero: the reference would let it take size away.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.encoder import LayerTokens, Reduction, linear_counts
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.matching import partners
from winnow.engine.compression.vision.policy import IMAGES
from winnow.engine.compression.vision.ranking import unit


class DiffRate:
    """Drop the least important tokens of each layer of the vision tower and merge the next ones into the others."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.HIDDEN})
    reads_text = False
    kinds = IMAGES

    class Params(PolicyParams):
        merge: float = Field(
            0.5, ge=0, le=1, allow_inf_nan=False, description="share of the tokens a layer loses that merge"
        )

    def counts(self, layers: int, patches: int, keep: int, params: Params) -> list[int]:
        return linear_counts(layers, patches, keep)

    def reduce(self, tokens: LayerTokens, count: int, params: Params) -> Reduction:
        import torch

        raters = slice(1) if tokens.has_class else slice(None)
        importance = tokens.attend(raters).mean((0, 1))[tokens.lead :]
        order = importance.sort(descending=True, stable=True).indices
        merging = round(params.merge * (len(tokens) - count))
        stay, sources = order[:count], order[count : count + merging]
        into, similarity = partners(unit(tokens.states.float()), sources, stay)
        sizes = tokens.sizes.index_copy(0, sources, tokens.sizes[sources] * similarity.clamp(min=0))
        merged = Reduction.merging(stay, sources, into, len(tokens))
        return replace(merged, weights=torch.ones_like(sizes), sizes=sizes)
