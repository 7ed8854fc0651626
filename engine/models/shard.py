"""One rank's part of a model (see engine/ranks.py).

by rows      q, k, v, gate, up and their biases; embedding and LM head, the last part filled up with zeros
by columns   out and down, whose biases are the first rank's: products of the parts are summed
whole        the norms
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from winnow.engine.errors import ModelError
from winnow.engine.models.config import ModelConfig
from winnow.engine.ranks import Ranks

BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_COLUMNS = ("o_proj", "down_proj")
BY_TOKENS = ("embed_tokens", "lm_head")


class Source(Protocol):
    """`loader.Source`"""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read_into(self, name: str, out: Tensor) -> None: ...


def sharded_config(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The config of each rank's part: heads and widths are its own. ModelError where they cannot be shared out."""
    size = ranks.size
    if config.kv_heads % size:
        raise ModelError(f"tensor_parallel {size} does not divide the model's {config.kv_heads} KV heads")
    if config.intermediate_size % (8 * size):
        wide = config.intermediate_size
        raise ModelError(f"tensor_parallel {size} does not divide the MLP's width of {wide} into multiples of 8")
    return replace(
        config,
        heads=config.heads // size,
        kv_heads=config.kv_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


class Shard:
    """A source of which only a rank's part is read."""

    def __init__(self, source: Source, ranks: Ranks):
        self.path, self.shapes = source.path, source.shapes
        self._source = source
        self._ranks = ranks

    def read_into(self, name: str, out: Tensor) -> None:
        whole = torch.empty(self.shapes[name])
        self._source.read_into(name, whole)
        matrix, kind = name.split(".")[-2:]
        if matrix in BY_ROWS:
            whole = self._ranks.part(whole, 0)
        elif matrix in BY_COLUMNS and kind == "weight":
            whole = self._ranks.part(whole, 1)
        elif matrix in BY_COLUMNS and self._ranks.rank > 0:
            whole = torch.zeros_like(whole)
        elif matrix in BY_TOKENS:
            first = self._ranks.rank * len(out)
            out.zero_()
            whole = whole[first : first + len(out)]
            out = out[: len(whole)]
        out.copy_(whole.to(out.device))
