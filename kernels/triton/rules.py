"""Who votes in a step, and by which rules (kernels/vote.py), as kernels are told."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.vote import Vote


class Voting(NamedTuple):
    """What kernels are chosen by."""

    rows: int
    """The most of one sequence that add to its mass"""
    has_own_softmax: bool
    """Any of those votes with another softmax than attention's"""


NOBODY = Voting(0, False)


def vote_rules(batch: LaneBatch, kv: PagedKV) -> tuple[Voting, dict[str, Tensor]]:
    """Who votes, and the rules of all sequences under the names that `DeviceBatch` has for them, none if nobody does.

    ValueError for noise that does not fit the mass.
    """
    if not kv.mass:
        return NOBODY, {}
    counts = (batch.cu_rows.diff() - batch.first_vote).clamp_min(0).tolist()
    votes = {
        b: kv.votes.get(slot, Vote())
        for b, (slot, count) in enumerate(zip(batch.slots.tolist(), counts, strict=True))
        if count and slot in kv.mass
    }
    if not votes:
        return NOBODY, {}
    for b, vote in votes.items():
        slot = int(batch.slots[b])
        if vote.is_noisy and ((noise := kv.noise.get(slot)) is None or noise.shape != kv.mass[slot].shape):
            raise ValueError(f"the noise of slot {slot} does not fit its mass {list(kv.mass[slot].shape)}")
    voting = Voting(max(counts[b] for b in votes), not all(vote.is_attention for vote in votes.values()))
    return voting, rules_of([votes.get(b, Vote()) for b in range(len(counts))])


def rules_of(votes: list[Vote]) -> dict[str, Tensor]:
    numbers = [[math.log2(vote.decay), vote.temperature, vote.heating, 0.0] for vote in votes]
    kinds = [[vote.warm_from, vote.reduce == "max", vote.is_noisy, not vote.is_attention] for vote in votes]
    return {
        "vote_numbers": torch.tensor(numbers, dtype=torch.float32).view(-1, 4),
        "vote_kinds": torch.tensor(kinds, dtype=torch.int32).view(-1, 4),
    }
