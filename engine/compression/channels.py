"""Which channels of a lane's keys stay, for ThinK (Xu et al., 2024, arXiv:2407.21018).

    score(c) = ‖Q_c K_cᵀ‖ = ‖Q_c‖ ‖K_c‖      Q_c [W]: channel c of the last W queries of the prompt, or of its
                                            document, of all query heads of the lane; K_c: of the lane's keys

both after RoPE. The product of a column and a row has rank one, so that its Frobenius norm is that of the factors.
Chosen once, when the prompt has been read and nothing of it evicted yet: the highest scores, of equal ones the lower
channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.formats.think import THINK
from winnow.kernels.kv import PagedKV

WINDOW = 32
"""Queries at the end of the prompt that choose"""


def choose_channels(ops: Backend, kv: PagedKV, slot: int) -> Tensor:
    """[layers, kv_heads, head_dim] uint8: 1 for channels that stay."""
    energy, count = kv.energy[slot].sums, THINK.channels(kv.layout.head_dim)
    stays = torch.zeros(energy.shape, dtype=torch.uint8, device=kv.device)
    for layer in range(len(energy)):
        keys, _ = ops.read_lanes(kv, slot, layer)  # zeros beyond a lane's kept length
        scores = energy[layer] * keys.double().square().sum(1)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        stays[layer].scatter_(-1, best, 1)
    return stays
