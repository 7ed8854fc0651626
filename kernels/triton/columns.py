"""The columns of a lane's page table, in kernels: what format each page has, and which token is its first.

Formats of a column are known on the device alone. Kernels are compiled for those that a step has, FORMATS, and run the
part that fits. CAPACITIES holds the tokens of a page of every format, by its number.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.kv import PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.step import DeviceBatch
from winnow.kernels.triton.tiles import BF16, F16, FP8, INT2, INT4, INT8

LANE = tl.constexpr(8)
"""Numbers of a lane: kept, sealed, rest, formats of the sealed and of the rest, slot"""


def pages_of(native: DeviceBatch, kv: PagedKV) -> dict[str, Any]:
    """What kernels over the pages of a step are given of the arena and the lanes, by name of their parameters."""
    layout = kv.layout
    _, layers, heads, width = kv.table.shape
    if native.lanes is None:
        native.lanes = _lanes(native)
    return {
        "data": kv.data,
        "table": native.table,
        "width": width,
        "lanes": native.lanes,
        "page_bytes": layout.page_bytes,
        "layers": layers,
        "heads": heads,
        "D": layout.head_dim,
        "COMPUTE": int(layout.compute),
        "FORMATS": tuple(sorted(int(fmt) for fmt in native.formats | {layout.compute})),
        "CAPACITIES": tuple(layout.capacity(fmt) for fmt in PageFormat),
    }


def _lanes(native: DeviceBatch) -> Tensor:
    """[B, layers, kv_heads, LANE] int32"""
    counts = (native.kept, native.sealed, native.rest)
    of_all = (native.sealed_format, native.rest_format, native.slots, native.slots, native.slots)
    return torch.stack([*counts, *(part[:, None, None].expand_as(native.kept) for part in of_all)], -1)


@triton.jit
def table_row(
    table: tl.tensor,
    width: tl.tensor,
    lane: tl.tensor,
    layer: tl.tensor,
    head: tl.tensor,
    layers: tl.constexpr,
    heads: tl.constexpr,
) -> tl.tensor:
    """Where a lane's page ids are."""
    return table + ((tl.load(lane + 5) * layers + layer) * heads + head).to(tl.int64) * width


@triton.jit
def capacity_of(fmt: tl.tensor, CAPACITIES: tl.constexpr) -> tl.tensor:
    """Tokens of a page of a format that is known on the device."""
    capacity = tl.where(fmt == BF16, CAPACITIES[1], CAPACITIES[0])
    capacity = tl.where(fmt == INT8, CAPACITIES[2], capacity)
    capacity = tl.where(fmt == INT4, CAPACITIES[3], capacity)
    capacity = tl.where(fmt == INT2, CAPACITIES[4], capacity)
    capacity = tl.where(fmt == FP8, CAPACITIES[5], capacity)
    return tl.where(fmt == F16, CAPACITIES[6], capacity)


@triton.jit
def columns_of(lane: tl.tensor, COMPUTE: tl.constexpr, CAPACITIES: tl.constexpr) -> tl.tensor:
    """Pages of a lane."""
    sealed, rest = tl.load(lane + 1), tl.load(lane + 2)
    full = sealed * capacity_of(tl.load(lane + 3), CAPACITIES) + rest * capacity_of(tl.load(lane + 4), CAPACITIES)
    return sealed + rest + tl.cdiv(tl.load(lane) - full, CAPACITIES[COMPUTE])


@triton.jit
def first_token(column: tl.tensor, lane: tl.tensor, COMPUTE: tl.constexpr, CAPACITIES: tl.constexpr) -> tl.tensor:
    """Lane index of a column's first token."""
    sealed, rest = tl.load(lane + 1), tl.load(lane + 2)
    start = tl.minimum(column, sealed) * capacity_of(tl.load(lane + 3), CAPACITIES)
    start += tl.minimum(tl.maximum(column - sealed, 0), rest) * capacity_of(tl.load(lane + 4), CAPACITIES)
    return start + tl.maximum(column - sealed - rest, 0) * CAPACITIES[COMPUTE]


@triton.jit
def column_at(column: tl.tensor, lane: tl.tensor, COMPUTE: tl.constexpr, CAPACITIES: tl.constexpr) -> tl.tensor:
    """Format of the page in a column, and the lane index of its first token."""
    sealed, rest = tl.load(lane + 1), tl.load(lane + 2)
    later = tl.where(column < sealed + rest, tl.load(lane + 4), COMPUTE)
    fmt = tl.where(column < sealed, tl.load(lane + 3), later)
    return fmt, first_token(column, lane, COMPUTE, CAPACITIES)
