"""The operations every backend has, and the one place that chooses a backend.

A backend is a package with functions of these names: `winnow.kernels.reference` (torch, exact), `winnow.kernels.cpu`
(C++) and `winnow.kernels.triton` (GPU). On the CPU a row's result has the same bits alone and among any batch mates,
and however its prompt was cut into chunks; on the GPU the kernels over pages keep the first half of that.

Activations have the dtype that `embed` gives them: f32 on the CPU, that of the weights on the GPU. Pages, side state
and activations are on the backend's device, tables and batches in host memory.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV, Rest
from winnow.kernels.layout import PageFormat

BackendName = Literal["cpu", "reference", "triton"]
WeightKind = Literal["f32", "int8", "bf16", "f16", "fp8"]

_MODULES: dict[str, str] = {
    "cpu": "winnow.kernels.cpu",
    "reference": "winnow.kernels.reference",
    "triton": "winnow.kernels.triton",
}


class Weight(Protocol):
    """A packed matrix, opaque but for its sizes. Only the backend that packed it can read it."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def kind(self) -> WeightKind: ...
    @property
    def nbytes(self) -> int: ...


class Backend(Protocol):
    """Shapes: T rows of a step, B sequences, Hq query heads, Hkv KV heads, D head dimension, L layers."""

    def device(self) -> torch.device:
        """Where pages, weights and activations are."""

    def page_formats(self) -> tuple[PageFormat, ...]:
        """Page formats that it reads and writes, in the order of their values."""

    def pack(self, weight: Tensor, kind: WeightKind, bias: Tensor | None = None) -> Weight:
        """Packs `weight` [N, K], f32 or, for those kinds, bf16 or f16, and `bias` [N] f32, for `linear` and `embed`.

        The result shares no memory with them.
        """

    def linear(self, x: Tensor, w: Weight, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
        """x [T, K] contiguous -> [T, N]; with `accumulate`, adds to `out`, which may be f32 whatever x is."""

    def embed(self, tokens: Tensor, w: Weight) -> Tensor:
        """Rows of a packed matrix: tokens [T] int32 -> [T, K] f32.

        Tokens may be in the host's memory, where they are checked, or on the backend's device.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, N] f32, weight [N] f32 -> [T, N] f32."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I] f32 -> [T, I] f32: silu of the first half times the second."""

    def rope_write(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: LaneBatch,
        kv: PagedKV,
        layer: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """qkv [T, (Hq + 2 Hkv) D] f32, cos and sin [P, D/2] f32 -> q [T, Hq, D] f32; writes K and V to pages."""

    def attention(self, q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> Tensor:
        """q [T, Hq, D] f32 -> [T, Hq * D] f32, causal over the kept tokens; adds to `kv.mass` where rows vote."""

    def choose_reads(self, q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> None:
        """Before `attention`: rows of sequences in `kv.reading` choose what they read. q [T, Hq, D] f32."""

    def query_moments(
        self, qkv: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, q_norm: Tensor | None, eps: float
    ) -> None:
        """qkv as for `rope_write`; adds the queries, before RoPE, of the rows that vote to `kv.moments`."""

    def query_energy(self, q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int) -> None:
        """q [T, Hq, D] as `rope_write` returns it; adds the squares of queries in their window to `kv.energy`."""

    def read_lanes(self, kv: PagedKV, slot: int, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence's layer, each [Hkv, n, D] f32; zeros beyond a lane's kept length."""

    def write_lanes(
        self,
        kv: PagedKV,
        slot: int,
        layer: int,
        keys: Tensor,
        values: Tensor,
        counts: Tensor,
        start: Tensor,
        dst_table: Tensor,
        dst_sealed: Tensor,
        fmt: PageFormat,
        positions: Tensor | None = None,
    ) -> None:
        """Writes keys and values [Hkv, n, D] f32 to a sequence's layer from page `start` on, laid out as by `repack`.

        `positions` [Hkv, n] int32, in host memory, say where these tokens stand in the text, for formats that go by it;
        None: where they stand in the lane.

        The first `counts` tokens of each lane are written; `counts`, `start`, `dst_sealed` [Hkv] and `dst_table`
        [Hkv, W] int32 say what they say there. The tables of `kv` are not changed.
        """

    def repack(
        self,
        kv: PagedKV,
        slot: int,
        keep: Tensor | None,
        counts: Tensor,
        start: Tensor,
        dst_table: Tensor,
        dst_sealed: Tensor,
        fmt: PageFormat,
        rest: Rest | None = None,
    ) -> None:
        """Rewrites all lanes of a sequence from page `start` on; `keep` [L, Hkv, K], on the backend's device, and the
        others [L, Hkv(, W)], in host memory, are int32.

        The tokens `keep` (lane indices in their new order, `counts` of them; None: all from page `start` on) go to the
        pages of `dst_table` that do not stay: up to page `dst_sealed` in `fmt`, all full, then those of `rest`, then in
        the compute format. A destination page is fresh, or any of the lane's own that does not stay. The tables of
        `kv` are not changed.
        """

    def nearest_rows(self, x: Tensor, x_counts: Tensor, y: Tensor, y_counts: Tensor) -> tuple[Tensor, Tensor]:
        """For each row of x [lanes, n, D] f32 the row of y [lanes, m, D] f32 of the highest cosine, the first on ties.

        `x_counts` and `y_counts` [lanes] int32 say how many rows there are. Returns index [lanes, n] int32 and cosine
        [lanes, n] f32, -1 and -2 where there is no row.
        """

    def sum_rows(self, x: Tensor, weights: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Sums of x [lanes, n, D] f32 by weights [lanes, n] f32: row i adds to index[i] [lanes, n] int32, to nothing if
        that is negative. Returns sums [lanes, count, D] and the weights' totals [lanes, count], f32."""

    def copy_pages(self, kv: PagedKV, src: Tensor, dst: Tensor) -> None:
        """Copies whole pages: src and dst [n] int32."""


def backend(name: BackendName) -> Backend:
    """The backend of that name, imported when first asked for."""
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}: one of {', '.join(_MODULES)}")
    return cast(Backend, import_module(_MODULES[name]))
