"""FastV: after two layers most of an image is not looked at any more (Chen et al., 2024, arXiv:2403.06764).

    score(token) = mean over heads of softmax(q.k),  q of the last token of the image's turn, in the layer below

The `keep` tokens with the highest scores stay; the layers above are not run over the others. Like the paper, which
drops half of them, it chooses once, before layer 2 of 32; unset, ours is at the same depth.

Where we depart: the paper's query is the prompt's last token. Here it is that of the turn in which the image came, so
that in later turns the same tokens stay. Where one turn follows the other in time, it is the same row but for the few
tokens with which a template opens the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView
from winnow.engine.compression.vision.ranking import top
from winnow.engine.compression.vision.raters import last

if TYPE_CHECKING:
    from torch import Tensor


class FastV:
    """Before an early layer keep what the end of the question looks at."""

    signals = frozenset({VisionSignal.MODEL_ATTENTION})
    reads_text = False
    kinds = ANY_KIND
    truncates = False

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers(1, 1)] | None = Field(
            None, description="before which layers tokens are dropped; at 2/32 of the depth if unset"
        )

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth([2], depth, params.layers)

    def raters(self, image: Tensor, text: Tensor, params: Params) -> Tensor:
        return last(text)

    def choose(self, view: LayerView, params: Params) -> Choice:
        return Choice(top(view.attention.mean(0), view.keep))
