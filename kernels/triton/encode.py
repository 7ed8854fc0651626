"""Dense keys and values into pages of any format, bit for bit as kernels/reference/codec.py encodes them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import E4M3_MAX, F16_MAX, MIN_SCALE
from winnow.kernels.triton.device import page_formats
from winnow.kernels.triton.tiles import (
    FP8,
    GROUP,
    INT2,
    INT4,
    f16_part,
    float_part,
    is_float,
    key_scale_offset,
    key_zero_offset,
    value_block,
    value_scale_offset,
    value_zero_offset,
    values_offset,
)

TILE = 4096
"""Numbers that a program holds at a time"""
LEAST_SCALE = tl.constexpr(MIN_SCALE)
MOST_F16 = tl.constexpr(F16_MAX)
MOST_E4M3 = tl.constexpr(E4M3_MAX)


def encode(
    data: Tensor,
    layout: PageLayout,
    fmt: PageFormat,
    part: int,
    parts: int,
    tokens: Tensor,
    table: Tensor,
    width: int,
    keys: Tensor,
    values: Tensor,
    first: int,
    most: int,
) -> None:
    """Writes one part of some lanes' pages.

    Args:
        part: of `parts`; `fmt` is its format.
        tokens: [3, parts, N] int32: the column of `table` in which a part of a lane begins, the first of the lane's
            tokens that goes there, a multiple of 8, and how many do: whole pages, but for a float format.
        table: [N, width] int32, page ids.
        keys, values: [n, tokens, D] f32 or bf16, of n lanes from lane `first` on. The channels of values follow each
            other; keys may lie in any way.
        most: tokens that go to this part of one of these lanes.
    """
    assert values.stride(2) == 1
    if fmt not in page_formats():
        raise ValueError(f"this backend has no pages in {fmt.label}")
    capacity = layout.capacity(fmt)
    _encode[len(keys), triton.cdiv(most, capacity), 2](
        data,
        tokens,
        table,
        keys,
        values,
        first,
        part,
        parts,
        tokens.numel() // (3 * parts),
        width,
        *keys.stride(),
        *values.stride()[:2],
        FORMAT=int(fmt),
        D=layout.head_dim,
        C=capacity,
        PAGE_BYTES=layout.page_bytes,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["first", "part", "parts", "lane_count", "table_width"])
def _encode(
    data: tl.tensor,
    tokens: tl.tensor,
    table: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    first: tl.tensor,
    part: tl.tensor,
    parts: tl.tensor,
    lane_count: tl.tensor,
    table_width: tl.tensor,
    key_lane: tl.tensor,
    key_token: tl.tensor,
    key_channel: tl.tensor,
    value_lane: tl.tensor,
    value_token: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
) -> None:
    """Program (lane, page of the part, side)."""
    row = tl.program_id(0).to(tl.int64)
    lane, place = first + row, tl.program_id(1)
    described, apart = tokens + part * lane_count + lane, parts * lane_count
    held = tl.minimum(tl.load(described + 2 * apart) - place * C, C)
    if held > 0:
        column = tl.load(described) + place
        page = data + tl.load(table + lane * table_width + column).to(tl.int64) * PAGE_BYTES
        token = tl.multiple_of(tl.load(described + apart) + place * C, 8)
        if tl.program_id(2) == 0:
            _put_keys(keys + row * key_lane + token * key_token, page, key_channel, key_token, held, FORMAT, D, C)
        else:
            _put_values(values + row * value_lane + token * value_token, page, value_token, held, FORMAT, D, C)


@triton.jit
def _put_keys(
    source: tl.tensor,
    page: tl.tensor,
    channel: tl.tensor,
    token: tl.tensor,
    held: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Keys of `held` tokens, whose channels and tokens are so far apart."""
    if is_float(FORMAT):
        _put_floats(source, float_part(page, 0, FORMAT), channel, token, D, held, D, C)
    else:
        scales = f16_part(page, key_scale_offset(FORMAT, D, C))
        if FORMAT == FP8:
            _put_fp8(source, page, scales, channel, token, D, C)
        else:
            zeros = f16_part(page, key_zero_offset(FORMAT, D, C))
            BLOCK: tl.constexpr = GROUP if FORMAT == INT2 else C
            _put_integers(source, page, scales, zeros, channel, token, FORMAT, D, C, BLOCK)


