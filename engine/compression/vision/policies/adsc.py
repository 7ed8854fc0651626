"""ADSC: a stride instead of scores, between layers (Deniz et al., 2026, arXiv:2602.12618).

    left(s) = patches * (keep / patches) ^ (s / S),  after choice s = 1 ... S:  every n/left(s)-th of n

Uniform downsampling at some layers: what later layers lose, earlier ones are to have passed on by attention already.
No score is computed. Unset, it is done before layers 8, 16 and 24 of 32.

The paper tunes LoRA adapters under such bottlenecks, so that the model learns to pass things on; the method as it is
here is what it does to a model that has not been tuned, and the paper's results are not to be expected of it. A
checkpoint that was tuned so is served like any other.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth, left_after
from winnow.engine.compression.vision.features import VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView
from winnow.engine.compression.vision.ranking import evenly

PAPER = (8, 16, 24)


class ADSC:
    """Keep every so manieth token from some layers on, without scores; meant for models tuned for it."""

    signals: frozenset[VisionSignal] = frozenset()
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

    def choose(self, view: LayerView, params: Params) -> Choice:
        left = left_after(view, (view.choice + 1) / len(params.layers or PAPER))
        return Choice(evenly(len(view.tokens), min(left, len(view.tokens))).to(view.tokens.device))
