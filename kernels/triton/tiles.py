"""Keys and values of pages in any format, as blocks of numbers: what every kernel over pages reads with.

A page is given by the address of its first byte, a `uint8` pointer: one for a whole block, or a block of them that
broadcasts against the indices. Its format, head dimension D and capacity C are constexprs, from which the places of its
parts follow. A page must be readable even where all of its tokens are masked.

Codes are those of kernels/reference/codec.py: unsigned for the integer formats, so that number = code * scale + zero;
for fp8, a float16 that is the number of the code times 2^-8, so that 256 is to be multiplied into the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from winnow.kernels.layout import BLOCK, Offsets, PageFormat

F32 = tl.constexpr(int(PageFormat.F32))
BF16 = tl.constexpr(int(PageFormat.BF16))
INT8 = tl.constexpr(int(PageFormat.INT8))
INT4 = tl.constexpr(int(PageFormat.INT4))
INT2 = tl.constexpr(int(PageFormat.INT2))
FP8 = tl.constexpr(int(PageFormat.FP8))
F16 = tl.constexpr(int(PageFormat.F16))
GROUP = tl.constexpr(BLOCK)


@triton.constexpr_function
def padded(size: int) -> int:
    """The power of two that a block of `size` channels or tokens takes; 16 at least, as matrix products want it."""
    return max(16, 1 << (size - 1).bit_length())


@triton.constexpr_function
def is_float(fmt: int) -> bool:
    return PageFormat(fmt).is_float


@triton.constexpr_function
def bytes_of(fmt: int, tokens: int) -> int:
    """What so many numbers take in a page of this format, scales aside."""
    return tokens * PageFormat(fmt).bits // 8


@triton.constexpr_function
def value_block(fmt: int, dim: int) -> int:
    """Channels that share the scale of a token's value."""
    return Offsets(PageFormat(fmt), dim, BLOCK).value_block


@triton.constexpr_function
def values_offset(fmt: int, dim: int, tokens: int) -> int:
    return Offsets(PageFormat(fmt), dim, tokens).values


@triton.constexpr_function
def key_scale_offset(fmt: int, dim: int, tokens: int) -> int:
    return Offsets(PageFormat(fmt), dim, tokens).k_scale


@triton.constexpr_function
def key_zero_offset(fmt: int, dim: int, tokens: int) -> int:
    return Offsets(PageFormat(fmt), dim, tokens).k_zero


@triton.constexpr_function
def value_scale_offset(fmt: int, dim: int, tokens: int) -> int:
    return Offsets(PageFormat(fmt), dim, tokens).v_scale


@triton.constexpr_function
def value_zero_offset(fmt: int, dim: int, tokens: int) -> int:
    return Offsets(PageFormat(fmt), dim, tokens).v_zero


