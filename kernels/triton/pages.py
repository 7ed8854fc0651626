"""Reading, rewriting and copying the pages of lanes (see kernels/reference/pages.py).

Tokens are gathered from their pages into dense memory on the device, and from there encoded into their new pages. That
memory has a limit, so lanes follow each other in groups; all that a lane keeps is read before any of it is written, and
its new pages may be its old ones. A launch reads or writes the pages of one format of a whole group.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.kernels.kv import PagedKV, Rest
from winnow.kernels.layout import PageFormat
from winnow.kernels.reference.lanes import check_layer, check_slot
from winnow.kernels.triton.device import device, upload
from winnow.kernels.triton.encode import encode
from winnow.kernels.triton.gather import gather
from winnow.kernels.triton.lanes import Ints, Lanes, Pages, check_pages, destinations, ints, upload_together

SCRATCH_BYTES = 256 << 20
"""Dense memory that a repack takes, unless one lane needs more"""


def read_lanes(kv: PagedKV, slot: int, layer: int) -> tuple[Tensor, Tensor]:
    check_layer(kv, layer)
    lanes = Lanes.of(kv, slot, slice(layer, layer + 1))
    kept = lanes.tokens[3]
    keys, values = torch.zeros((2, len(kept), int(kept.max()), kv.layout.head_dim), device=device()).unbind()
    if kept.any():
        none = np.zeros_like(kept)
        where, table = upload_together([_described(lanes, kept, none, 0), lanes.pages(len(kv.data), 0)])
        for part in _present(lanes, none):
            fmt = lanes.formats[part]
            gather(kv.data, kv.layout, fmt, part, where, table, None, keys, values, 0, keys.shape[1])
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
    check_slot(kv, slot)
    check_layer(kv, layer)
    heads, dim = kv.table.shape[2], kv.layout.head_dim
    if keys.shape != values.shape or keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (heads, dim):
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} do not fit {heads} lanes of {dim}")
    if keys.dtype != torch.float32 or values.dtype != torch.float32:
        raise ValueError(f"keys and values must be f32, not {keys.dtype} and {values.dtype}")
    _check_shapes((heads,), dst_table, counts=counts, start=start, dst_sealed=dst_sealed)
    count = ints(counts)
    if count.min() < 0 or count.max() > keys.shape[1]:
        raise ValueError(f"from {count.min()} to {count.max()} tokens, but {keys.shape[1]} are given")
    pages = destinations(kv, count, dst_table.numpy(), [(ints(start), ints(dst_sealed), fmt)])
    keys, values = keys.contiguous(), values.contiguous()
    _write(kv, pages, upload(torch.from_numpy(pages.items)), keys, values, 0)


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
    lanes = Lanes.of(kv, slot)
    shape = tuple(kv.table.shape[1:3])
    _check_shapes(shape, dst_table, counts=counts, start=start, dst_sealed=dst_sealed)
    count, first, sealed = ints(counts), ints(start), ints(dst_sealed)
    parts = [(first, sealed, fmt)]
    if rest is not None:
        _check_shapes(shape, dst_table, rest_start=rest.start, rest_pages=rest.pages)
        if int(rest.start.min()) < 0:
            raise ValueError("a negative number of pages of the second part stays")
        parts.append((sealed + ints(rest.start), sealed + ints(rest.pages), rest.fmt))
    if first.min() < 0 or (first > lanes.leading(fmt, kv.layout.page_tokens)).any():
        raise ValueError(f"the pages that are to stay are not all full and in {fmt.label}")
    stay = first * kv.layout.capacity(fmt)
    keep = _checked(lanes, keep, count, stay, ascending=rest is None)
    pages = destinations(kv, count, dst_table.flatten(0, 1).numpy(), parts)
    if not count.any():
        return
    column = int(first.min())
    table = lanes.pages(len(kv.data), column)
    _move(
        kv,
        lanes,
        _described(lanes, count, stay, column),
        table,
        keep,
        _present(lanes, np.where(count > 0, stay, lanes.tokens[3])),
        pages,
    )


def copy_pages(kv: PagedKV, src: Tensor, dst: Tensor) -> None:
    if src.shape != dst.shape:
        raise ValueError(f"{list(src.shape)} pages cannot be copied to {list(dst.shape)}")
    check_pages(src.numpy(), len(kv.data))
    check_pages(dst.numpy(), len(kv.data))
    if not len(src):
        return
    words = kv.data.view(torch.int64)
    words.index_copy_(0, upload(dst.long()), words.index_select(0, upload(src.long())))


def _move(
    kv: PagedKV,
    lanes: Lanes,
    where: Ints,
    table: NDArray[np.int32],
    keep: Tensor | None,
    present: list[int],
    pages: Pages,
) -> None:
    """Gathers what `where` says and writes it to `pages`, one group of lanes after the other."""
    counts, layout = where[0], kv.layout
    on_device, columns, items = upload_together([where, table, pages.items])
    kept = None if keep is None else upload(keep)
    # Numbers that are bf16 in all of their pages need no more on their way.
    is_narrow = all(lanes.formats[part] is PageFormat.BF16 for part in present)
    dtype = torch.bfloat16 if is_narrow else torch.float32
    room = -(-int(counts.max()) // 16) * 16
    group = max(1, SCRATCH_BYTES // (2 * room * layout.head_dim * dtype.itemsize))
    group = min(group, len(counts))
    # Channel-major, as pages store them; values are not.
    keys = torch.empty((group, layout.head_dim, room), dtype=dtype, device=device()).transpose(1, 2)
    values = torch.empty((group, room, layout.head_dim), dtype=dtype, device=device())
    for first in range(0, len(counts), group):
        last = min(first + group, len(counts))
        k, v, longest = keys[: last - first], values[: last - first], int(counts[first:last].max())
        if not longest:
            continue
        for part in present:
            gather(kv.data, layout, lanes.formats[part], part, on_device, columns, kept, k, v, first, longest)
        _write(kv, pages, items, k, v, first)


def _write(kv: PagedKV, pages: Pages, items: Tensor, keys: Tensor, values: Tensor, lane: int) -> None:
    """Writes those of `pages` whose lanes, from `lane` on, are in `keys` and `values`."""
    for part, fmt in enumerate(pages.formats):
        begin, end = pages.among(part, lane, lane + len(keys))
        if begin < end:
            encode(kv.data, kv.layout, fmt, items, begin, end - begin, keys, values, lane)


def _described(lanes: Lanes, counts: Ints, stay: Ints, column: int) -> Ints:
    """[9, N]: what `gather` is told of its lanes; tokens behind `stay`, of a table that begins at `column`."""
    return np.concatenate([counts[None], stay[None], lanes.tokens, lanes.columns[:3] - column])


def _present(lanes: Lanes, stay: Ints) -> list[int]:
    """The parts in which any of the lanes has tokens behind `stay`."""
    return np.flatnonzero((np.maximum(lanes.tokens[:3], stay) < lanes.tokens[1:]).any(1)).tolist()


def _checked(lanes: Lanes, keep: Tensor | None, counts: Ints, stay: Ints, ascending: bool) -> Tensor | None:
    """`keep` as [N, K] int32, after a look at what it names: tokens behind those that stay."""
    kept = lanes.tokens[3]
    if counts.min() < 0:
        raise ValueError("a negative number of tokens")
    if keep is None:
        if (stay + counts > kept).any():
            raise IndexError("more tokens than the lanes hold")
        return None
    if keep.dim() != 3 or keep.shape[0] * keep.shape[1] != len(counts):
        raise ValueError(f"tokens to keep {list(keep.shape)} do not fit {len(counts)} lanes")
    if counts.max() > keep.shape[2]:
        raise ValueError(f"{counts.max()} tokens were announced, {keep.shape[2]} are listed")
    keep = keep.flatten(0, 1).to(torch.int32).contiguous()
    if not counts.any():
        return keep
    listed = keep.numpy()[:, : counts.max()]
    place, is_ragged = np.arange(listed.shape[1]), counts.min() < counts.max()
    if ascending:
        falls = listed[:, 1:] <= listed[:, :-1]
        if is_ragged:
            falls &= place[1:] < counts[:, None]
        if falls.any():
            raise IndexError("tokens to keep must ascend")
        lowest, highest = listed[:, 0], listed[np.arange(len(counts)), counts - 1]
    else:
        is_read = place < counts[:, None]
        lowest = listed.min(1, where=is_read, initial=np.iinfo(np.int32).max)
        highest = listed.max(1, where=is_read, initial=-1)
    if (((lowest < stay) | (highest >= kept)) & (counts > 0)).any():
        raise IndexError("tokens to keep must lie behind those that stay, within their lanes")
    return keep


def _check_shapes(lanes: tuple[int, ...], table: Tensor, **numbers: Tensor) -> None:
    for name, part in numbers.items():
        if tuple(part.shape) != lanes:
            raise ValueError(f"{name} must be {list(lanes)}, not {list(part.shape)}")
    if table.dim() != len(lanes) + 1 or tuple(table.shape[:-1]) != lanes:
        raise ValueError(f"a table {list(table.shape)} does not fit lanes {list(lanes)}")
