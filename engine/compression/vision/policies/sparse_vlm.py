"""SparseVLM: words that are about the image rate its tokens, and some of the rest are recycled (Zhang et al., 2024,
arXiv:2410.04417).

    raters       tokens behind the image, up to the end of its turn, whose embeddings its tokens are most like
    score(token) = mean over raters and heads of softmax(q.k) in the layer below
    recycled     of the dropped, the 30 % with the highest scores, clustered ten to one (density peaks, k nearest
                 neighbours); a cluster's mean hidden state stands where its centre stood

Three times, after layers 2, 6 and 15 of 32. The reference leaves 300, 200 and 110 of 576 tokens and the recycled
beside them ("192" in the paper, the mean over layers). Here the shares are keep ^ 0.39, keep ^ 0.64 and `keep`, which
gives those numbers for a `keep` of 110, recycled tokens included.

Where we depart: the paper's number of tokens follows from the rank of the attention matrix, its code has tables; and
its recycled tokens stand behind all others of the image at the positions of tokens that are gone. Densities are not
disturbed by noise: of equals the first is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.clustering import density_peaks
from winnow.engine.compression.vision.depths import Layers, at_depth, exponents, left_after
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView
from winnow.engine.compression.vision.ranking import top
from winnow.engine.compression.vision.raters import relevant

if TYPE_CHECKING:
    from torch import Tensor

PAPER = (3, 7, 16)
SHARES = exponents((300, 200, 110), 576)


class SparseVLM:
    """Keep what words about the image look at, and clusters of some of the rest."""

    signals = frozenset({VisionSignal.MODEL_ATTENTION})
    reads_text = False
    kinds = ANY_KIND
    truncates = False

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers(3, 3)] | None = Field(
            None, description="before which layers tokens are dropped; at 3, 7 and 16/32 of the depth if unset"
        )
        recycle: float = Field(
            0.3, ge=0, le=1, allow_inf_nan=False, description="part of the dropped tokens that is clustered and merged"
        )
        cluster: int = Field(10, ge=1, le=1024, description="tokens to a cluster")

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth(PAPER, depth, params.layers)

    def raters(self, image: Tensor, text: Tensor, params: Params) -> Tensor:
        return relevant(image, text)

    def choose(self, view: LayerView, params: Params) -> Choice:
        import torch

        scores, there = view.attention.mean(0), len(view.tokens)
        left = min(left_after(view, SHARES[view.choice]), there)
        selected, pool, clusters = _shares(there, left, params)
        by_score = scores.sort(descending=True, stable=True).indices
        recycled = by_score[selected : selected + pool].sort().values
        if not clusters:
            return Choice(top(scores, left))
        centres, merged = density_peaks(view.hidden[recycled], clusters, clusters)
        rows = torch.cat((by_score[:selected], recycled[centres]))
        hidden = torch.cat((view.hidden[by_score[:selected]], merged))
        order = rows.sort().indices
        return Choice(rows[order], hidden[order])


def _shares(there: int, left: int, params: SparseVLM.Params) -> tuple[int, int, int]:
    """Tokens that are selected, those that are clustered, and clusters: as many selected as there is room for beside
    the clusters of what they leave."""
    clusters = 0
    while True:
        pool = int((there - left + clusters) * params.recycle)
        wanted = min(-(-pool // params.cluster), left - 1)
        if wanted <= clusters:
            return left - clusters, pool if clusters else 0, clusters
        clusters += 1
