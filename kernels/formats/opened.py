"""What the layout must know of a format whose pages are opened.

Kernels read the pages of most formats as they lie. Those of the others they open first: keys [D, C] and values [C, D]
in f32, in memory of their own, once for all the rows that read them together. So such a format may hold its tokens in
any way. It is

    a value of `PageFormat`, with its sentence in WHAT and its sizes in OPENED        kernels/formats/__init__.py
    seal and open in torch, which say what it means                                   kernels/reference/formats/
    the same bytes and numbers in C++                                                 kernels/cpu/formats/
"""

from __future__ import annotations

from typing import Protocol


class Opened(Protocol):
    """Sizes of one format. Parts lie one after the other in a page, those of keys first."""

    def key_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        """Bytes of each part of the keys of a full page of `tokens` tokens with `dim` channels."""

    def value_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        """Likewise of the values."""
