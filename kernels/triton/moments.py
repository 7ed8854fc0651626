"""Moments of the queries before RoPE (the formula is in kernels/reference/moments.py).

A program adds up a block of rows of the outer products of one head, query after query, in float64: how the prompt was
cut into chunks changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.triton.step import device_batch

AHEAD = tl.constexpr(4)
"""Queries that are loaded before the first of them is used"""


def query_moments(qkv: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, q_norm: Tensor | None, eps: float) -> None:
    """qkv [T, (Hq + 2 Hkv) D], as for `rope_write`; adds to `kv.moments` where rows vote."""
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    q_heads = qkv.shape[-1] // dim - 2 * kv_heads
    if qkv.shape != (len(batch.positions), (q_heads + 2 * kv_heads) * dim) or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"qkv {list(qkv.shape)} is not whole heads of {dim} for {kv_heads} KV heads")
    if q_norm is not None and q_norm.shape != (dim,):
        raise ValueError(f"a head norm of shape {list(q_norm.shape)} does not fit {dim} channels")
    for moments in kv.moments.values():
        if moments.shape != (kv.table.shape[1], q_heads, 1 + dim, dim):
            raise ValueError(f"moments {list(moments.shape)} do not fit {q_heads} query heads of {dim}")
    native = device_batch(batch, kv, layer)
    if "moments" not in native.sides:
        return
    columns = triton.next_power_of_2(dim)
    block = 2048 // columns
    _add_moments[(triton.cdiv(columns, block), q_heads, native.size)](
        qkv.contiguous(),
        q_norm,
        eps,
        native.cu_rows,
        native.first_vote,
        native.sides["moments"][0],
        layer,
        q_heads=q_heads,
        kv_heads=kv_heads,
        D=dim,
        COLUMNS=columns,
        BLOCK=block,
    )


@triton.jit(do_not_specialize=["layer"])
def _add_moments(
    qkv: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    cu_rows: tl.tensor,
    first_vote: tl.tensor,
    addresses: tl.tensor,
    layer: tl.tensor,
    q_heads: tl.constexpr,
    kv_heads: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Channels [block * BLOCK, ...) of a head's query times all of its channels."""
    block, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    address = tl.load(addresses + b)
    begin, end = tl.load(cu_rows + b), tl.load(cu_rows + b + 1)
    first = begin + tl.load(first_vote + b)
    if (address == 0) | (first >= end):
        return
    i, j = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = (i < D)[:, None] & (j < D)[None, :]
    own = tl.multiple_of(address.to(tl.pointer_type(tl.float64)), 16) + (layer * q_heads + head).to(tl.int64) * (
        (1 + D) * D
    )
    products = own + D + i[:, None] * D + j[None, :]
    sums = tl.load(own + j, mask=(j < D) & (block == 0), other=0.0)
    total = tl.load(products, mask=inside, other=0.0)
    width: tl.constexpr = (q_heads + 2 * kv_heads) * D
    for start in range(first, end, AHEAD):
        for k in tl.static_range(AHEAD):
            row = start + k
            query = qkv + row.to(tl.int64) * width + head * D
            a = tl.load(query + i, mask=(i < D) & (row < end), other=0.0).to(tl.float32)
            c = tl.load(query + j, mask=(j < D) & (row < end), other=0.0).to(tl.float32)
            if norm is not None:
                scale = 1.0 / tl.sqrt_rn(tl.sum(c * c) / D + eps)
                a = a * scale * tl.load(norm + i, mask=i < D, other=0.0).to(tl.float32)
                c = c * scale * tl.load(norm + j, mask=j < D, other=0.0).to(tl.float32)
            total += a.to(tl.float64)[:, None] * c.to(tl.float64)[None, :]
            sums += c.to(tl.float64)
    tl.store(products, total, mask=inside)
    if block == 0:
        tl.store(own + j, sums, mask=j < D)
