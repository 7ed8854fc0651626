"""Whole quantized pages as matrix products take them: float16 numbers, made of bytes that are read in whole vectors.

A page is read in one part, or, in int4, in two halves that share their bytes: token t and token t + C/2 in a key row,
channel d and d + D/2 in a value row.
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
    """The code that becomes zero before it is scaled, so that scales are rounded to no more than what they span."""
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
    """Scale of the keys' channels d and number of the centre, f16; zero from D on."""
    return _scales(page, d, d < D, key_scale_offset(FORMAT, D, C), key_zero_offset(FORMAT, D, C), FORMAT)


@triton.jit
def value_scales(
    page: tl.tensor, t: tl.tensor, inside: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scale of the values of tokens t and number of the centre, f16; zero where not `inside`."""
    return _scales(page, t, inside, value_scale_offset(FORMAT, D, C), value_zero_offset(FORMAT, D, C), FORMAT)


@triton.jit
def _scales(
    page: tl.tensor,
    i: tl.tensor,
    inside: tl.tensor,
    SCALES: tl.constexpr,
    ZEROS: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    if FORMAT == FP8:
        scale = tl.where(inside, tl.load(f16_part(page, SCALES)), 0.0)
        shift = scale
    else:
        scale = tl.load(f16_part(page, SCALES) + i, mask=inside, other=0.0)
        zero = tl.load(f16_part(page, ZEROS) + i, mask=inside, other=0.0)
        shift = (zero.to(tl.float32) + centre(FORMAT) * scale.to(tl.float32)).to(tl.float16)
    return scale, shift


@triton.jit
def numbers(
    packed: tl.tensor, scale: tl.tensor, shift: tl.tensor, FORMAT: tl.constexpr, IS_CHUNK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Two blocks of the numbers of bytes, f16: of int4 the low and the high halves, else both the same.

    scale and shift, f16, broadcast against `packed`; shift is the number of the format's centre, and not looked at for
    fp8.
    """
    # A conversion that is not said to be pure stays where it is, on whole vectors of bytes; the compiler would read
    # bytes one by one instead, in the order of the matrix product's operands. Beside the asynchronous products that
    # Blackwell has for chunks it must be free to move them.
    IS_PURE: tl.constexpr = IS_CHUNK and cuda_capability_geq(10)
    if _IS_COMPILED:
        scale = tl.broadcast_to(scale, packed.shape)
        if FORMAT == FP8:
            low = _compiled_fp8(packed, scale, IS_PURE)
            high = low
        else:
            shift = tl.broadcast_to(shift, packed.shape)
            if FORMAT == INT4:
                low, high = _compiled_int4(packed, scale, shift, IS_PURE)
            else:
                low = _compiled_int8(packed, scale, shift, IS_PURE)
                high = low
    elif FORMAT == FP8:
        low = packed.to(tl.float8e4nv, bitcast=True).to(tl.float16) * scale
        high = low
    elif FORMAT == INT4:
        low = ((packed & 15).to(tl.float16) - centre(FORMAT)) * scale + shift
        high = ((packed >> 4).to(tl.float16) - centre(FORMAT)) * scale + shift
    else:
        low = (packed.to(tl.float16) - centre(FORMAT)) * scale + shift
        high = low
    return low, high


# A byte becomes a number as the low bits of a float16 from 1024 on, where numbers are 1 apart: two of them in three
# instructions.


@triton.jit
def _compiled_int8(packed: tl.tensor, scale: tl.tensor, shift: tl.tensor, IS_PURE: tl.constexpr) -> tl.tensor:
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, middle;
        mov.b32 middle, 0x64806480;
        prmt.b32 low, $2, 0x64646464, 0x4140;
        prmt.b32 high, $2, 0x64646464, 0x4342;
        sub.f16x2 low, low, middle;
        sub.f16x2 high, high, middle;
        fma.rn.f16x2 $0, low, $3, $5;
        fma.rn.f16x2 $1, high, $4, $6;
        }""",
        "=&r,=&r,r,r,r,r,r",
        [packed, scale, shift],
        dtype=tl.float16,
        is_pure=IS_PURE,
        pack=4,
    )


@triton.jit
def _compiled_int4(
    packed: tl.tensor, scale: tl.tensor, shift: tl.tensor, IS_PURE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    # High nibbles are 16 apart there.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 one, two, a, b, middle, part, less;
        mov.b32 middle, 0x64086408;
        mov.b32 part, 0x2C002C00;
        mov.b32 less, 0xD480D480;
        prmt.b32 one, $4, 0x64646464, 0x4140;
        prmt.b32 two, $4, 0x64646464, 0x4342;
        and.b32 a, one, 0xFF0FFF0F;
        and.b32 b, two, 0xFF0FFF0F;
        sub.f16x2 a, a, middle;
        sub.f16x2 b, b, middle;
        fma.rn.f16x2 $0, a, $5, $7;
        fma.rn.f16x2 $1, b, $6, $8;
        and.b32 a, one, 0xFFF0FFF0;
        and.b32 b, two, 0xFFF0FFF0;
        fma.rn.f16x2 a, a, part, less;
        fma.rn.f16x2 b, b, part, less;
        fma.rn.f16x2 $2, a, $5, $7;
        fma.rn.f16x2 $3, b, $6, $8;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [packed, scale, shift],
        dtype=(tl.float16, tl.float16),
        is_pure=IS_PURE,
        pack=4,
    )


@triton.jit
def _compiled_fp8(packed: tl.tensor, scale: tl.tensor, IS_PURE: tl.constexpr) -> tl.tensor:
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 one, two;
        .reg .b32 a, b;
        mov.b32 {one, two}, $2;
        cvt.rn.f16x2.e4m3x2 a, one;
        cvt.rn.f16x2.e4m3x2 b, two;
        mul.f16x2 $0, a, $3;
        mul.f16x2 $1, b, $4;
        }""",
        "=&r,=&r,r,r,r",
        [packed, scale],
        dtype=tl.float16,
        is_pure=IS_PURE,
        pack=4,
    )
