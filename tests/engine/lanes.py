"""What the lanes of a request hold once some tokens are generated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from winnow.kernels.dispatch import backend

from ..models.checkpoints import prompt_of
from .bench import Bench

TOKENS = 420
"""Of the prompt"""


def lanes_after(
    bench: Bench, plan: dict[str, Any], new: int = 1
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Keys and values of all layers when `new` tokens are generated, and the tables of the sequence."""
    name = f"request {len(bench.seen)}"
    bench.submit(name, prompt_of(TOKENS, 5), new + 1, plan)
    while not bench.running or bench.sequence(name).computed < TOKENS + new - 1:
        bench.step()
    kv, slot = bench.engine.arena.kv, bench.sequence(name).slot
    read = [backend("cpu").read_lanes(kv, slot, layer) for layer in range(kv.table.shape[1])]
    tables = {name: getattr(kv, name)[slot].clone() for name in ("kept", "sealed", "rest", "table")}
    if slot in kv.positions:
        tables["positions"] = kv.positions[slot].clone().long()
    bench.run()
    return read, tables
