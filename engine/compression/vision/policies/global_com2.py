"""GlobalCom²: the thumbnail commands how much of each crop stays (Liu et al., 2025, arXiv:2501.05179).

    s(crop)      = sum of (log attention - its mean), over the thumbnail's tokens of that part of the image
    ratio(crop)  = R * (1 + softmax over crops(s / temperature) - its mean),  R = keep / patches
    score(token) = attention in its crop + the thumbnail's attention interpolated to it, each scaled to length one

Attention is the class token's. The thumbnail keeps R of its tokens by attention. An image of one crop is its own
thumbnail.

Where we depart: the reference sums what attention is before the softmax, which here is taken from its logarithm. It
rounds each share down, here they make up `keep`. Marks go with the last token of the row that they end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, VisionSignal
from winnow.engine.compression.vision.policy import Kind, View, kept
from winnow.engine.compression.vision.ranking import crops, share, top
from winnow.engine.errors import PlanNotSupported

if TYPE_CHECKING:
    from torch import Tensor


class GlobalCom2:
    """Let the thumbnail say how much of each crop stays, and keep what the class tokens of both look at."""

    signals = frozenset({VisionSignal.ATTENTION})
    reads_text = False
    kinds = frozenset[Kind]({"image"})

    class Params(PolicyParams):
        temperature: float = Field(
            10.0, gt=0, le=1000, allow_inf_nan=False, description="the larger, the more alike the crops' ratios"
        )

    def view(self, image: Features, keep: int, text: Tensor, seed: int, params: Params) -> View:
        import torch

        patches, places = image.patches, image.grid
        attention = image.signals.attention(-1)[patches]
        thumbnail, *members = crops(image)
        if not members:
            return kept(image, patches[top(attention, keep)])
        rows, columns = _layout(image)
        height, width = (places[thumbnail, 1:].amax(0) + 1).tolist()
        seen = attention[thumbnail].view(height, width)
        sums = _sums(seen.clamp(min=1e-12).log(), rows, columns)
        softmax = (sums / params.temperature).softmax(0)
        at = torch.cat(members)
        crop = places[at, 0] - 1
        ratios = [1.0, *(1 + softmax - softmax.mean())[crop.unique()].tolist()]
        sizes = [len(thumbnail), *map(len, members)]
        parts = share(keep, [ratio * size for ratio, size in zip(ratios, sizes, strict=True)], sizes)
        across = torch.stack((crop // columns * height, crop % columns * width), 1) + places[at, 1:]
        from_thumbnail = _interpolated(seen, across)
        chosen = [thumbnail[top(attention[thumbnail], parts[0])]]
        for crop_patches, looked_at, part in zip(
            members, from_thumbnail.split([len(one) for one in members]), parts[1:], strict=True
        ):
            own = attention[crop_patches]
            scores = own / own.norm().clamp(min=1e-12) + looked_at / looked_at.norm().clamp(min=1e-12)
            chosen.append(crop_patches[top(scores, part)])
        return kept(image, patches[torch.cat(chosen)])


def _layout(image: Features) -> tuple[int, int]:
    """Rows and columns of crops."""
    if image.crop_grid is None:
        path = "compression.vision.policy"
        raise PlanNotSupported(path, f"{path}: 'global_com2' needs crops that lie in a grid, and a thumbnail")
    return image.crop_grid


def _sums(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows * columns] sums of (x - mean) [h, w] over parts of one size, the last with what is left over."""
    import torch

    height, width = x.shape
    row = (torch.arange(height) // max(height // rows, 1)).clamp(max=rows - 1)
    column = (torch.arange(width) // max(width // columns, 1)).clamp(max=columns - 1)
    part = (row[:, None] * columns + column).flatten()
    return x.new_zeros(rows * columns).index_add_(0, part, (x - x.mean()).flatten())


def _interpolated(x: Tensor, across: Tensor) -> Tensor:
    """[n] what x [h, w] is, by bilinear interpolation, at places (row, column) of the grid of all crops."""
    from torch.nn.functional import interpolate

    first = across.amin(0)
    size = (across.amax(0) - first + 1).tolist()
    larger = interpolate(x[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    row, column = (across - first).unbind(1)
    return larger[row, column]
