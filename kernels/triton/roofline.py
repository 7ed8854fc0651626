"""How fast decode could be: what it must move and multiply, over what GPUs are published to reach.

Nothing here is measured. Every byte is counted once: pages as their layout says, queries and results of each row.
"""

from __future__ import annotations

from dataclasses import dataclass

from winnow.kernels.layout import PageFormat, PageLayout


@dataclass(frozen=True)
class Gpu:
    name: str
    bytes_per_s: float
    """of its memory"""
    flops: float
    """bf16 on tensor cores, dense, a second"""


GPUS = (
    Gpu("A100 80 GB SXM", 2.039e12, 312e12),
    Gpu("H100 SXM", 3.35e12, 989e12),
    Gpu("H200 SXM", 4.8e12, 989e12),
    Gpu("B200 SXM", 8.0e12, 2250e12),
)
"""From NVIDIA's data sheets"""


@dataclass(frozen=True)
class Decode:
    """Attention of one layer over `batch` sequences that have `context` tokens in each lane, a row each."""

    layout: PageLayout
    q_heads: int
    kv_heads: int
    fmt: PageFormat
    """of full pages; what does not fill one is in the compute format"""
    batch: int
    context: int

    @property
    def lane_bytes(self) -> int:
        """Bytes of a lane's pages that hold something."""
        full, over = divmod(self.context, self.layout.capacity(self.fmt))
        return full * self.layout.offsets(self.fmt).end + over * self.layout.token_bytes(self.layout.compute)

    @property
    def bytes(self) -> int:
        number = self.layout.compute.bits // 8
        rows = 2 * self.batch * self.q_heads * self.layout.head_dim * number
        return self.batch * self.kv_heads * self.lane_bytes + rows

    @property
    def flops(self) -> int:
        """Two products, of queries with keys and of shares with values."""
        return 4 * self.batch * self.q_heads * self.layout.head_dim * self.context

    def seconds(self, gpu: Gpu) -> float:
        return max(self.bytes / gpu.bytes_per_s, self.flops / gpu.flops)
