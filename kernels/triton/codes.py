"""Whole quantized pages as matrix products take them: codes as float16 numbers, exact, and scales apart from them.

A page is read in one part, or, in int4, in two halves that share their bytes: token t and token t + C/2 in a key row,
channel d and d + D/2 in a value row. Codes of the integer formats are centred, so that number = (code - centre) * scale
+ (zero + centre * scale); those of fp8 are the numbers without their scale.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import cuda_capability_geq

from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.tiles import (
    FP8,
    INT4,
    INT8,
    f16_part,
    key_scale_offset,
    key_zero_offset,
    value_scale_offset,
    value_zero_offset,
    values_offset,
)

_IS_COMPILED = tl.constexpr(not knobs.runtime.interpret)


@triton.constexpr_function
def halves(fmt: int) -> int:
    """Parts of a page whose numbers share bytes."""
    return 2 if fmt == PageFormat.INT4 else 1


@triton.constexpr_function
def centre(fmt: int) -> int:
    """The code that becomes zero."""
    return {PageFormat.INT8: 128, PageFormat.INT4: 8}.get(PageFormat(fmt), 0)


@triton.jit
def key_bytes(
    page: tl.tensor, d: tl.tensor, n: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """[d, n] uint8: of a page's keys; what lies behind a row's end where n does."""
    return tl.load(page + (d[:, None] * (C // halves(FORMAT)) + n[None, :]), mask=(d < D)[:, None], other=0)


@triton.jit
def value_bytes(
    page: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
) -> tl.tensor:
    """[n, d] uint8: of the values of tokens `first` + n; zero behind the part's last token and the last channel."""
    WIDTH: tl.constexpr = D // halves(FORMAT)
    inside = (n < C // halves(FORMAT))[:, None] & (d < WIDTH)[None, :]
    return tl.load(
        page + values_offset(FORMAT, D, C) + ((first + n)[:, None] * WIDTH + d[None, :]), mask=inside, other=0
    )


@triton.jit
def key_scales(
    page: tl.tensor, d: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and zero of the keys' channels d, f16; of fp8 the one scale."""
    if FORMAT == FP8:
        scale = tl.load(f16_part(page, key_scale_offset(FORMAT, D, C)))
        zero = scale
    else:
        scale = tl.load(f16_part(page, key_scale_offset(FORMAT, D, C)) + d, mask=d < D, other=0.0)
        zero = tl.load(f16_part(page, key_zero_offset(FORMAT, D, C)) + d, mask=d < D, other=0.0)
    return scale, zero


@triton.jit
def value_scales(
    page: tl.tensor, first: tl.tensor, n: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scale and zero of the values of tokens `first` + n, f16, zero behind the part's last; of fp8 the one scale."""
    if FORMAT == FP8:
        scale = tl.load(f16_part(page, value_scale_offset(FORMAT, D, C)))
        zero = scale
    else:
        inside = n < C // halves(FORMAT)
        scale = tl.load(f16_part(page, value_scale_offset(FORMAT, D, C)) + first + n, mask=inside, other=0.0)
        zero = tl.load(f16_part(page, value_zero_offset(FORMAT, D, C)) + first + n, mask=inside, other=0.0)
    return scale, zero


@triton.jit
def numbers(packed: tl.tensor, FORMAT: tl.constexpr, IS_CHUNK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Two blocks of the numbers of bytes, f16, centred: of int4 the low and the high halves, else both the same.

    Conversions that are not said to be pure the compiler leaves where they are, on whole vectors of bytes, instead of
    reading bytes one by one in the order of the matrix product's operands. Beside the asynchronous products that
    Blackwell has for chunks it must be free to move them.
    """
    IS_PURE: tl.constexpr = IS_CHUNK and cuda_capability_geq(10)
    if FORMAT == INT4:
        low, high = _nibbles(packed, IS_PURE)
    else:
        low = _centred_bytes(packed, IS_PURE) if FORMAT == INT8 else _fp8_numbers(packed, IS_PURE)
        high = low
    return low, high


@triton.jit
def _fp8_numbers(packed: tl.tensor, IS_PURE: tl.constexpr) -> tl.tensor:
    if _IS_COMPILED:
        found = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            mov.b32 {low, high}, $2;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }""",
            "=r,=r,r",
            [packed],
            dtype=tl.float16,
            is_pure=IS_PURE,
            pack=4,
        )
    else:
        found = packed.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return found


@triton.jit
def _centred_bytes(packed: tl.tensor, IS_PURE: tl.constexpr) -> tl.tensor:
    # As the low bits of a float16 from 1024 on, where numbers are 1 apart.
    if _IS_COMPILED:
        found = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, middle;
            mov.b32 middle, 0x64806480;
            prmt.b32 low, $2, 0x64646464, 0x4140;
            prmt.b32 high, $2, 0x64646464, 0x4342;
            sub.f16x2 $0, low, middle;
            sub.f16x2 $1, high, middle;
            }""",
            "=r,=r,r",
            [packed],
            dtype=tl.float16,
            is_pure=IS_PURE,
            pack=4,
        )
    else:
        found = (packed.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    return found


@triton.jit
def _nibbles(packed: tl.tensor, IS_PURE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Two blocks, f16, centred: of the low and the high halves of bytes."""
    # Low nibbles as above; high ones are 16 apart there.
    if _IS_COMPILED:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 one, two, a, b, middle, part, less;
            mov.b32 middle, 0x64086408;
            mov.b32 part, 0x2C002C00;
            mov.b32 less, 0xD480D480;
            prmt.b32 one, $4, 0x64646464, 0x4140;
            prmt.b32 two, $4, 0x64646464, 0x4342;
            and.b32 a, one, 0xFF0FFF0F;
            and.b32 b, two, 0xFF0FFF0F;
            sub.f16x2 $0, a, middle;
            sub.f16x2 $1, b, middle;
            and.b32 a, one, 0xFFF0FFF0;
            and.b32 b, two, 0xFFF0FFF0;
            fma.rn.f16x2 $2, a, part, less;
            fma.rn.f16x2 $3, b, part, less;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=IS_PURE,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        high = ((packed >> 4).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    return low, high
