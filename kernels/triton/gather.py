"""Tokens of lanes, wherever their pages store them, as dense numbers: what every operation between steps reads with."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.triton.tiles import keys_at, padded, values_at

WARPS = 8


def gather(
    data: Tensor,
    layout: PageLayout,
    fmt: PageFormat,
    part: int,
    lanes: Tensor,
    table: Tensor,
    width: int,
    keep: Tensor | None,
    keys: Tensor,
    values: Tensor,
    first: int,
    count: int,
) -> None:
    """Writes the tokens in one part of their lanes to `keys` and `values`; the others' places stay as they are.

    Args:
        part: 0 for the sealed pages, 1 for those in the second format, 2 for the open ones; `fmt` is its format.
        lanes: [9, N] int32: how many tokens are read of each lane, the first of them where `keep` is None, the lane
            index at which each part begins and the last ends (4), the column of `table` at which each part begins (3).
        table: [N, width] int32, page ids.
        keep: [N, K] int32, lane indices of the tokens; None: they follow each other.
        keys, values: [n, count or more, D] of n lanes from lane `first` on, f32, or bf16 for pages that
            are. The channels of values follow each other; keys may lie in any way.
        count: of the tokens of the longest of these lanes.
    """
    dim = layout.head_dim
    tile = max(16, min(64, 8192 // padded(dim)))
    assert values.stride(2) == 1
    _gather[len(keys), triton.cdiv(count, tile)](
        data,
        lanes,
        table,
        table if keep is None else keep,
        keys,
        values,
        first,
        part,
        lanes.numel() // 9,
        width,
        0 if keep is None else keep.shape[1],
        *keys.stride(),
        *values.stride()[:2],
        IS_LISTED=keep is not None,
        FORMAT=int(fmt),
        D=dim,
        C=layout.capacity(fmt),
        PAGE_BYTES=layout.page_bytes,
        TILE=tile,
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["first_lane", "part", "lane_count", "table_width", "keep_width"])
def _gather(
    data: tl.tensor,
    lanes: tl.tensor,
    table: tl.tensor,
    keep: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    first_lane: tl.tensor,
    part: tl.tensor,
    lane_count: tl.tensor,
    table_width: tl.tensor,
    keep_width: tl.tensor,
    key_lane: tl.tensor,
    key_token: tl.tensor,
    key_channel: tl.tensor,
    value_lane: tl.tensor,
    value_token: tl.tensor,
    IS_LISTED: tl.constexpr,
    FORMAT: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program (lane, tile of its tokens)."""
    row = tl.program_id(0).to(tl.int64)
    lane = first_lane + row
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_read = index < tl.load(lanes + lane)
    if IS_LISTED:
        token = tl.load(keep + lane * keep_width + index, mask=is_read, other=-1)
    else:
        token = tl.load(lanes + lane_count + lane) + index
    begin = tl.load(lanes + (2 + part) * lane_count + lane)
    end = tl.load(lanes + (3 + part) * lane_count + lane)
    is_read = is_read & (token >= begin) & (token < end)
    if tl.max(is_read.to(tl.int32), 0) > 0:
        place = tl.where(is_read, token - begin, 0)
        column = tl.load(lanes + (6 + part) * lane_count + lane) + place // C
        page = data + tl.load(table + lane * table_width + column, mask=is_read, other=0).to(tl.int64) * PAGE_BYTES
        place = place % C
        channel = tl.arange(0, padded(D))

        block = keys_at(page[None, :], channel[:, None], place[None, :], is_read[None, :], FORMAT, D, C)
        at = keys + row * key_lane + channel[:, None] * key_channel + index[None, :] * key_token
        tl.store(at, block.to(keys.dtype.element_ty), mask=is_read[None, :] & (channel[:, None] < D))

        block = values_at(page[:, None], place[:, None], channel[None, :], is_read[:, None], FORMAT, D, C)
        at = values + row * value_lane + index[:, None] * value_token + channel[None, :]
        tl.store(at, block.to(values.dtype.element_ty), mask=is_read[:, None] & (channel[None, :] < D))
