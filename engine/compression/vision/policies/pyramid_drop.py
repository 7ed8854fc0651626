"""PyramidDrop: fewer and fewer tokens of an image the deeper the layer (Xing et al., 2024, arXiv:2410.17247).

    score(token) = mean over heads of softmax(q.k),  q of the last token of the image's turn, in the layer below
    left(s)      = patches * (keep / patches) ^ (s / S),  after choice s = 1 ... S

Each of the S choices keeps the same share of what the one before has left; `keep` is what the last one leaves. The
paper halves three times, before layers 8, 16 and 24 of 32: that is a `keep` of 0.125.

Where we depart: the paper projects queries and keys with the weights of the layer above, for ranking alone; here they
are those that the layer below has attended with. The query is the last token of the turn in which the image came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth, left_after
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView
from winnow.engine.compression.vision.ranking import top
from winnow.engine.compression.vision.raters import last

if TYPE_CHECKING:
    from torch import Tensor

PAPER = (8, 16, 24)


class PyramidDrop:
    """Stage by stage keep less of what the end of the question looks at."""

    signals = frozenset({VisionSignal.MODEL_ATTENTION})
    reads_text = False
    kinds = ANY_KIND
    truncates = False

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers()] | None = Field(
            None,
            description="before which layers tokens are dropped; at 8, 16 and 24/32 of the depth if unset",
        )

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth(PAPER, depth, params.layers)

    def raters(self, image: Tensor, text: Tensor, params: Params) -> Tensor:
        return last(text)

    def choose(self, view: LayerView, params: Params) -> Choice:
        left = left_after(view, (view.choice + 1) / len(params.layers or PAPER))
        return Choice(top(view.attention.mean(0), left))
