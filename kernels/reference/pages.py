"""Reading, rewriting and copying the pages of lanes.

repack, for each lane of a sequence:

    kept tokens = [ the `start` leading pages, untouched | the tokens `keep`, in order ]
                -> [ pages up to `dst_sealed`, in `fmt`, full | the rest in the compute format ]

A token that leaves one quantized page for another is read back as a number and quantized again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.reference.codec import decode_pages, encode_pages, float_views
from winnow.kernels.reference.lanes import check_layer, check_pages, check_slot, lane_pages, sealed_format


def read_lane(kv: PagedKV, slot: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one lane, each [kept, D] f32."""
    sealed, open_ = lane_pages(kv, slot, layer, head)
    sealed_part = decode_pages(kv.data[sealed], kv.layout, sealed_format(kv, slot))
    open_part = decode_pages(kv.data[open_], kv.layout, kv.layout.compute)
    kept = int(kv.kept[slot, layer, head])
    keys, values = (torch.cat(parts)[:kept] for parts in zip(sealed_part, open_part, strict=True))
    return keys, values


def read_lanes(kv: PagedKV, slot: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence's layer, each [Hkv, n, D] f32: n is the longest lane's kept length, and what lies
    beyond a lane's own is zero."""
    check_slot(kv, slot)
    check_layer(kv, layer)
    kept = kv.kept[slot, layer].tolist()
    keys = torch.zeros(len(kept), max(kept), kv.layout.head_dim)
    values = torch.zeros_like(keys)
    for head, count in enumerate(kept):
        keys[head, :count], values[head, :count] = read_lane(kv, slot, layer, head)
    return keys, values


def write_lanes(
    kv: PagedKV,
    slot: int,
    layer: int,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    start: Tensor,
    dst_table: Tensor,
    dst_sealed: Tensor,
    fmt: PageFormat,
) -> None:
    """Writes given tokens to a sequence's layer from page `start` on, laid out as by `repack`.

    Args:
        keys, values: [Hkv, n, D] f32, of which each lane takes the first `counts`.
        counts, start, dst_table, dst_sealed: of the layer, [Hkv] and [Hkv, W] int32, as in `repack`.
    """
    check_slot(kv, slot)
    check_layer(kv, layer)
    heads, dim = kv.table.shape[2], kv.layout.head_dim
    if keys.shape != values.shape or keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (heads, dim):
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} do not fit {heads} lanes of {dim}")
    for part in (counts, start, dst_sealed):
        if tuple(part.shape) != (heads,):
            raise ValueError(f"numbers of {heads} lanes must be [{heads}], not {list(part.shape)}")
    if dst_table.dim() != 2 or dst_table.shape[0] != heads:
        raise ValueError(f"a table {list(dst_table.shape)} does not fit {heads} lanes")
    for head in range(heads):
        count, columns = int(counts[head]), (int(start[head]), int(dst_sealed[head]))
        if not 0 <= count <= keys.shape[1] or columns[0] < 0:
            raise ValueError(f"{count} tokens from page {columns[0]} on, but {keys.shape[1]} are given")
        _write_lane(kv, keys[head, :count], values[head, :count], dst_table[head], *columns, fmt)


def repack(
    kv: PagedKV,
    slot: int,
    keep: Tensor | None,
    counts: Tensor,
    start: Tensor,
    dst_table: Tensor,
    dst_sealed: Tensor,
    fmt: PageFormat,
) -> None:
    """Rewrites all lanes of a sequence from page `start` on.

    Args:
        keep: [L, Hkv, K] int32, lane indices of the tokens that follow the first `start` pages, ascending, padded
            with -1; None for every token from there on.
        counts: [L, Hkv] int32, how many tokens follow.
        start: [L, Hkv] int32, leading pages that stay as they are; they are sealed in `fmt` already.
        dst_table: [L, Hkv, W] int32, the lane's new pages; the first `start` are not looked at.
        dst_sealed: [L, Hkv] int32, pages in `fmt` of the new lane, `start` included.

    A destination page is fresh, or the lane's own page of the same column. The tables of `kv` are not changed.
    """
    check_slot(kv, slot)
    lanes = tuple(kv.table.shape[1:3])
    for name, part in {"counts": counts, "start": start, "dst_sealed": dst_sealed}.items():
        if tuple(part.shape) != lanes:
            raise ValueError(f"{name} must be {list(lanes)}, not {list(part.shape)}")
    for layer in range(lanes[0]):
        for head in range(lanes[1]):
            index = _tokens(kv, slot, layer, head, keep, int(counts[layer, head]), int(start[layer, head]), fmt)
            keys, values = read_lane(kv, slot, layer, head)
            columns = (int(start[layer, head]), int(dst_sealed[layer, head]))
            _write_lane(kv, keys[index], values[index], dst_table[layer, head], *columns, fmt)


def copy_pages(kv: PagedKV, src: Tensor, dst: Tensor) -> None:
    """Copies whole pages: src and dst [n] int32."""
    if src.shape != dst.shape:
        raise ValueError(f"{list(src.shape)} pages cannot be copied to {list(dst.shape)}")
    kv.data[check_pages(kv, dst)] = kv.data[check_pages(kv, src)]


def _tokens(
    kv: PagedKV, slot: int, layer: int, head: int, keep: Tensor | None, count: int, start: int, fmt: PageFormat
) -> Tensor:
    """Lane indices of the `count` tokens to move, checked: [count] int64."""
    kept, stay = int(kv.kept[slot, layer, head]), start * kv.layout.capacity(fmt)
    if start < 0 or start > int(kv.sealed[slot, layer, head]) or (start and fmt != sealed_format(kv, slot)):
        raise ValueError(f"the first {start} pages of the lane are not all sealed in {fmt.label}")
    if count < 0 or (keep is not None and count > keep.shape[2]):
        raise ValueError(f"{count} tokens were announced, {0 if keep is None else keep.shape[2]} are listed")
    index = torch.arange(stay, stay + count) if keep is None else keep[layer, head, :count].long()
    if count and (int(index[0]) < stay or int(index[-1]) >= kept or bool((index.diff() <= 0).any())):
        raise IndexError(f"tokens to keep must ascend within {stay}..{kept - 1}")
    return index


def _write_lane(
    kv: PagedKV, keys: Tensor, values: Tensor, table: Tensor, start: int, sealed: int, fmt: PageFormat
) -> None:
    """Writes keys and values [n, D] f32 to the pages of `table` [W] from column `start` on."""
    full = (sealed - start) * kv.layout.capacity(fmt)
    count = keys.shape[0]
    if not 0 <= full <= count:
        raise ValueError(f"{count} tokens do not fill pages {start} to {sealed - 1} in {fmt.label}")
    width = sealed + kv.layout.pages(count - full)
    if width > table.shape[0]:
        raise IndexError(f"a lane of {width} pages in a table {table.shape[0]} wide")
    pages = check_pages(kv, table[start:width])
    if full:
        raw = encode_pages(keys[:full], values[:full], kv.layout, fmt)
        kv.data[pages[: sealed - start], : raw.shape[1]] = raw
    place = torch.arange(count - full)
    page, place = pages[sealed - start + place // kv.layout.page_tokens], place % kv.layout.page_tokens
    k_view, v_view = float_views(kv.data, kv.layout, kv.layout.compute)
    k_view[page, :, place] = keys[full:].to(k_view.dtype)
    v_view[page, place] = values[full:].to(v_view.dtype)
