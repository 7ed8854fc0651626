"""GEAR: four-bit codes, outliers beside them, and the rest of the error at low rank (Kang et al., 2024,
arXiv:2403.05527)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gear:
    """Each side of a page is R rows of N numbers: keys by channel, R = D and N = C; values by token, R = C and N = D.

    codes      [R, N/2]    as those of int4: column n in the low bits of a byte, n + N/2 in the high ones
    scale      [R]         float16
    zero       [R]         float16
    outliers   [R, 2k]     float16, the k least numbers of the row and the k greatest, ascending
    tokens     [C, rank]   float16  } the error of what is not an outlier is about their product
    channels   [D, rank]   float16  }
    places     [R, 2k]     the outliers' columns: a byte each, two in rows of more than 256
    """

    rank: int = 2

    def outliers(self, columns: int) -> int:
        """k: about one in a hundred, at least one."""
        return max(1, (columns + 50) // 100)

    def _parts(self, rows: int, columns: int, dim: int, tokens: int) -> tuple[int, ...]:
        apart = 2 * self.outliers(columns)
        codes, scales, factor = rows * columns // 2, 2 * rows, 2 * self.rank
        places = rows * apart * (1 if columns <= 256 else 2)
        return codes, scales, scales, 2 * rows * apart, factor * tokens, factor * dim, places

    def key_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return self._parts(dim, tokens, dim, tokens)

    def value_parts(self, dim: int, tokens: int) -> tuple[int, ...]:
        return self._parts(tokens, dim, dim, tokens)