@triton.jit
def page_keys(page: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    """[padded(D), padded(C)] f32: a page's keys, channel-major; zero outside of D and C."""
    t = tl.arange(0, padded(C))[None, :]
    return keys_at(page, tl.arange(0, padded(D))[:, None], t, t < C, FORMAT, D, C)


@triton.jit
def page_values(page: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr) -> tl.tensor:
    """[padded(C), padded(D)] f32: a page's values, token-major; zero outside of C and D."""
    t = tl.arange(0, padded(C))[:, None]
    return values_at(page, t, tl.arange(0, padded(D))[None, :], t < C, FORMAT, D, C)


@triton.jit
def keys_at(
    page: tl.tensor, d: tl.tensor, t: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """f32: channels d of the keys at places t, which broadcast; zero where not `seen` (shaped as t) or d >= D."""
    if is_float(FORMAT):
        numbers = float_keys(page, d, t, seen, FORMAT, D, C).to(tl.float32)
    else:
        codes = key_codes(page, d, t, seen, FORMAT, D, C).to(tl.float32)
        if FORMAT == FP8:
            scale = tl.load(f16_part(page, key_scale_offset(FORMAT, D, C))).to(tl.float32) * 256
            numbers = tl.where(seen, codes * scale, 0.0)
        else:
            scales, zeros = key_scales(page, d, t, FORMAT, D, C)
            numbers = tl.where(seen, codes * scales + zeros, 0.0)
    return numbers


@triton.jit
def values_at(
    page: tl.tensor, t: tl.tensor, d: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """f32: channels d of the values at places t, which broadcast; zero where not `seen` (shaped as t) or d >= D."""
    if is_float(FORMAT):
        numbers = float_values(page, t, d, seen, FORMAT, D, C).to(tl.float32)
    else:
        codes = value_codes(page, t, d, seen, FORMAT, D, C).to(tl.float32)
        if FORMAT == FP8:
            scale = tl.load(f16_part(page, value_scale_offset(FORMAT, D, C))).to(tl.float32) * 256
            numbers = tl.where(seen, codes * scale, 0.0)
        else:
            scales, zeros = value_scales(page, t, d, seen, FORMAT, D, C)
            numbers = tl.where(d < D, codes * scales + zeros, 0.0)
    return numbers


@triton.jit
def float_keys(
    page: tl.tensor, d: tl.tensor, t: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """As `keys_at`, in the page's own type: f32, bf16 or f16."""
    return tl.load(float_part(page, 0, FORMAT) + (d * C + t), mask=(d < D) & seen, other=0.0)


@triton.jit
def float_values(
    page: tl.tensor, t: tl.tensor, d: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """As `values_at`, in the page's own type: f32, bf16 or f16."""
    values = float_part(page, values_offset(FORMAT, D, C), FORMAT)
    return tl.load(values + (t * D + d), mask=seen & (d < D), other=0.0)


@triton.jit
def key_codes(
    page: tl.tensor, d: tl.tensor, t: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """Codes of the keys at places t; zero where not `seen` or d >= D."""
    inside = (d < D) & seen
    if FORMAT == INT4:
        HALF: tl.constexpr = C // 2
        packed = tl.load(page + (d * HALF + t % HALF), mask=inside, other=0)
        codes = tl.where(t < HALF, packed & 15, packed >> 4)
    elif FORMAT == INT2:
        place = (t // GROUP) * (D * bytes_of(FORMAT, GROUP)) + d * bytes_of(FORMAT, GROUP) + t % GROUP // 4
        packed = tl.load(page + place, mask=inside, other=0)
        codes = (packed >> (t % 4 * 2).to(tl.uint8)) & 3
    elif FORMAT == FP8:
        codes = e4m3(tl.load(page + (d * C + t), mask=inside, other=0))
    else:
        codes = tl.load(page + (d * C + t), mask=inside, other=0)
    return codes


@triton.jit
def value_codes(
    page: tl.tensor, t: tl.tensor, d: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """Codes of the values at places t; zero where not `seen` or d >= D."""
    inside = seen & (d < D)
    values = page + values_offset(FORMAT, D, C)
    if FORMAT == INT4:
        HALF: tl.constexpr = D // 2
        packed = tl.load(values + (t * HALF + d % HALF), mask=inside, other=0)
        codes = tl.where(d < HALF, packed & 15, packed >> 4)
    elif FORMAT == INT2:
        H: tl.constexpr = value_block(FORMAT, D)
        place = (d // H) * (C * bytes_of(FORMAT, H)) + t * bytes_of(FORMAT, H) + d % H // 4
        packed = tl.load(values + place, mask=inside, other=0)
        codes = (packed >> (d % 4 * 2).to(tl.uint8)) & 3
    elif FORMAT == FP8:
        codes = e4m3(tl.load(values + (t * D + d), mask=inside, other=0))
    else:
        codes = tl.load(values + (t * D + d), mask=inside, other=0)
    return codes


@triton.jit
def key_scales(
    page: tl.tensor, d: tl.tensor, t: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scales and zeros, f32, of an integer format's keys; for int8 and int4 shaped as d alone. Zero where d >= D."""
    index = d
    inside = d < D
    if FORMAT == INT2:
        index = (t // GROUP) * D + d
        inside = inside & (t < C)
    scales = tl.load(f16_part(page, key_scale_offset(FORMAT, D, C)) + index, mask=inside, other=0.0)
    zeros = tl.load(f16_part(page, key_zero_offset(FORMAT, D, C)) + index, mask=inside, other=0.0)
    return scales.to(tl.float32), zeros.to(tl.float32)


@triton.jit
def value_scales(
    page: tl.tensor, t: tl.tensor, d: tl.tensor, seen: tl.tensor, FORMAT: tl.constexpr, D: tl.constexpr, C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Scales and zeros, f32, of an integer format's values; for int8 and int4 shaped as t alone. Zero for unseen t."""
    index = t
    inside = seen
    if FORMAT == INT2:
        index = (d // value_block(FORMAT, D)) * C + t
        inside = inside & (d < D)
    scales = tl.load(f16_part(page, value_scale_offset(FORMAT, D, C)) + index, mask=inside, other=0.0)
    zeros = tl.load(f16_part(page, value_zero_offset(FORMAT, D, C)) + index, mask=inside, other=0.0)
    return scales.to(tl.float32), zeros.to(tl.float32)


@triton.jit
def float_part(page: tl.tensor, OFFSET: tl.constexpr, FORMAT: tl.constexpr) -> tl.tensor:
    """Where floats begin, `OFFSET` bytes into a page of a float format."""
    wide: tl.constexpr = tl.float32 if FORMAT == F32 else tl.bfloat16
    return (page + OFFSET).to(tl.pointer_type(tl.float16 if FORMAT == F16 else wide))


@triton.jit
def f16_part(page: tl.tensor, OFFSET: tl.constexpr) -> tl.tensor:
    """Where scales or zeros begin."""
    return (page + OFFSET).to(tl.pointer_type(tl.float16))


@triton.jit
def e4m3(codes: tl.tensor) -> tl.tensor:
    """f16, exact: the numbers of e4m3 codes (uint8) times 2^-8, the difference of the two types' exponent biases."""
    wide = codes.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
