"""Reading, rewriting and copying the pages of lanes (see kernels/reference/pages.py).

Tokens are gathered from their pages into dense memory on the device, and from there encoded into their new pages. That
memory has a limit, so lanes follow each other in groups; all that a lane keeps is read before any of it is written, and
its new pages may be its old ones. A launch reads or writes the pages of one format of a whole group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from winnow.kernels.kv import PagedKV, Rest
from winnow.kernels.layout import PageFormat
from winnow.kernels.reference.lanes import check_layer, check_slot
from winnow.kernels.triton.device import device, upload
from winnow.kernels.triton.encode import encode
from winnow.kernels.triton.gather import gather
from winnow.kernels.triton.lanes import Ints, Lanes, Source, Targets, check_pages, ints, upload_together

SCRATCH_BYTES = 256 << 20
"""Dense memory that a repack takes, unless one lane needs more"""


def read_lanes(kv: PagedKV, slot: int, layer: int) -> tuple[Tensor, Tensor]:
    check_layer(kv, layer)
    lanes = Lanes.of(kv, slot, slice(layer, layer + 1))
    kept = lanes.tokens[3]
    keys, values = torch.zeros((2, len(kept), int(kept.max()), kv.layout.head_dim), device=device()).unbind()
    if kept.any():
        source = Source.of(kv, lanes, kept, np.zeros_like(kept))
        _gather(kv, source, upload_together(source.arrays), None, keys, values, 0)
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
    """`positions` are for formats that this backend does not have."""
    check_slot(kv, slot)
    check_layer(kv, layer)
    heads, dim = kv.table.shape[2], kv.layout.head_dim
    if keys.shape != values.shape or keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (heads, dim):
        raise ValueError(f"keys {list(keys.shape)} and values {list(values.shape)} do not fit {heads} lanes of {dim}")
    if keys.dtype != torch.float32 or values.dtype != torch.float32:
        raise ValueError(f"keys and values must be f32, not {keys.dtype} and {values.dtype}")
    if positions is not None and positions.shape != keys.shape[:2]:
        raise ValueError(f"positions {list(positions.shape)} do not fit keys {list(keys.shape)}")
    _check_shapes((heads,), dst_table, counts=counts, start=start, dst_sealed=dst_sealed)
    count = ints(counts)
    if count.min() < 0 or count.max() > keys.shape[1]:
        raise ValueError(f"from {count.min()} to {count.max()} tokens, but {keys.shape[1]} are given")
    targets = Targets.of(kv, count, dst_table.numpy(), [(ints(start), ints(dst_sealed), fmt)])
    _encode(kv, targets, upload_together(targets.arrays), keys.contiguous(), values.contiguous(), 0)


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
    targets = Targets.of(kv, count, dst_table.flatten(0, 1).numpy(), parts)
    if count.any():
        _move(kv, Source.of(kv, lanes, count, stay, int(first.min())), targets, keep)


def copy_pages(kv: PagedKV, src: Tensor, dst: Tensor) -> None:
    if src.shape != dst.shape:
        raise ValueError(f"{list(src.shape)} pages cannot be copied to {list(dst.shape)}")
    check_pages(src.numpy(), len(kv.data))
    check_pages(dst.numpy(), len(kv.data))
    if not len(src):
        return
    words = kv.data.view(torch.int64)
    words.index_copy_(0, upload(dst.long()), words.index_select(0, upload(src.long())))


def _move(kv: PagedKV, source: Source, targets: Targets, keep: Tensor | None) -> None:
    """Gathers tokens and writes them, one group of lanes after the other."""
    dim, (lanes, most) = kv.layout.head_dim, (len(source.counts), int(source.counts.max()))
    uploaded = upload_together([*source.arrays, *targets.arrays])
    # Numbers that are bf16 in all of their pages need no more on their way.
    is_narrow = all(fmt is PageFormat.BF16 for fmt in source.present.values())
    dtype = torch.bfloat16 if is_narrow else torch.float32
    room = -(-most // 16) * 16
    group = min(lanes, max(1, SCRATCH_BYTES // (2 * room * dim * dtype.itemsize)))
    # Keys are channel-major, as pages store them; values are not.
    keys = torch.empty((group, dim, room), dtype=dtype, device=device()).transpose(1, 2)
    values = torch.empty((group, room, dim), dtype=dtype, device=device())
    for first in range(0, lanes, group):
        count = min(group, lanes - first)
        _gather(kv, source, uploaded[:2], keep, keys[:count], values[:count], first)
        _encode(kv, targets, uploaded[2:], keys[:count], values[:count], first)


def _gather(
    kv: PagedKV,
    source: Source,
    uploaded: Sequence[Tensor],
    keep: Tensor | None,
    keys: Tensor,
    values: Tensor,
    first: int,
) -> None:
    """Reads tokens of the lanes from `first` on."""
    (where, table), width = uploaded, source.table.shape[1]
    count = int(source.counts[first : first + len(keys)].max())
    for part, fmt in source.present.items() if count else ():
        gather(kv.data, kv.layout, fmt, part, where, table, width, keep, keys, values, first, count)


def _encode(
    kv: PagedKV, targets: Targets, uploaded: Sequence[Tensor], keys: Tensor, values: Tensor, first: int
) -> None:
    """Writes tokens of the lanes from `first` on."""
    (tokens, table), width = uploaded, targets.table.shape[1]
    parts = len(targets.formats)
    most = targets.tokens[2, :, first : first + len(keys)].max(1).tolist()
    for part, (fmt, count) in enumerate(zip(targets.formats, most, strict=True)):
        if count:
            encode(kv.data, kv.layout, fmt, part, parts, tokens, table, width, keys, values, first, count)


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
    count, first, last = upload(torch.from_numpy(np.stack([counts, stay, kept]))).unsqueeze(-1)
    is_listed = torch.arange(keep.shape[1], device=keep.device) < count
    is_wrong = (keep < first) | (keep >= last)
    if ascending:
        is_wrong[:, 1:] |= keep[:, 1:] <= keep[:, :-1]
    if (is_wrong & is_listed).any():
        order = " and ascend" if ascending else ""
        raise IndexError(f"tokens to keep must lie behind those that stay, within their lanes{order}")
    return keep


def _check_shapes(lanes: tuple[int, ...], table: Tensor, **numbers: Tensor) -> None:
    for name, part in numbers.items():
        if tuple(part.shape) != lanes:
            raise ValueError(f"{name} must be {list(lanes)}, not {list(part.shape)}")
    if table.dim() != len(lanes) + 1 or tuple(table.shape[:-1]) != lanes:
        raise ValueError(f"a table {list(table.shape)} does not fit lanes {list(lanes)}")
