"""Reading, rewriting and copying the pages of lanes.

repack, for each lane of a sequence:

    kept tokens = [ the `start` leading pages, untouched | the tokens `keep`, in order ]
                -> [ pages up to `dst_sealed`, in `fmt`, full | the rest in the compute format ]

and with a second format in between, whose own leading pages stay as well:

                -> [ `dst_sealed` pages in `fmt` | `rest.pages` pages in `rest.fmt` | the rest in the compute format ]

A token that leaves one quantized page for another is read back as a number and quantized again. Where lanes of two
layers share the pages of the second format, those are sealed once, from the tokens of both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from winnow.kernels.kv import PagedKV, Rest
from winnow.kernels.layout import PageFormat
from winnow.kernels.reference.codec import as_float, decode_pages, encode_pages, float_views
from winnow.kernels.reference.formats import Place
from winnow.kernels.reference.lanes import (
    check_layer,
    check_pages,
    check_slot,
    lane_pages,
    lane_positions,
    sealed_formats,
    sealed_tokens,
)


def read_lane(kv: PagedKV, slot: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one lane, each [kept, D] f32."""
    formats, kept = (*sealed_formats(kv, slot), kv.layout.compute), int(kv.kept[slot, layer, head])
    positions, parts, first = lane_positions(kv, slot, layer, head), [], 0
    for pages, fmt in zip(lane_pages(kv, slot, layer, head), formats, strict=True):
        last = first + len(pages) * kv.layout.capacity(fmt)
        parts.append(decode_pages(kv.data[pages], kv.layout, fmt, Place(kv, layer, head, positions[first:last])))
        first = last
    keys, values = (torch.cat(side)[:kept] for side in zip(*parts, strict=True))
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
    positions: Tensor | None = None,
) -> None:
    """Writes given tokens to a sequence's layer from page `start` on, laid out as by `repack`.

    Args:
        keys, values: [Hkv, n, D] f32, of which each lane takes the first `counts`.
        positions: [Hkv, n] int32, where these tokens stand in the text; None where they stand in the lane.
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
    if positions is not None and positions.shape != keys.shape[:2]:
        raise ValueError(f"positions {list(positions.shape)} do not fit keys {list(keys.shape)}")
    for head in range(heads):
        count, columns = int(counts[head]), (int(start[head]), int(dst_sealed[head]))
        if not 0 <= count <= keys.shape[1] or columns[0] < 0:
            raise ValueError(f"{count} tokens from page {columns[0]} on, but {keys.shape[1]} are given")
        at = torch.arange(count) + columns[0] * kv.layout.capacity(fmt)
        at = at if positions is None else positions[head, :count].long()
        place = Place(kv, layer, head, at, _channels(kv, slot, layer, head))
        _write_lane(place, keys[head, :count], values[head, :count], dst_table[head], [(*columns, fmt)])


def repack(
    kv: PagedKV,
    slot: int,
    keep: Tensor | None,
    counts: Tensor,
    start: Tensor,
    dst_table: Tensor,
    dst_sealed: Tensor,
    fmt: PageFormat,
    rest: Rest | None = None,
) -> None:
    """Rewrites all lanes of a sequence from page `start` on.

    Args:
        keep: [L, Hkv, K] int32, lane indices of the tokens to write, in their new order, padded with -1; None for
            every token behind the first `start` pages. Without `rest` they ascend.
        counts: [L, Hkv] int32, how many tokens are written.
        start: [L, Hkv] int32, leading pages that stay as they are; they are full and in `fmt` already.
        dst_table: [L, Hkv, W] int32, the lane's new pages; those that stay are not looked at.
        dst_sealed: [L, Hkv] int32, pages in `fmt` of the new lane, `start` included.
        rest: the part in a second format; None for a lane that had and will have none.

    A destination page is fresh, or any of the lane's own that does not stay. The tables of `kv` are not changed.
    """
    check_slot(kv, slot)
    lanes = tuple(kv.table.shape[1:3])
    none = torch.zeros(lanes, dtype=torch.int32)
    has_rest, rest = rest is not None, rest or Rest(none, none, kv.layout.compute)
    shapes = {"counts": counts, "start": start, "dst_sealed": dst_sealed, "start of rest": rest.start}
    for name, part in {**shapes, "pages of rest": rest.pages}.items():
        if tuple(part.shape) != lanes:
            raise ValueError(f"{name} must be {list(lanes)}, not {list(part.shape)}")
    lower_layers = range(0) if rest.merge is None else rest.merge.lower_layers(lanes[0])
    for layer in range(lanes[0]):
        for head in range(lanes[1]):
            index = _tokens(kv, slot, layer, head, keep, int(counts[layer, head]), int(start[layer, head]), fmt)
            if not has_rest and bool((index.diff() <= 0).any()):
                raise IndexError("tokens to keep must ascend")
            keys, values = read_lane(kv, slot, layer, head)
            sealed, first, last = (int(part[layer, head]) for part in (dst_sealed, rest.start, rest.pages))
            parts = [(int(start[layer, head]), sealed, fmt), (sealed + first, sealed + last, rest.fmt)]
            upper: tuple[Tensor, Tensor] | None = None
            if layer in lower_layers:
                numbers = [keep, counts, start, dst_sealed, rest.start, rest.pages]
                numbers.append(dst_table[..., sealed + first : sealed + last])
                if any(part is not None and not part[layer, head].equal(part[layer + 1, head]) for part in numbers):
                    raise ValueError(f"layers {layer} and {layer + 1} are merged, but move other tokens or elsewhere")
                upper_keys, upper_values = read_lane(kv, slot, layer + 1, head)
                upper = upper_keys[index], upper_values[index]
            elif layer - 1 in lower_layers:  # the pages that it shares are sealed already
                shared = (sealed - parts[0][0]) * kv.layout.capacity(fmt)
                own = torch.ones(len(index), dtype=torch.bool)
                own[shared : shared + (last - first) * kv.layout.capacity(rest.fmt)] = False
                index, parts[1] = index[own], (sealed + last, sealed + last, rest.fmt)
            t = 0.0 if rest.merge is None else rest.merge.t
            at, stays = lane_positions(kv, slot, layer, head)[index], _channels(kv, slot, layer, head)
            place = Place(kv, layer, head, at, stays, upper, t)
            _write_lane(place, keys[index], values[index], dst_table[layer, head], parts)


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
    if not 0 <= start <= _leading(kv, slot, layer, head, fmt):
        raise ValueError(f"the first {start} pages of the lane are not all full and in {fmt.label}")
    if count < 0 or (keep is not None and count > keep.shape[2]):
        raise ValueError(f"{count} tokens were announced, {0 if keep is None else keep.shape[2]} are listed")
    index = torch.arange(stay, stay + count) if keep is None else keep[layer, head, :count].long()
    if count and (int(index.min()) < stay or int(index.max()) >= kept):
        raise IndexError(f"tokens to keep must lie within {stay}..{kept - 1}")
    return index


def _channels(kv: PagedKV, slot: int, layer: int, head: int) -> Tensor | None:
    """[D] uint8: which channels of a lane's keys stay, where they were chosen."""
    return kv.channels[slot][layer, head] if slot in kv.channels else None


