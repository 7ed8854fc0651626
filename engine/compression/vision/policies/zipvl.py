"""ZipVL: as many tokens of an image as attention needs (He et al., 2024, arXiv:2410.08584).

    probes       the newest `probes` tokens of the image's turn, behind it
    mass(token)  = mean over probes and heads of softmax(q.k) in the layer below
    left         = size of the smallest set of the image's tokens that has `tau` of their mass, at most `keep`

How much is left follows from the image and the layer: where attention is spread out more tokens stay. Chosen before
layers 2, 8, 16 and 24 of 32. The paper's other half, tokens held at many bits or few by the same measure, is `kv.mix`
with the policy of the same name: {"vision": {"policy": "zipvl", "keep": 0.5}, "kv": {"mix": {"policy": "zipvl"}}}.

Where we depart: the paper chooses anew in every layer, among all tokens; those that a layer's attention passes over go
on to the next. Here, once dropped, a token is gone from the layers above, and with it its memory. The paper's probes
are 64 of the newest tokens and 64 at random; here they are of the image's turn, so that later turns leave the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView
from winnow.engine.compression.vision.ranking import top
from winnow.engine.compression.vision.raters import every

if TYPE_CHECKING:
    from torch import Tensor


class ZipVL:
    """Keep the tokens that make up most of the attention to the image, at most `keep`."""

    signals = frozenset({VisionSignal.MODEL_ATTENTION})
    reads_text = False
    kinds = ANY_KIND
    truncates = False

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers()] | None = Field(
            None, description="before which layers tokens are dropped; at 2, 8, 16 and 24/32 of the depth if unset"
        )
        tau: float = Field(
            0.975, gt=0, le=1, allow_inf_nan=False, description="share of the attention to the image that stays"
        )
        probes: int = Field(64, ge=1, le=1024, description="newest tokens of the image's turn that vote")

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth((2, 8, 16, 24), depth, params.layers)

    def raters(self, image: Tensor, text: Tensor, params: Params) -> Tensor:
        chosen = every(text)
        chosen[: -params.probes] = False
        return chosen

    def choose(self, view: LayerView, params: Params) -> Choice:
        mass = view.attention.double().mean(0)
        reached = mass.sort(descending=True).values.cumsum(0)
        needed = int((reached < params.tau * reached[-1]).sum()) + 1
        return Choice(top(mass, min(needed, view.keep)))
