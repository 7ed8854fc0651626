"""Moments of the queries before RoPE, for policies that foresee what later queries will look at.

q = rms_norm, if the model has it, of a voting row's query head
moments[head] += [ q ; q qᵀ ]      for one row r >= first_vote after the other, in float64, where q qᵀ is exact
"""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.reference.lanes import sequences
from winnow.kernels.reference.norm import rms_norm


def query_moments(qkv: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, q_norm: Tensor | None, eps: float) -> None:
    """qkv [T, (Hq + 2 Hkv) D] f32, as for `rope_write`; adds to `kv.moments` where rows vote."""
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    if qkv.dim() != 2 or qkv.shape[1] % dim or (qkv.shape[1] // dim - 2 * kv_heads) % kv_heads:
        raise ValueError(f"qkv {list(qkv.shape)} is not whole heads of {dim} for {kv_heads} KV heads")
    queries = qkv.unflatten(1, (-1, dim))[:, : -2 * kv_heads]
    for sequence in sequences(batch, kv, layer, qkv.shape[0]):
        if sequence.slot not in kv.moments:
            continue
        moments = kv.moments[sequence.slot][layer]
        if moments.shape != (queries.shape[1], 1 + dim, dim):
            raise ValueError(f"moments {list(moments.shape)} do not fit {queries.shape[1]} query heads of {dim}")
        voting = queries[sequence.rows][sequence.first_vote :]
        for row in (voting if q_norm is None else rms_norm(voting, q_norm, eps)).double():
            moments[:, 0] += row
            moments[:, 1:] += row[:, :, None] * row[:, None, :]
