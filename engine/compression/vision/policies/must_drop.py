"""MustDrop: tokens are dropped before the language model, within it, and after the prompt (Liu et al., 2024,
arXiv:2411.10803).

    windows      of `window` x `window` patches whose mean cosine in the tower's first layer is at least `similarity`
                 become one token, their mean, which stands where the last of them stood
    key tokens   `key_share` of what the tower's class token attends to most: they are never dropped within the model
    dual filter  within the model a token goes if both hold, over the tokens behind the image in its turn:
                   its part of all attention to the image is below `total`,  no token gives it `single` or more
    decoding     once the prompt is read, layers from the first choice on hold what the last one has left

The filter is applied after layers 2, 6, 10 and 14 of 32. How much it leaves follows from its thresholds; `keep` is the
most, to which the shares fall evenly: what is above goes too, the least attended first, key tokens last.

Where we depart: windows are merged behind the projector, whereas the reference merges them within the tower's first
layer, so that the tower is spared them too. A window at the edge of the grid may be smaller.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.depths import Layers, at_depth, left_after
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import ANY_KIND, Choice, LayerView, View, kept
from winnow.engine.compression.vision.ranking import means, top, unit
from winnow.engine.compression.vision.raters import every

if TYPE_CHECKING:
    from torch import Tensor

PAPER = (3, 7, 11, 15)


class MustDrop:
    """Merge alike windows, drop between layers what no word looks at, and forget it in decoding."""

    signals = frozenset(
        {VisionSignal.HIDDEN, VisionSignal.ATTENTION, VisionSignal.EMBEDDINGS, VisionSignal.MODEL_ATTENTION}
    )
    reads_text = False
    kinds = ANY_KIND
    truncates = True

    class Params(PolicyParams):
        layers: Annotated[list[int], Layers()] | None = Field(
            None, description="before which layers tokens are dropped; at 3, 7, 11 and 15/32 of the depth if unset"
        )
        window: int = Field(3, ge=1, le=64, description="side of the windows of patches that may be merged")
        similarity: float = Field(
            0.8, ge=-1, le=1, allow_inf_nan=False, description="mean cosine from which a window is merged"
        )
        key_share: float = Field(
            0.08, ge=0, le=1, allow_inf_nan=False, description="part of the tokens that no layer drops"
        )
        total: float = Field(
            0.001,
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="part of all attention to the image below which it may go",
        )
        single: float = Field(
            0.001, ge=0, le=1, allow_inf_nan=False, description="attention of one token below which it may go"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches, group = image.patches, _windows(image, params)
        count = int(group.max()) + 1
        order = torch.arange(len(group))
        latest = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, group, order, "amax", include_self=False)
        view = kept(image, patches[latest], means(image.embeddings[patches], group, count))
        attention = means(image.signals.attention(-1)[patches][:, None], group, count)[:, 0]
        # In the order of their places, where equals are told apart.
        by_place = latest.sort().indices
        keys = top(attention[by_place], ceil(params.key_share * count))
        is_key = torch.zeros(len(view.tokens), dtype=torch.bool)
        is_key[torch.searchsorted(view.tokens, patches[latest[by_place[keys]]])] = True
        return replace(view, is_key=is_key)

    def layers(self, params: Params, depth: int) -> list[int]:
        return at_depth(PAPER, depth, params.layers)

    def raters(self, image: Tensor, text: Tensor, params: Params) -> Tensor:
        return every(text)

    def choose(self, view: LayerView, params: Params) -> Choice:
        most = left_after(view, (view.choice + 1) / len(params.layers or PAPER))
        given = view.attention.double().sum(0)
        is_seen = (given >= params.total * given.sum()) | (view.attention.amax(0) >= params.single)
        stays = is_seen | view.is_key
        # Nothing is given more than there are raters: key tokens come first, and what may go comes last.
        rank = given + 2.0 * len(view.attention) * (view.is_key.double() - (~stays).double())
        return Choice(top(rank, max(1, min(most, int(stays.sum())))))


def _windows(image: Features, params: MustDrop.Params) -> Tensor:
    """[P] int64: which of the tokens that are left each patch becomes part of."""
    import torch

    crop, row, column = image.grid.unbind(1)
    place = torch.stack((crop, row // params.window, column // params.window), 1)
    window = place.unique(dim=0, return_inverse=True)[1]
    x = unit(image.signals.hidden(-image.signals.layers)[image.patches].double())
    size = window.bincount().double()
    sums = torch.zeros(len(size), x.shape[1], dtype=torch.float64).index_add_(0, window, x)
    # Of all pairs but those of a patch with itself: (|sum|^2 - sum of |x|^2) / n (n - 1)
    own = torch.zeros(len(size), dtype=torch.float64).index_add_(0, window, (x * x).sum(1))
    mean = ((sums * sums).sum(1) - own) / (size * (size - 1)).clamp_min(1)
    is_merged = (mean >= params.similarity) & (size > 1)
    alone = len(size) + torch.arange(len(window))
    return window.where(is_merged[window], alone).unique(return_inverse=True)[1]
