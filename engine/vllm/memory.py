"""What sequences hold in vLLM's blocks, counted by its own formulas. Nothing here imports vllm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

import torch

from winnow.engine.messages import CompressionReport


class Spec(Protocol):
    """vLLM's description of the cache of one layer on one worker."""

    block_size: int
    dtype: torch.dtype

    @property
    def page_size_bytes(self) -> int: ...

    def max_memory_usage_bytes(self, vllm_config: Any) -> int: ...


class BlockMemory:
    """The caches of all layers on all workers."""

    def __init__(self, specs: Iterable[Spec], vllm_config: Any, dtype: torch.dtype, label: str):
        """
        Args
            vllm_config: of the engine, which a layer's largest size depends on
            dtype: what the model computes in
            label: what plans call the format of keys and values
        """
        self._layers = Counter(
            (
                spec.block_size,
                spec.page_size_bytes,
                spec.max_memory_usage_bytes(vllm_config),
                max(1.0, dtype.itemsize / spec.dtype.itemsize),
            )
            for spec in specs
        )
        self._label = label

    @property
    def block_bytes(self) -> int:
        """Of one block of every layer."""
        return sum(layers * page for (_, page, _, _), layers in self._layers.items())

    def report(self, tokens: int, dropped: int = 0) -> CompressionReport:
        """What a sequence of so many tokens holds, and would if blocks were in the format that the model computes in.

        Nothing is evicted; `dropped` tokens of videos were never held. A layer with a window, or with a state instead
        of keys and values, holds its most at most.
        """
        held, full = 0, 0.0
        for (block, page, most, shrink), layers in self._layers.items():
            held += layers * min(-(-tokens // block) * page, most)
            full += layers * min(-(-(tokens + dropped) // block) * page, most) * shrink
        return CompressionReport(
            tokens_seen=tokens + dropped,
            tokens_kept_min=tokens,
            tokens_kept_mean=tokens,
            tokens_kept_max=tokens,
            bytes_uncompressed=round(full),
            bytes_held=held,
            tokens_by_format={self._label: tokens},
        )
