"""The processes that share a model: tensor parallelism (Shoeybi et al., 2019, arXiv:1909.08053).

    each of N ranks has   1/N of the KV heads with their query heads, of the MLP's width, and of the vocabulary;
                          an arena and tables for the lanes of its KV heads
    in a layer            two sums over the ranks: behind attention's `out` and behind the MLP's `down`
    before a choice       what policies look at is gathered from all heads: every rank chooses for all of them, alike,
                          and carries out what concerns its own

Every rank runs the whole engine on the same messages in the same order: the first one reads them from the server and
tells the others before each step. So nothing about sequences is ever sent. What differs between ranks is how long their
lanes are, and so how many pages they hold; whoever decides by pages asks all ranks first (`most`, `any`, `total`), so
that the decision is the same everywhere.

These are plain collectives, not `torch.distributed.tensor.parallel`: that shards modules whose weights are DTensors,
and ours are packed by the kernels. The two sums of a layer are all that it would do.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others: one that died is noticed at once, one that loads a model may take its time"""


class Ranks:
    """One process' place among all. Every method but `part` must be called by all ranks, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, host: Any = None):
        """`host`: the group through which numbers in host memory go; tensors go through the default one."""
        self.rank, self.size, self._host = rank, size, host

    @classmethod
    def join(cls, rank: int, size: int, meeting: str, device: str) -> Ranks:
        """Waits until all have come. `meeting` is a file that no other group has used."""
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=size, timeout=PATIENCE)
        host = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(rank, size, host)

    # Tensors ---------------------------------------------------------------------------------------------------------

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a dimension that is shared out."""
        return x if self.size == 1 else x.chunk(self.size, dim)[self.rank].contiguous()

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks' tensors, in place of this one."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """As `sum`, element by element the greatest."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' tensors, of equal shapes, one behind the other."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    # Numbers in host memory ------------------------------------------------------------------------------------------

    def most(self, number: int) -> int:
        return self._reduced(number, dist.ReduceOp.MAX)

    def least(self, number: int) -> int:
        return self._reduced(number, dist.ReduceOp.MIN)

    def total(self, number: int) -> int:
        return self._reduced(number, dist.ReduceOp.SUM)

    def any(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Where a flag is up at some rank."""
        if self.size == 1 or not len(flags):
            return flags
        there = torch.from_numpy(flags.astype(np.uint8))
        dist.all_reduce(there, dist.ReduceOp.MAX, self._host)
        return there.numpy().astype(bool)

    def tables(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """[size, n] the numbers [n] of each rank."""
        if self.size == 1:
            return numbers[None]
        parts = [torch.empty(len(numbers), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(parts, torch.from_numpy(numbers), self._host)
        return torch.stack(parts).numpy()

    def same(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the first rank; all have as many."""
        if self.size > 1:
            numbers = np.ascontiguousarray(numbers)
            dist.broadcast(torch.from_numpy(numbers), 0, self._host)
        return numbers

    def told(self, data: bytes) -> bytes:
        """What the first rank says."""
        if self.size == 1:
            return data
        (length,) = self.same(np.array([len(data)]))
        if not length:
            return b""
        there = torch.frombuffer(bytearray(data if self.rank == 0 else int(length)), dtype=torch.uint8)
        dist.broadcast(there, 0, self._host)
        return there.numpy().tobytes()

    def _reduced(self, number: int, how: Any) -> int:
        if self.size == 1:
            return number
        there = torch.tensor([number])
        dist.all_reduce(there, how, self._host)
        return int(there)


ALONE = Ranks()
"""A model that one process has to itself"""
