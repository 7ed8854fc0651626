"""Positions with three axes: time, row and column (M-RoPE, Qwen2-VL, arXiv:2409.12191).

Text advances on all axes at once. An image begins where the text before it ends, and spans as many rows and columns as
its grid of tokens does; what follows begins behind the larger of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from winnow.engine.errors import RequestError
from winnow.engine.pages import Ints


@dataclass(frozen=True)
class Grid:
    """The tokens of an image or video."""

    frames: int
    rows: int
    columns: int
    interval: float = 1.0
    """Positions from a frame to the next, of which the whole part counts"""

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.columns


def positions(tokens: Ints, sees: Mapping[str, int], grids: Sequence[Grid]) -> Ints:
    """
    Args
        tokens: a whole prompt
        sees: ids of its placeholders (`EngineInfo.sees`)
        grids: of the pictures that it has placeholders for, in order

    Returns
        [3, n]: time, row and column of each token; what is generated goes on, on all axes, behind the largest.

    Raises
        RequestError: placeholders and grids do not fit together
    """
    is_seen = np.isin(tokens, list(sees.values()))
    out = np.empty((3, len(tokens)), np.int32)
    place = position = 0
    for grid in grids:
        following = is_seen[place:]
        text = int(following.argmax()) if following.any() else len(following)
        out[:, place : place + text] = position + np.arange(text)
        place, position = place + text, position + text
        here = slice(place, place + grid.tokens)
        if place + grid.tokens > len(tokens) or not is_seen[here].all():
            raise RequestError("pictures", f"pictures: the prompt has other than {grid.tokens} placeholders for one")
        time = (np.arange(grid.frames, dtype=np.float32) * np.float32(grid.interval)).astype(np.int32)
        axes = np.meshgrid(time, np.arange(grid.rows), np.arange(grid.columns), indexing="ij")
        out[:, here] = position + np.stack(axes).reshape(3, -1)
        place, position = here.stop, position + max(grid.rows, grid.columns)
    if is_seen[place:].any():
        raise RequestError("pictures", "pictures: the prompt has placeholders that no picture goes with")
    out[:, place:] = position + np.arange(len(tokens) - place)
    return out