@triton.jit
def _put_values(
    source: tl.tensor,
    page: tl.tensor,
    token: tl.tensor,
    held: tl.tensor,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Values of `held` tokens that are so far apart."""
    OFFSET: tl.constexpr = values_offset(FORMAT, D, C)
    if is_float(FORMAT):
        _put_floats(source, float_part(page, OFFSET, FORMAT), token, 1, held, D, C, D)
    else:
        scales = f16_part(page, value_scale_offset(FORMAT, D, C))
        if FORMAT == FP8:
            _put_fp8(source, page + OFFSET, scales, token, 1, C, D)
        else:
            zeros = f16_part(page, value_zero_offset(FORMAT, D, C))
            _put_integers(source, page + OFFSET, scales, zeros, token, 1, FORMAT, C, D, value_block(FORMAT, D))


@triton.constexpr_function
def _power(size: int) -> int:
    """The power of two that a block of so many takes."""
    return 1 << (size - 1).bit_length()


@triton.constexpr_function
def _rows_of_tile(columns: int) -> int:
    return TILE // _power(columns)


@triton.jit
def _put_floats(
    source: tl.tensor,
    to: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The first `rows` and `columns` of one side of a page; its other places stay as they are."""
    STEP: tl.constexpr = _rows_of_tile(COLUMNS)
    column = tl.arange(0, _power(COLUMNS))[None, :]
    for first in range(0, ROWS, STEP):
        row = first + tl.arange(0, STEP)[:, None]
        inside = (row < ROWS) & (column < COLUMNS)
        if (rows < ROWS) | (columns < COLUMNS):  # apart, so that full pages move in whole vectors
            inside = inside & (row < rows) & (column < columns)
            x = tl.load(source + row * row_stride + column * column_stride, mask=inside, other=0.0)
            tl.store(to + row * COLUMNS + column, _rounded(x, to.dtype.element_ty), mask=inside)
        else:
            x = tl.load(source + row * row_stride + column * column_stride, mask=inside, other=0.0)
            tl.store(to + row * COLUMNS + column, _rounded(x, to.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(x: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    x = x.to(tl.float32)
    if tl.float16 == TYPE:
        x = tl.minimum(tl.maximum(x, -MOST_F16), MOST_F16)
    return x.to(TYPE)


@triton.jit
def _put_integers(
    source: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One side of a page: for each block of columns its rows, each with a scale and a zero."""
    BITS: tl.constexpr = 4 if FORMAT == INT4 else (2 if FORMAT == INT2 else 8)
    LEVELS: tl.constexpr = 2**BITS - 1
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = BLOCK // PARTS
    STEP: tl.constexpr = _rows_of_tile(BYTES)
    COUNT: tl.constexpr = ROWS * (COLUMNS // BLOCK)
    # Where the first number of a byte is in its block, and the next ones: four bits are shared by the halves.
    byte = tl.arange(0, _power(BYTES))[None, :]
    NEXT: tl.constexpr = BYTES if FORMAT == INT4 else 1
    column = byte if FORMAT == INT4 else byte * PARTS
    for first in range(0, COUNT, STEP):
        index = first + tl.arange(0, STEP)
        is_row = index < COUNT
        inside = is_row[:, None] & (byte < BYTES)
        at = source + (index % ROWS)[:, None] * row_stride
        at += ((index // ROWS * BLOCK)[:, None] + column) * column_stride
        low = tl.full([STEP], float("inf"), tl.float32)
        high = tl.full([STEP], float("-inf"), tl.float32)
        for part in tl.static_range(PARTS):
            x = tl.load(at + part * NEXT * column_stride, mask=inside, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.min(tl.where(byte < BYTES, x, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(byte < BYTES, x, float("-inf")), 1))
        scale = tl.div_rn(high - low, tl.full([STEP], LEVELS, tl.float32))
        scale = tl.minimum(tl.maximum(scale, LEAST_SCALE), MOST_F16).to(tl.float16)
        zero = tl.minimum(tl.maximum(low, -MOST_F16), MOST_F16).to(tl.float16)
        tl.store(scales + index, scale, mask=is_row)
        tl.store(zeros + index, zero, mask=is_row)
        step, origin = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
        packed = tl.zeros([STEP, _power(BYTES)], tl.int32)
        for part in tl.static_range(PARTS):
            x = tl.load(at + part * NEXT * column_stride, mask=inside, other=0.0).to(tl.float32)
            code = tl.floor(tl.div_rn(x - origin, tl.broadcast_to(step, x.shape)) + 0.5)
            packed |= tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32) << (part * BITS)
        tl.store(codes + index[:, None] * BYTES + byte, packed.to(tl.uint8), mask=inside)


@triton.jit
def _put_fp8(
    source: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One side of a page, under one scale."""
    STEP: tl.constexpr = _rows_of_tile(COLUMNS)
    column = tl.arange(0, _power(COLUMNS))[None, :]
    peaks = tl.zeros([STEP, _power(COLUMNS)], tl.float32)
    for first in range(0, ROWS, STEP):
        row = first + tl.arange(0, STEP)[:, None]
        inside = (row < ROWS) & (column < COLUMNS)
        x = tl.load(source + row * row_stride + column * column_stride, mask=inside, other=0.0)
        peaks = tl.maximum(peaks, tl.abs(x.to(tl.float32)))
    scale = tl.div_rn(tl.max(tl.max(peaks, 1), 0), MOST_E4M3)
    scale = tl.minimum(tl.maximum(scale, LEAST_SCALE), MOST_F16).to(tl.float16)
    tl.store(scales, scale)
    for first in range(0, ROWS, STEP):
        row = first + tl.arange(0, STEP)[:, None]
        inside = (row < ROWS) & (column < COLUMNS)
        x = tl.load(source + row * row_stride + column * column_stride, mask=inside, other=0.0).to(tl.float32)
        x = tl.div_rn(x, tl.zeros_like(x) + scale.to(tl.float32))
        tl.store(codes + row * COLUMNS + column, to_e4m3(x), mask=inside)


@triton.jit
def to_e4m3(x: tl.tensor) -> tl.tensor:
    """uint8: x f32, within ±448 after clamping, rounded to the nearest e4m3 number, to even where two are as near.

    With integers, since GPUs before Ada have no instruction for it.
    """
    bits = tl.minimum(tl.maximum(x, -MOST_E4M3), MOST_E4M3).to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of fraction stay of 23; the exponent's bias is 7, not 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9, as those around 2^14 are in f32: adding that rounds to them.
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (((bits >> 24) & 0x80) | tl.where(size < 0x3C800000, tiny, normal)).to(tl.uint8)
