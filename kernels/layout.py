"""Page formats and byte layout: the one place that says where a token's bytes lie.

A page is a fixed number of bytes that holds tokens of one lane (one sequence, one layer, one KV head)
in one format. Inside a page, for head dimension D and capacity C tokens of the page's format:

    keys     [D, C]    channel-major, so that q.K is a row-by-row multiply-add over channels and a channel's
                       quantization scale applies to one contiguous row
    values   [C, D]    token-major, so that p.V is a row-by-row multiply-add over tokens
    int8, int4 add, all float16:                                           (KIVI, arXiv:2402.02750)
    k_scale  [D], k_zero [D]     one per channel, over the page's tokens
    v_scale  [C], v_zero [C]     one per token

A number is ``code * scale + zero`` with unsigned codes. Four-bit codes hold two numbers a byte: in a key row, token t
(low nibble) and token t + C/2 (high); in a value row, channel d (low) and d + D/2 (high).

With four levels a channel's spread over a whole page is too much for one scale. int2 therefore cuts both sides into
blocks, as KIVI does: G = 32 tokens of keys, H = 32 (or 16) channels of values, each block as above with its own scales:

    keys     [C/G, D, G]         k_scale, k_zero  [C/G, D]
    values   [D/H, C, H]         v_scale, v_zero  [D/H, C]

Two-bit codes lie four a byte in their order, the first in the lowest bits.

fp8 is e4m3 (four bits of exponent, three of fraction) with one scale a page and side, float16, and no zero: an exponent
of its own lets each number span what a page's channels and tokens span, so finer scales would buy nothing. Pages are
sealed whole, so their largest number is known and becomes 448: nothing is calibrated, nothing clipped.

The pages of other formats are opened before they are read; what lies in them says kernels/formats.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import ClassVar

from winnow.kernels.formats import PageFormat as PageFormat

VECTOR = 8
"""Capacities are multiples of this, so that a key row is whole vectors on every target."""

BLOCK = 32
"""Tokens, or channels where they divide so, of a block of int2"""


@dataclass(frozen=True)
class Offsets:
    """Byte offsets of the parts of a page of `tokens` tokens with `dim` channels; those of scales and zeros are
    meaningful for formats with codes, and a zero is empty where there is none."""

    fmt: PageFormat
    dim: int
    tokens: int
    keys: ClassVar[int] = 0

    @property
    def values(self) -> int:
        if self.fmt.is_opened:
            return sum(self.fmt.opened.key_parts(self.dim, self.tokens))
        return self.tokens * self.dim * self.fmt.bits // 8

    @property
    def k_scale(self) -> int:
        return 2 * self.values

    @property
    def k_zero(self) -> int:
        return self.k_scale + 2 * self._key_scales

    @property
    def v_scale(self) -> int:
        return self.k_zero + (2 * self._key_scales if self.fmt.is_integer else 0)

    @property
    def v_zero(self) -> int:
        return self.v_scale + 2 * self._value_scales

    @property
    def end(self) -> int:
        if self.fmt.is_opened:
            return self.parts[-1]
        return self.v_zero + (2 * self._value_scales if self.fmt.is_integer else 0)

    @property
    def parts(self) -> tuple[int, ...]:
        """Where each part of a page begins that is opened, and where the last one ends."""
        sizes, size = self.fmt.opened, (self.dim, self.tokens)
        return tuple(accumulate((*sizes.key_parts(*size), *sizes.value_parts(*size)), initial=0))

    @property
    def value_block(self) -> int:
        """Channels that share the scale of a token's value."""
        if self.fmt is not PageFormat.INT2:
            return self.dim
        return BLOCK if self.dim % BLOCK == 0 else BLOCK // 2

    @property
    def _key_scales(self) -> int:
        if not self.fmt.is_integer:
            return int(self.fmt is PageFormat.FP8)
        return self.dim * (self.tokens // BLOCK if self.fmt is PageFormat.INT2 else 1)

    @property
    def _value_scales(self) -> int:
        if not self.fmt.is_integer:
            return int(self.fmt is PageFormat.FP8)
        return self.tokens * (self.dim // self.value_block)


@dataclass(frozen=True)
class PageLayout:
    """Sizes of a model's pages.

    `page_tokens` is the capacity of a page in the compute format, the one new tokens are written in.
    """

    head_dim: int
    compute: PageFormat = PageFormat.F32
    page_tokens: int = 16

    def __post_init__(self) -> None:
        if self.head_dim % (2 * VECTOR) or not 16 <= self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of {2 * VECTOR} from 16 to 256, not {self.head_dim}")
        if self.page_tokens % (2 * VECTOR) or not 2 * VECTOR <= self.page_tokens <= 256:
            raise ValueError(f"page_tokens must be a multiple of {2 * VECTOR} up to 256, not {self.page_tokens}")
        if self.compute.is_quantized:
            raise ValueError("the compute format must be a float format")

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes(self.compute)

    def token_bytes(self, fmt: PageFormat) -> int:
        """Bytes that one more token costs in a page: its key, its value and its own scales; rounded up, its share of
        a page that is opened."""
        if fmt.is_opened:
            return -(-self.offsets(fmt).end // self.capacity(fmt))
        codes = 2 * self.head_dim * fmt.bits // 8
        if fmt is PageFormat.INT2:
            return codes + 4 * self.head_dim // BLOCK + 4 * self.head_dim // self.value_block(fmt)
        return codes + 4 if fmt.is_integer else codes

    def key_block(self, fmt: PageFormat) -> int:
        """Tokens of a page that share the scale of a key channel."""
        return BLOCK if fmt is PageFormat.INT2 else self.capacity(fmt)

    def value_block(self, fmt: PageFormat) -> int:
        """Channels that share the scale of a token's value."""
        return Offsets(fmt, self.head_dim, BLOCK).value_block

    @cache  # noqa: B019 - layouts are few and live as long as the process
    def capacity(self, fmt: PageFormat) -> int:
        """Tokens that fit a page of this format."""
        if fmt.is_opened:
            most = range(0, 4 * self.page_bytes // self.head_dim, VECTOR)  # each number takes a bit or more
            fits = bisect_right(most, self.page_bytes, key=lambda tokens: Offsets(fmt, self.head_dim, tokens).end)
            return most[fits - 1]
        per_page = {PageFormat.INT8: 4 * self.head_dim, PageFormat.INT4: 4 * self.head_dim, PageFormat.FP8: 4}
        # Four-bit key rows split into halves of whole vectors.
        multiple = {PageFormat.INT4: 2 * VECTOR, PageFormat.INT2: BLOCK}.get(fmt, VECTOR)
        fit = (self.page_bytes - per_page.get(fmt, 0)) // self.token_bytes(fmt)
        return fit // multiple * multiple

    @cache  # noqa: B019
    def offsets(self, fmt: PageFormat) -> Offsets:
        return Offsets(fmt, self.head_dim, self.capacity(fmt))

    def pages(self, tokens: int, fmt: PageFormat | None = None) -> int:
        """Pages that hold `tokens` tokens of one lane."""
        return -(-tokens // self.capacity(self.compute if fmt is None else fmt))
