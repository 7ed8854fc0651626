"""Attention of a step's rows over what their lanes keep.

    row r of a sequence's R rows, at position p, sees the lane's token j, at position pos(j), if
        j <= kept - R + r                   rows are the newest tokens; none sees a later one
        pos(j) > p - window                 when window > 0
        the row chose it                    when the sequence reads by a rule (reading.py), in layers where it does
    P = softmax over the tokens seen of scale · q·K + w      o = P · V
    mass[j] += Σ P[j]  over the query heads of the lane's group, for one row r >= first_vote after the other,
                       or as kv.votes[slot] says: see kernels/vote.py

pos(j) is kv.positions[slot][layer, head, j], or j itself for a slot without positions; w(j) likewise the token's log
weight, or 0. Computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.reading import ReadMode
from winnow.kernels.reference.lanes import Sequence, lane_part, lane_positions, sequences
from winnow.kernels.reference.pages import read_lane
from winnow.kernels.vote import FAINT, Vote


def attention(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] f32 -> [T, Hq * D] f32; adds to `kv.mass` where rows vote."""
    dim, kv_heads = kv.layout.head_dim, kv.table.shape[2]
    if q.dim() != 3 or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"q {list(q.shape)} is not [T, heads, {dim}] for {kv_heads} KV heads")
    groups = q.double().unflatten(1, (kv_heads, -1))
    out = torch.empty_like(groups)
    for b, sequence in enumerate(sequences(batch, kv, layer, q.shape[0])):
        state = kv.reading.get(sequence.slot)
        chooses = state is not None and int(state.rule.modes[layer]) >= ReadMode.CHOSEN
        positions = batch.positions[sequence.rows].long()
        for head in range(kv_heads):
            keys, values = read_lane(kv, sequence.slot, layer, head)
            seen = _seen(kv, sequence, layer, head, positions, window)
            if chooses:
                seen &= batch.choices[b][:, head, : seen.shape[1]].bool()
            scores = torch.einsum("rgd,nd->rgn", groups[sequence.rows, head], keys.double()) * scale
            if sequence.slot in kv.log_weights:
                scores = scores + lane_part(kv.log_weights[sequence.slot], layer, head, keys.shape[0])
            scores = scores.masked_fill(~seen[:, None], -torch.inf)
            weights = scores.softmax(dim=-1)
            out[sequence.rows, head] = torch.einsum("rgn,nd->rgd", weights, values.double())
            _vote(kv, sequence, layer, head, scores, positions)
    return out.float().flatten(1)


def _seen(kv: PagedKV, sequence: Sequence, layer: int, head: int, positions: Tensor, window: int) -> Tensor:
    """[rows, kept] bool"""
    kept = int(kv.kept[sequence.slot, layer, head])
    index = torch.arange(kept)
    seen = index <= (kept - sequence.count + torch.arange(sequence.count))[:, None]
    if window > 0:
        seen &= lane_positions(kv, sequence.slot, layer, head) > positions[:, None] - window
    return seen


def _vote(kv: PagedKV, sequence: Sequence, layer: int, head: int, scores: Tensor, positions: Tensor) -> None:
    """scores [rows, group, kept], positions [rows]; a slot without mass has no vote."""
    if sequence.slot not in kv.mass:
        return
    vote = kv.votes.get(sequence.slot, Vote())
    mass = lane_part(kv.mass[sequence.slot], layer, head, scores.shape[2])
    scores, positions = scores[sequence.first_vote :], positions[sequence.first_vote :]
    if vote.is_noisy:
        scores = scores + lane_part(kv.noise[sequence.slot], layer, head, scores.shape[2]).double()
    heat = vote.temperature + vote.heating * (positions - vote.warm_from).clamp_min(0).double()
    weights = (scores / heat[:, None, None]).softmax(dim=-1)
    # Row after row, as a prompt cut into chunks adds them: the bits do not depend on the cut.
    for row in weights:
        if vote.reduce == "max":
            torch.maximum(mass, row.amax(dim=0).float(), out=mass)
            continue
        if vote.decay != 1:
            mass *= vote.decay
            mass[mass < FAINT] = 0
        mass += row.sum(dim=0).float()
