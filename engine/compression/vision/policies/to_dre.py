"""ToDRE: keep a diverse few, which answer for all (Li et al., 2025, arXiv:2505.18757).

    next(token) = cosine distance to the nearest of those chosen so far, each time the largest (greedy k-center)

of what the language model reads. All crops are one set. Ours begins with the token that points away from the mean of
all most. A late layer then drops all tokens of the image: by then text has taken from them what it will.

Where we depart: the paper finds that layer anew for each prompt, where attention to the image has faded; here it is at
24/32 of the depth unless the caller names another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView, View, kept
from winnow.engine.compression.vision.ranking import Likeness, spread, unit

if TYPE_CHECKING:
    from torch import Tensor


class ToDRE:
    """Keep tokens so that every other one is like one of them."""

    signals = frozenset({VisionSignal.EMBEDDINGS})
    reads_text = False
    kinds = ANY_KIND

    truncates = False

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers(1, 1)] | None = Field(
            None, description="before which layer all tokens of the image are dropped; at 24/32 of the depth if unset"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        patches = image.patches
        units = unit(image.embeddings[patches])
        first = (units @ units.mean(0)).argmin(keepdim=True)
        return kept(image, patches[spread(Likeness(units, keep), first, keep - 1)])

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth([24], depth, params.layers)

    def choose(self, view: LayerView, params: Params) -> Choice:
        return Choice(view.tokens[:0])
