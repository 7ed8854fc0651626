"""What the newest queries of a prompt put into each channel, for a format that keeps the channels of most weight.

q = a query head of a row whose position is in the window, after RoPE
sums[kv head] += q²      for one row after the other, and in each for one head of the group after the other, in float64,
                         where q² is exact
"""

from __future__ import annotations

from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.reference.lanes import sequences


def query_energy(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int) -> None:
    """q [T, Hq, D], as `rope_write` returns it; adds to `kv.energy`."""
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    if q.dim() != 3 or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"q {list(q.shape)} is not [T, heads, {dim}] for {kv_heads} KV heads")
    for sequence in sequences(batch, kv, layer, q.shape[0]):
        if (energy := kv.energy.get(sequence.slot)) is None:
            continue
        positions = batch.positions[sequence.rows]
        window = (positions >= energy.first) & (positions < energy.last)
        rows = sequence.rows.start + window.nonzero()[:, 0]
        for row in q[rows.to(q.device)].double().square().unflatten(1, (kv_heads, -1)):
            for head in row.unbind(1):
                energy.sums[layer] += head
