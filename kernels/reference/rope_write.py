"""From the projections to queries in hand and keys and values in pages.

q, k    (per head) rms_norm, if the model has it
x1, x2  first and second half of a head, p its position, or where the batch says so another row of the tables
        y1 = x1·cos[p] - x2·sin[p]      y2 = x2·cos[p] + x1·sin[p]
k, v    to the lane's page in the compute format, rounded to nearest even
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.reference.codec import as_float, float_views
from winnow.kernels.reference.lanes import newest, sequences
from winnow.kernels.reference.norm import rms_norm


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
    """qkv [T, (Hq + 2 Hkv) D] f32, cos and sin [P, D/2] f32, norms [D] f32 -> q [T, Hq, D] f32."""
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    if qkv.dim() != 2 or qkv.shape[1] % dim or (qkv.shape[1] // dim - 2 * kv_heads) % kv_heads:
        raise ValueError(f"qkv {list(qkv.shape)} is not whole heads of {dim} for {kv_heads} KV heads")
    if cos.shape != sin.shape or cos.shape[1] != dim // 2:
        raise ValueError(f"cos and sin must be [P, {dim // 2}], not {list(cos.shape)} and {list(sin.shape)}")
    step = list(sequences(batch, kv, layer, qkv.shape[0]))
    angles = batch.turned_by.long()
    if angles.shape != batch.positions.shape:
        raise ValueError(f"{len(angles)} angles do not fit {len(batch.positions)} rows")
    if angles.numel() and not 0 <= int(angles.min()) <= int(angles.max()) < cos.shape[0]:
        raise IndexError(f"a position is not among the {cos.shape[0]} that cos and sin cover")
    heads = qkv.unflatten(1, (-1, dim))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    q = _rotate(q if q_norm is None else rms_norm(q, q_norm, eps), cos[angles], sin[angles])
    k = _rotate(k if k_norm is None else rms_norm(k, k_norm, eps), cos[angles], sin[angles])

    keys, values = float_views(kv.data, kv.layout, kv.layout.compute)
    for sequence in step:
        pages, places = newest(kv, sequence.slot, layer, sequence.count)
        keys[pages, :, places] = as_float(k[sequence.rows], kv.layout.compute)
        values[pages, places] = as_float(v[sequence.rows], kv.layout.compute)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D], cos and sin [T, D/2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
