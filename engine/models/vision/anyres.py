"""How LLaVA-NeXT and OneVision lay out an image of any size, counted in patches. Torch-free: the server uses it too.

The image is fitted, with padding, into a rectangle of crops that the tower sees one by one, behind a thumbnail of the
whole. Their patches are put together again, the padding is cut off, and where there are still too many the rectangle is
shrunk (OneVision). A newline stands behind each of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Size = tuple[int, int]
"""Rows, columns"""


@dataclass(frozen=True)
class Layout:
    crops: Size
    """Rows and columns of crops; the thumbnail, which comes before them, not counted"""
    padding: Size
    """Rows of patches above, and below, that are padding; columns at each side"""
    shown: Size
    """Rows and columns of tokens in the end"""

    @property
    def tokens(self) -> int:
        """Tokens of the rectangle, newlines included, without the thumbnail's."""
        return self.shown[0] * (self.shown[1] + 1)


def layout_of(image: Size, pinpoints: Sequence[Sequence[int]], tile: int, side: int, most: int | None) -> Layout:
    """
    Args
        image: height and width in pixels
        pinpoints: heights and widths that an image may be fitted into
        tile: pixels along an edge of a crop
        side: patches along it
        most: crops whose patches are as many tokens as an image may have, about; None: any number
    """
    height, width = _best(image, pinpoints)
    crops = height // tile, width // tile
    rows, columns = crops[0] * side, crops[1] * side
    # The quotients and roundings are the model's own: another order of operations gives other counts of tokens.
    top = left = 0
    if image[1] / image[0] > columns / rows:
        top = (rows - int(round(image[0] * (columns / image[1]), 7))) // 2
    else:
        left = (columns - int(round(image[1] * (rows / image[0]), 7))) // 2
    rows, columns = rows - 2 * top, columns - 2 * left
    if most is not None and (ratio := math.sqrt(rows * columns / (most * side**2))) > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return Layout(crops, (top, left), (rows, columns))


def layout_for(config: Any, image: Size) -> Layout:
    """That of an image under a LLaVA model's config."""
    vision = config.vision_config
    aspect = getattr(config, "vision_aspect_ratio", None)
    most = int(aspect.removeprefix("anyres_max_")) if aspect else None
    side = vision.image_size // vision.patch_size
    return layout_of(image, config.image_grid_pinpoints, vision.image_size, side, most)


def _best(image: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
    """The size that wastes least of what the image has to show: most pixels of it, then least padding."""

    def merit(size: Sequence[int]) -> tuple[int, int]:
        scale = min(size[1] / image[1], size[0] / image[0])
        scaled = int(image[0] * scale) * int(image[1] * scale)
        useful = min(scaled, image[0] * image[1])
        return useful, useful - size[0] * size[1]

    height, width = max(pinpoints, key=merit)
    return height, width
