"""DUET-VLM: an image is condensed by the vision tower, then thinned out between layers by what the words look at
(AMD, 2026, github.com/AMD-AGI/DUET-VLM).

    dominant     tokens that the tower's class token attends to most in the last layer that is run
    contextual   of the rest, the `width` times as many with the most attention: every `width`-th of them is an anchor,
                 merged with those whose tower keys are most like its own (VisionZip, among the top only)
    score(token) = mean over salient words and heads of softmax(q.k) in the layer below

`keep` tokens, dominant and contextual, are read by the first layers; before layers 16 and 24 of 32 half of them are
dropped, those with the lowest scores. (The reference condenses 576 tokens to 170 + 35.)

Where we depart: the reference finds salient words with a part-of-speech tagger, of which it keeps nouns, verbs,
adjectives, adverbs and question words; here they are those whose embeddings the image's tokens are most like, as in
SparseVLM. It ranks with the projections of the layer above; here attention is that of the layer below. It adds the mean
of what it merges to an anchor, which doubles its length; here what the language model reads is averaged, as in our
VisionZip. All crops are one set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView, View, kept
from winnow.engine.compression.vision.ranking import absorbed, top, unit
from winnow.engine.compression.vision.raters import relevant

if TYPE_CHECKING:
    from torch import Tensor


class DuetVLM:
    """Condense an image by what its tower attends to, then keep what salient words look at."""

    signals = frozenset(
        {VisionSignal.ATTENTION, VisionSignal.KEYS, VisionSignal.EMBEDDINGS, VisionSignal.MODEL_ATTENTION}
    )
    reads_text = False
    kinds = ANY_KIND
    truncates = False

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers(2, 2)] | None = Field(
            None, description="before which layers tokens are dropped; at 16 and 24/32 of the depth if unset"
        )
        contextual: float = Field(
            0.17, ge=0, lt=1, allow_inf_nan=False, description="part of `keep` that other tokens are merged into"
        )
        width: int = Field(4, ge=1, le=64, description="tokens from which an anchor is condensed, about")

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches = image.patches
        anchors = round(params.contextual * keep)
        by_attention = image.signals.attention(-1)[patches].sort(descending=True, stable=True).indices
        chosen, others = by_attention[: keep - anchors], by_attention[keep - anchors :]
        merged = image.embeddings[patches]
        if anchors:
            others = others[: params.width * anchors]
            targets = torch.arange(anchors) * (len(others) // anchors)
            keys = unit(image.signals.keys(-1)[patches[others]])
            merged[others[targets]] = absorbed(merged[others], keys, targets)
            chosen = torch.cat((chosen, others[targets]))
        return kept(image, patches[chosen], merged[chosen])

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth((16, 24), depth, params.layers)

    def raters(self, image: Tensor, text: Tensor, params: Params) -> Tensor:
        return relevant(image, text)

    def choose(self, view: LayerView, params: Params) -> Choice:
        return Choice(top(view.attention.mean(0), max(1, round(view.keep * 0.5 ** (view.choice + 1)))))
