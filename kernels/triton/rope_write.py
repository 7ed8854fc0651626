"""From the projections to queries in hand and keys and values in pages: see kernels/reference/rope_write.py.

A program has some rows of one head. A row's sums run over its own channels in an order that is the same for all rows of
all steps, so its bits do not depend on company. Rows may be of different sequences: each looks up its own place.
Keys are turned over before they are stored, so that threads side by side write tokens side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.step import device_batch

TYPES = {PageFormat.F32: torch.float32, PageFormat.BF16: torch.bfloat16, PageFormat.F16: torch.float16}
"""Of the compute format's numbers"""
ROWS = 16
"""Rows of a program: in bf16, tokens that lie side by side in a key row fill a sector of memory"""


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
    """qkv [T, (Hq + 2 Hkv) D] f32, bf16 or f16, cos and sin [P, D/2] f32, norms [D] f32 -> q [T, Hq, D] like qkv."""
    (_, layers, kv_heads, width), layout = kv.table.shape, kv.layout
    step, dim = device_batch(batch, kv, layer), layout.head_dim
    if qkv.dim() != 2 or qkv.shape[1] % dim or (qkv.shape[1] // dim - 2 * kv_heads) % kv_heads:
        raise ValueError(f"qkv {list(qkv.shape)} is not whole heads of {dim} for {kv_heads} KV heads")
    if len(qkv) != step.rows:
        raise ValueError(f"qkv has {len(qkv)} rows, the batch {step.rows}")
    if cos.shape != sin.shape or cos.shape[1] != dim // 2:
        raise ValueError(f"cos and sin must be [P, {dim // 2}], not {list(cos.shape)} and {list(sin.shape)}")
    if step.angles_end > len(cos):
        raise IndexError(f"a position is not among the {len(cos)} that cos and sin cover")
    for norm in (q_norm, k_norm):
        if norm is not None and norm.shape != (dim,):
            raise ValueError(f"the norm of a head of {dim} cannot be {list(norm.shape)}")
    heads = qkv.shape[1] // dim
    q = qkv.new_empty(len(qkv), heads - 2 * kv_heads, dim)
    _rope_write[(triton.cdiv(len(qkv), ROWS), heads)](
        qkv.contiguous(), q, cos, sin, q_norm, k_norm, eps,
        kv.data.view(TYPES[layout.compute]),
        step.table, step.slots, step.owners, step.cu_rows, step.angles, step.sealed, step.rest, step.open_tokens,
        len(qkv), layer, layers, width,
        Q_HEADS=heads - 2 * kv_heads, KV_HEADS=kv_heads, D=dim, HALF=triton.next_power_of_2(dim // 2),
        PAGE_TOKENS=layout.page_tokens, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["rows", "layer", "layers", "width"])
def _rope_write(
    qkv: tl.tensor,
    q_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    eps: tl.tensor,
    arena: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    cu_rows: tl.tensor,
    angles: tl.tensor,
    sealed: tl.tensor,
    rest: tl.tensor,
    open_tokens: tl.tensor,
    rows: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    width: tl.tensor,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    is_row = row < rows
    channel = tl.arange(0, HALF)[None, :]
    inside = is_row[:, None] & (channel < D // 2)
    start = qkv + (row.to(tl.int64) * ((Q_HEADS + 2 * KV_HEADS) * D) + head * D)[:, None] + channel
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + D // 2, mask=inside, other=0.0).to(tl.float32)
    angle = tl.load(angles + row, mask=is_row, other=0)[:, None] * (D // 2) + channel
    if head < Q_HEADS:
        first, second = _turned(first, second, cos + angle, sin + angle, inside, channel, q_norm, eps, D)
        out = q_out + (row.to(tl.int64) * (Q_HEADS * D) + head * D)[:, None] + channel
        tl.store(out, first.to(q_out.dtype.element_ty), mask=inside)
        tl.store(out + D // 2, second.to(q_out.dtype.element_ty), mask=inside)
    else:
        kv_head = (head - Q_HEADS) % KV_HEADS
        b = tl.load(owners + row, mask=is_row, other=0)
        lane = (b * layers + layer) * KV_HEADS + kv_head
        index = tl.load(open_tokens + lane, mask=is_row, other=0) - tl.load(cu_rows + b + 1, mask=is_row, other=0) + row
        column = tl.load(sealed + lane, mask=is_row, other=0) + tl.load(rest + lane, mask=is_row, other=0)
        slot = tl.load(slots + b, mask=is_row, other=0).to(tl.int64)
        columns = table + ((slot * layers + layer) * KV_HEADS + kv_head) * width
        page = tl.load(columns + column + index // PAGE_TOKENS, mask=is_row, other=0).to(tl.int64)
        keys = arena + page * (2 * PAGE_TOKENS * D)
        place = index % PAGE_TOKENS
        if head < Q_HEADS + KV_HEADS:
            first, second = _turned(first, second, cos + angle, sin + angle, inside, channel, k_norm, eps, D)
            down = tl.arange(0, HALF)[:, None]
            to_keys = (keys + place)[None, :] + down * PAGE_TOKENS
            within = is_row[None, :] & (down < D // 2)
            tl.store(to_keys, tl.trans(first.to(arena.dtype.element_ty)), mask=within)
            tl.store(to_keys + D // 2 * PAGE_TOKENS, tl.trans(second.to(arena.dtype.element_ty)), mask=within)
        else:
            to_values = (keys + PAGE_TOKENS * D + place * D)[:, None] + channel
            tl.store(to_values, first.to(arena.dtype.element_ty), mask=inside)
            tl.store(to_values + D // 2, second.to(arena.dtype.element_ty), mask=inside)


@triton.jit
def _turned(
    x: tl.tensor,
    y: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    inside: tl.tensor,
    channel: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
) -> tl.tensor:
    """The halves of heads, f32: normalised where there is a norm, and turned."""
    if norm is not None:
        scale = tl.rsqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / D + eps)[:, None]
        x *= scale * tl.load(norm + channel, mask=channel < D // 2, other=0.0)
        y *= scale * tl.load(norm + D // 2 + channel, mask=channel < D // 2, other=0.0)
    c = tl.load(cos, mask=inside, other=0.0)
    s = tl.load(sin, mask=inside, other=0.0)
    return x * c - y * s, y * c + x * s
