"""Zero-TPrune: prune within the vision tower by the graph of its attention (Wang et al., 2023, arXiv:2305.17328).

    rank(head)    = A(head)^T ... A(head)^T 1 / n,  A(head) [queries, keys] the layer's attention (weighted PageRank)
    importance(i) = sqrt(mean over heads of rank(head, i)^2), heads whose ranks vary too little or too much left out

A layer loses tokens in two stages. First the less important half look for the most similar token (cosine of keys) in
the other half, and those that find the most similar one are dropped: what they show is shown by a more important one.
Then importance is found anew among what is left, and the least important are dropped.

PageRank takes 30 rounds in the lowest quarter of the layers, where attention is spread, 5 in the middle and 1 in the
uppermost quarter, or as many as it takes until ranks do not change. A head counts if the variance of n * rank is in
[0.01, 0.7]; all count where none does.

Where we depart: the paper searches, model by model, which layers prune and how much; here every layer loses the same
number of tokens, of which `similar` is the share that the first stage drops. The paper does not say on what scale the
variance is taken; at n * rank, whose mean is 1, its bounds tell heads apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.encoder import LayerTokens, Reduction, linear_counts
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.matching import partners, unit_keys
from winnow.engine.compression.vision.policy import IMAGES
from winnow.engine.compression.vision.ranking import top

if TYPE_CHECKING:
    from torch import Tensor

VARIANCE = 0.01, 0.7
"""Of n * rank in a head that counts"""
CONVERGED = 1e-6
"""Change of n * rank in a round after which further rounds would change nothing but the last digits"""


class ZeroTPrune:
    """Drop tokens of the vision tower that more important ones resemble, and those that attention ranks lowest."""

    signals = frozenset({VisionSignal.ATTENTION, VisionSignal.KEYS})
    reads_text = False
    kinds = IMAGES

    class Params(PolicyParams):
        similar: float = Field(
            0.5, ge=0, le=1, allow_inf_nan=False, description="share of the tokens a layer loses that go by similarity"
        )

    def counts(self, layers: int, patches: int, keep: int, params: Params) -> list[int]:
        return linear_counts(layers, patches, keep)

    def reduce(self, tokens: LayerTokens, count: int, params: Params) -> Reduction:
        n, lead, rounds = len(tokens), tokens.lead, _rounds(tokens.layer, tokens.layers)
        attention = tokens.attend(slice(None))
        is_there = attention.new_ones(lead + n)
        order = importance(attention, is_there, rounds)[lead:].sort(descending=True, stable=True).indices
        low, high = order[(n + 1) // 2 :], order[: (n + 1) // 2]
        similarity = partners(unit_keys(tokens), low, high)[1]
        twins = low[top(similarity, min(round(params.similar * (n - count)), n // 2))]
        left = tokens.without(twins)
        is_there[lead + twins] = 0
        stay = left[top(importance(attention, is_there, rounds)[lead + left], count)]
        return Reduction.merging(stay, stay[:0], stay[:0], n)


def importance(attention: Tensor, is_there: Tensor, rounds: int) -> Tensor:
    """[n] float32 of the nodes of a graph, by attention [heads, n, n] from each node to those that are there.

    Args
        is_there [n] float32: 1, or 0 for nodes that are gone: the others' rows are scaled to sum to one without them
    """
    nodes = is_there.sum()
    scale = is_there / (attention @ is_there).clamp(min=1e-12)
    rank = (is_there / nodes).expand(len(attention), 1, -1)
    for _ in range(rounds):
        before, rank = rank, (rank * scale[:, None]) @ attention * is_there
        if bool((rank - before).abs().amax() * nodes <= CONVERGED):
            break
    rank = rank.squeeze(1)
    variance = ((rank * nodes - 1).square() * is_there).sum(1) / nodes
    counts = (variance >= VARIANCE[0]) & (variance <= VARIANCE[1])
    return (rank[counts] if bool(counts.any()) else rank).square().mean(0).sqrt()


def _rounds(layer: int, layers: int) -> int:
    if layer < layers / 4:
        return 30
    return 1 if layer >= layers - layers / 4 else 5
