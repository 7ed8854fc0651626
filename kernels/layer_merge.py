"""Which layers' lanes share pages, and how the tokens in them are merged: `PageFormat.MINI_CACHE`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerMerge:
    """The layers from `first` on are merged in pairs; one that is left over in the end stays by itself."""

    first: int
    """The lowest layer of the lowest pair"""
    t: float
    """How far a shared direction lies from the lower layer's, on the way to the upper one's: from 0 to 1"""

    def lower_layers(self, layers: int) -> range:
        """The lower layer of each pair of a model of so many layers; the upper one is the next."""
        return range(self.first, layers - 1, 2)
