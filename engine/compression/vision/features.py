"""An image as the vision tower saw it: what vision policies are shown. Torch is needed by its callers only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class VisionSignal(StrEnum):
    """What a policy goes by beside the places of tokens."""

    EMBEDDINGS = "embeddings"
    """`Features.embeddings`"""
    ATTENTION = "tower attention"
    """`Signals.attention`"""
    KEYS = "tower keys"
    """`Signals.keys`"""
    HIDDEN = "tower states"
    """`Signals.hidden`"""
    MODEL_ATTENTION = "model attention"
    """What rows of the language model attend to"""


class Signals(Protocol):
    """Of the vision tower, laid out like `Features.embeddings`: zeros for tokens that stand for no patch.

    `layer` counts from the end: -1 is the last layer of the tower that is run, -2 the one before. Where a token stands
    for several patches (2x2 merger, pixel shuffle, pooled crops) it has their mean. Computed when asked for.
    """

    @property
    def layers(self) -> int:
        """How many are run"""

    @property
    def nbytes(self) -> int:
        """Bytes that are held for it"""

    def attention(self, layer: int) -> Tensor:
        """[N] float32: what the class token pays to each patch, mean over heads; in towers without one the attention
        matrix's column means, so that the patches of a crop sum to one (with a class token: to at most one)."""

    def keys(self, layer: int) -> Tensor:
        """[N, heads * dim] float32: the layer's keys, heads side by side."""

    def hidden(self, layer: int) -> Tensor:
        """[N, width] float32: what the layer puts out."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """One image (or video), laid out as the N placeholders that stand for it in the prompt."""

    embeddings: Tensor
    """[N, hidden] float32: what the language model reads"""
    places: Tensor
    """[N, 3] int64: crop or frame (where there are several crops, 0 is the thumbnail of the whole image), row and
    column of the token in its grid; (-1, -1, -1) for a mark, which stands for no patch (newline, separator)"""
    signals: Signals
    crop_grid: tuple[int, int] | None = None
    """Rows and columns in which the crops 1, 2, ... lie, row by row, over the image that crop 0 is a thumbnail of; None
    where there is no such thing"""

    @cached_property
    def patches(self) -> Tensor:
        """[P] int64, ascending: the tokens that stand for patches."""
        return (self.places[:, 0] >= 0).nonzero().squeeze(1)

    @property
    def grid(self) -> Tensor:
        """[P, 3] int64: the places of these."""
        return self.places[self.patches]