def _leading(kv: PagedKV, slot: int, layer: int, head: int, fmt: PageFormat) -> int:
    """Full pages in `fmt` that the lane begins with, be they sealed or not."""
    sealed, rest, _ = lane_pages(kv, slot, layer, head)
    full = int(kv.kept[slot, layer, head] - sealed_tokens(kv, slot)[layer, head]) // kv.layout.page_tokens
    first, second = sealed_formats(kv, slot)
    formats = [first] * len(sealed) + [second] * len(rest) + [kv.layout.compute] * full
    return next((i for i, other in enumerate(formats) if other is not fmt), len(formats))


def _write_lane(
    place: Place, keys: Tensor, values: Tensor, table: Tensor, parts: list[tuple[int, int, PageFormat]]
) -> None:
    """Writes keys and values [n, D] f32 to the pages of `table` [W]: full pages to the columns of each part (from, to,
    format), what is left to open pages behind the last part. `place` is that of the n tokens."""
    kv, layout = place.kv, place.kv.layout
    done = 0
    for first, last, fmt in parts:
        count = (last - first) * layout.capacity(fmt)
        if not 0 <= count <= keys.shape[0] - done:
            raise ValueError(f"{keys.shape[0] - done} tokens do not fill pages {first} to {last - 1} in {fmt.label}")
        if last > table.shape[0]:
            raise IndexError(f"a lane of {last} pages in a table {table.shape[0]} wide")
        if count:
            part = slice(done, done + count)
            upper = None if place.upper is None else (place.upper[0][part], place.upper[1][part])
            at = replace(place, positions=place.positions[part], upper=upper)
            raw = encode_pages(keys[part], values[part], layout, fmt, at)
            kv.data[check_pages(kv, table[first:last]), : raw.shape[1]] = raw
        done += count
    sealed, left = parts[-1][1], keys.shape[0] - done
    width = sealed + layout.pages(left)
    if width > table.shape[0]:
        raise IndexError(f"a lane of {width} pages in a table {table.shape[0]} wide")
    pages = check_pages(kv, table[sealed:width])
    index = torch.arange(left)
    page, index = pages[index // layout.page_tokens], index % layout.page_tokens
    k_view, v_view = float_views(kv.data, layout, layout.compute)
    k_view[page, :, index] = as_float(keys[done:], layout.compute)
    v_view[page, index] = as_float(values[done:], layout.compute)
