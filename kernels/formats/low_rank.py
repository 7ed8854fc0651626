"""Keys and values by their leading coordinates in a basis of their lane (`PagedKV.bases`).

MatryoshkaKV (Lin et al., 2024, arXiv:2410.14731) has bases of keys after RoPE, CSKV (Wang et al., 2024,
arXiv:2409.10593) of keys before it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LowRank:
    """A page holds, for C tokens of D channels of which r coordinates are left:

    keys       [r, C]      float16
    values     [C, r]      float16
    """

    before_rope: bool
    """Whether keys are held as they are before RoPE, so that opening them takes their positions"""

    def rank(self, dim: int) -> int:
        """Half of the channels: as head dimensions are multiples of 16, whole vectors."""
        return dim // 2

    def key_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return (2 * tokens * self.rank(dim),)

    value_parts = key_parts
