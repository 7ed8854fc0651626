"""What the sequences of a step hold beside their pages, by address."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.triton.rules import Voting


def at(side: str) -> str:
    return f"{side} at"


def room(side: str) -> str:
    return f"{side} room"


def sides_of(batch: LaneBatch, kv: PagedKV, voting: Voting) -> dict[str, tuple[Tensor, Tensor]]:
    """Addresses are the device's: side state is made there. What is there for votes counts where there are any.
    IndexError where a part is shorter than a lane."""
    slots = batch.slots.tolist()
    held: dict[str, list[Tensor | None]] = {}
    if batch.choices:
        held["choices"] = [batch.choices.get(b) for b in range(len(slots))]
    for name in (*(("mass", "noise") if voting.rows else ()), "moments", "positions", "log_weights"):
        if side := getattr(kv, name):
            held[name] = [side.get(slot) for slot in slots]
    longest = kv.kept[batch.slots.long()].flatten(1).amax(1).tolist() if held and slots else []
    sides = {}
    for name, parts in held.items():
        if any(part is not None for part in parts):
            addresses = [0 if part is None else part.data_ptr() for part in parts]
            capacities = [0 if part is None else part.shape[-1] for part in parts]
            for part, tokens in zip(parts, longest, strict=True):
                if part is not None and name != "moments" and part.shape[-1] < tokens:
                    raise IndexError(f"{tokens} tokens in a lane, but {name} for {part.shape[-1]}")
            sides[name] = (torch.tensor(addresses), torch.tensor(capacities, dtype=torch.int32))
    return sides
