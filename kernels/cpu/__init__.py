"""The C++ backend: the operations of `winnow.kernels.dispatch.Backend` over the native module `winnow.kernels._cpu`.

This file checks types and shapes and hands over addresses; indices are checked again in C++, where a bad one raises
IndexError before memory is touched. The instruction set (generic, avx2, avx512) is chosen when the module loads;
WINNOW_CPU_TARGET overrides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.kernels import _cpu
from winnow.kernels.cpu.handles import address, native_batch, native_kv
from winnow.kernels.dispatch import WeightKind
from winnow.kernels.formats.think import THINK
from winnow.kernels.host import device as device
from winnow.kernels.host import page_formats as page_formats
from winnow.kernels.kv import LaneBatch, PagedKV, Rest
from winnow.kernels.layout import PageFormat
from winnow.kernels.reference.rows import check_rows, check_sums

_PANEL, _GROUP = 16, 64


@dataclass(slots=True)
class Weight:
    """A matrix in panels of 16 output rows, [panels, cols, 16]: f32, or int8 with a scale for 64 columns of a row."""

    rows: int
    cols: int
    kind: WeightKind
    panels: Tensor
    scale: Tensor | None
    bias: Tensor | None
    native: Any

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.panels, self.scale, self.bias) if t is not None)


def target() -> str:
    """The instruction set in use."""
    return str(_cpu.target())


def use_target(name: str) -> None:
    """Chooses an instruction set for the whole process; ValueError where the machine lacks it."""
    _cpu.use(name)


def set_threads(count: int) -> int:
    """Sets the threads of kernels called from this thread; 0 leaves them. Returns how many there are."""
    return int(_cpu.threads(count))


def pack(weight: Tensor, kind: WeightKind, bias: Tensor | None = None) -> Weight:
    rows, cols = weight.shape
    if cols % 8:
        raise ValueError(f"a matrix needs a multiple of 8 columns, not {cols}")
    weight = _floats(weight)
    panels_n = -(-rows // _PANEL)
    int8 = kind == "int8"
    panels = torch.empty(panels_n * cols * _PANEL, dtype=torch.int8 if int8 else torch.float32)
    scale = torch.empty(panels_n * -(-cols // _GROUP) * _PANEL) if int8 else None
    bias = None if bias is None else _floats(bias)
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {rows} rows")
    _cpu.pack(weight.data_ptr(), rows, cols, int8, panels.data_ptr(), address(scale))
    native = _cpu.Matrix(panels.data_ptr(), address(scale), address(bias), rows, cols, int8)
    return Weight(rows, cols, kind, panels, scale, bias, native)


def linear(x: Tensor, w: Weight, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    count, cols = x.shape
    if cols != w.cols:
        raise ValueError(f"x has {cols} columns, the weight {w.cols}")
    x = _floats(x)
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs an out")
        out = torch.empty((count, w.rows))
    elif out.shape != (count, w.rows) or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous f32 [{count}, {w.rows}]")
    _cpu.linear(w.native, x.data_ptr(), count, out.data_ptr(), accumulate)
    return out


def embed(tokens: Tensor, w: Weight) -> Tensor:
    tokens = _ints(tokens)
    out = torch.empty((tokens.shape[0], w.cols))
    _cpu.embed(w.native, tokens.data_ptr(), tokens.shape[0], out.data_ptr())
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    count, width = x.shape
    if weight.shape != (width,) or width % 8:
        raise ValueError(f"rms_norm needs a weight of {width} numbers, a multiple of 8")
    x, weight = _floats(x), _floats(weight)
    out = torch.empty_like(x)
    _cpu.rms_norm(x.data_ptr(), weight.data_ptr(), eps, count, width, out.data_ptr())
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.shape[1] % 16:
        raise ValueError("silu_mul needs two halves of a multiple of 8 columns")
    gate_up = _floats(gate_up)
    out = torch.empty((count, width))
    _cpu.silu_mul(gate_up.data_ptr(), count, width, out.data_ptr())
    return out


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: LaneBatch,
    kv: PagedKV,
    layer: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    rows = qkv.shape[0]
    q_heads = qkv.shape[1] // dim - 2 * kv_heads
    if qkv.shape[1] != (q_heads + 2 * kv_heads) * dim or q_heads < 1 or cos.shape != sin.shape:
        raise ValueError(f"qkv of shape {tuple(qkv.shape)} does not fit {kv_heads} KV heads of {dim}")
    if rows != batch.positions.shape[0] or cos.shape[1] * 2 != dim:
        raise ValueError("qkv, positions and the rotation tables do not fit each other")
    for norm in (q_norm, k_norm):
        if norm is not None and norm.shape != (dim,):
            raise ValueError(f"a head norm of shape {tuple(norm.shape)} does not fit {dim} channels")
    for tensor in (cos, sin, q_norm, k_norm):
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise ValueError("rotation tables and head norms must be contiguous f32")
    qkv = _floats(qkv)
    q = torch.empty((rows, q_heads, dim))
    _cpu.rope_write(
        native_kv(kv),
        native_batch(batch, kv),
        layer,
        qkv.data_ptr(),
        q_heads,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
        address(q_norm),
        address(k_norm),
        eps,
        q.data_ptr(),
    )
    return q


def attention(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> Tensor:
    rows, q_heads, dim = q.shape
    if rows != batch.positions.shape[0] or dim != kv.layout.head_dim:
        raise ValueError(f"q of shape {tuple(q.shape)} does not fit the batch")
    q = _floats(q)
    out = torch.empty((rows, q_heads * dim))
    native = native_batch(batch, kv)
    votes = bool(kv.mass)
    lse = torch.empty((rows, q_heads)) if votes else None
    _cpu.attention(
        native_kv(kv), native, layer, q.data_ptr(), q_heads, scale, window, out.data_ptr(), address(lse), votes
    )
    return out


def choose_reads(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> None:
    rows, q_heads, dim = q.shape
    if rows != batch.positions.shape[0] or dim != kv.layout.head_dim:
        raise ValueError(f"q of shape {tuple(q.shape)} does not fit the batch")
    q = _floats(q)
    _cpu.choose_reads(native_kv(kv), native_batch(batch, kv), layer, q.data_ptr(), q_heads, scale, window)


def query_moments(qkv: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, q_norm: Tensor | None, eps: float) -> None:
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    q_heads = qkv.shape[1] // dim - 2 * kv_heads
    if qkv.shape != (batch.positions.shape[0], (q_heads + 2 * kv_heads) * dim) or q_heads < 1:
        raise ValueError(f"qkv of shape {tuple(qkv.shape)} does not fit {kv_heads} KV heads of {dim} and the batch")
    if q_norm is not None and q_norm.shape != (dim,):
        raise ValueError(f"a head norm of shape {tuple(q_norm.shape)} does not fit {dim} channels")
    for moments in kv.moments.values():
        if moments.shape != (kv.table.shape[1], q_heads, 1 + dim, dim):
            raise ValueError(f"moments of shape {tuple(moments.shape)} do not fit {q_heads} query heads of {dim}")
    qkv, q_norm = _floats(qkv), None if q_norm is None else _floats(q_norm)
    _cpu.query_moments(native_kv(kv), native_batch(batch, kv), layer, qkv.data_ptr(), q_heads, address(q_norm), eps)


def query_energy(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int) -> None:
    rows, q_heads, dim = q.shape
    if rows != batch.positions.shape[0] or dim != kv.layout.head_dim:
        raise ValueError(f"q of shape {tuple(q.shape)} does not fit the batch")
    for energy in kv.energy.values():
        if energy.sums.shape != (*kv.table.shape[1:3], dim) or energy.sums.dtype != torch.float64:
            raise ValueError(f"sums of shape {tuple(energy.sums.shape)} do not fit the lanes")
    q = _floats(q)
    _cpu.query_energy(native_kv(kv), native_batch(batch, kv), layer, q.data_ptr(), q_heads)


def read_lanes(kv: PagedKV, slot: int, layer: int) -> tuple[Tensor, Tensor]:
    count = int(kv.kept[slot, layer].max())
    shape = (kv.table.shape[2], count, kv.layout.head_dim)
    keys, values = torch.empty(shape), torch.empty(shape)
    _cpu.read_lanes(native_kv(kv), slot, layer, *_positions(kv, slot), count, keys.data_ptr(), values.data_ptr())
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
    heads, dim = kv.table.shape[2], kv.layout.head_dim
    if keys.shape != values.shape or keys.dim() != 3 or (keys.shape[0], keys.shape[2]) != (heads, dim):
        raise ValueError(f"write_lanes: keys {list(keys.shape)} and values {list(values.shape)} do not fit the lanes")
    keys, values = _floats(keys), _floats(values)
    counts, start, dst_table, dst_sealed = _ints(counts), _ints(start), _ints(dst_table), _ints(dst_sealed)
    for tensor in (counts, start, dst_sealed):
        if tuple(tensor.shape) != (heads,):
            raise ValueError(f"write_lanes: a tensor of shape {tuple(tensor.shape)} does not fit {heads} lanes")
    if dst_table.dim() != 2 or dst_table.shape[0] != heads:
        raise ValueError("write_lanes: the table does not fit the lanes")
    if positions is not None and positions.shape != keys.shape[:2]:
        raise ValueError(f"write_lanes: positions {list(positions.shape)} do not fit keys {list(keys.shape)}")
    positions = None if positions is None else _ints(positions)
    _cpu.write_lanes(
        native_kv(kv),
        slot,
        layer,
        keys.shape[1],
        keys.data_ptr(),
        values.data_ptr(),
        address(positions),
        counts.data_ptr(),
        start.data_ptr(),
        dst_table.data_ptr(),
        dst_table.shape[1],
        dst_sealed.data_ptr(),
        int(fmt),
        address(_stays(kv, slot)),
    )


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
    lanes = tuple(kv.table.shape[1:3])
    keep = None if keep is None else _ints(keep)
    counts, start, dst_table, dst_sealed = _ints(counts), _ints(start), _ints(dst_table), _ints(dst_sealed)
    rest_start, rest_pages = (None, None) if rest is None else (_ints(rest.start), _ints(rest.pages))
    for tensor in (counts, start, dst_sealed, *(() if rest is None else (rest.start, rest.pages))):
        if tuple(tensor.shape) != lanes:
            raise ValueError(f"repack: a tensor of shape {tuple(tensor.shape)} does not fit the lanes {lanes}")
    if tuple(dst_table.shape[:2]) != lanes or (keep is not None and tuple(keep.shape[:2]) != lanes):
        raise ValueError("repack: the tables do not fit the lanes")
    merge = None if rest is None else rest.merge
    _cpu.repack(
        native_kv(kv),
        slot,
        address(keep),
        0 if keep is None else keep.shape[2],
        counts.data_ptr(),
        start.data_ptr(),
        dst_table.data_ptr(),
        dst_table.shape[2],
        dst_sealed.data_ptr(),
        int(fmt),
        address(rest_start),
        address(rest_pages),
        int(kv.layout.compute if rest is None else rest.fmt),
        -1 if merge is None else merge.first,
        0.0 if merge is None else merge.t,
        *_positions(kv, slot),
        address(_stays(kv, slot)),
    )


def nearest_rows(x: Tensor, x_counts: Tensor, y: Tensor, y_counts: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x, x_counts, y, y_counts)
    x, y, x_counts, y_counts = _floats(x), _floats(y), _ints(x_counts), _ints(y_counts)
    index, cosine = torch.empty(x.shape[:2], dtype=torch.int32), torch.empty(x.shape[:2])
    _cpu.nearest_rows(
        x.data_ptr(),
        x_counts.data_ptr(),
        y.data_ptr(),
        y_counts.data_ptr(),
        x.shape[0],
        x.shape[1],
        y.shape[1],
        x.shape[2],
        index.data_ptr(),
        cosine.data_ptr(),
    )
    return index, cosine


def sum_rows(x: Tensor, weights: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    check_sums(x, weights, index)
    x, weights, index = _floats(x), _floats(weights), _ints(index)
    sums, totals = torch.zeros(x.shape[0], count, x.shape[2]), torch.zeros(x.shape[0], count)
    _cpu.sum_rows(
        x.data_ptr(),
        weights.data_ptr(),
        index.data_ptr(),
        x.shape[0],
        x.shape[1],
        count,
        x.shape[2],
        sums.data_ptr(),
        totals.data_ptr(),
    )
    return sums, totals


def copy_pages(kv: PagedKV, src: Tensor, dst: Tensor) -> None:
    if src.shape != dst.shape:
        raise ValueError(f"{src.shape[0]} pages cannot be copied to {dst.shape[0]}")
    for pages in (src, dst):
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < len(kv.data):
            raise IndexError("a page to copy lies outside the arena")
    kv.data[dst.long()] = kv.data[src.long()]


def _stays(kv: PagedKV, slot: int) -> Tensor | None:
    """The channels of the slot's keys that stay, checked; None where they were not chosen."""
    if (stays := kv.channels.get(slot)) is None:
        return None
    if stays.shape != (*kv.table.shape[1:3], kv.layout.head_dim) or stays.dtype != torch.uint8:
        raise ValueError(f"channels {list(stays.shape)} do not fit the lanes")
    count = THINK.channels(kv.layout.head_dim)
    if not bool((stays.sum(-1) == count).all()) or not stays.is_contiguous():
        raise ValueError(f"in every lane {count} channels must stay")
    return stays


def _positions(kv: PagedKV, slot: int) -> tuple[int, int]:
    """Address and capacity of those of a slot."""
    positions = kv.positions.get(slot)
    if positions is None:
        return 0, 0
    if positions.shape[:2] != kv.table.shape[1:3] or positions.dtype != torch.int32 or not positions.is_contiguous():
        raise ValueError(f"positions {list(positions.shape)} are not contiguous int32 of the lanes")
    return positions.data_ptr(), positions.shape[2]


def _floats(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        raise ValueError(f"expected f32, not {tensor.dtype}")
    return tensor.contiguous()


def _ints(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()
