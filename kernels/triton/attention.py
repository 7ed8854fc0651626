"""Attention of a step's rows over what their lanes keep (the formula is in kernels/reference/attention.py).

Sequences with few rows (decode) share each part of a lane among programs, whose results `merge` puts together; those
with many (chunks) have a program for each block of rows, which goes through the parts of the lane one after the other.

Scales are applied to codes where these become numbers. Folded into queries and weights they would spare an instruction
for two codes, but cost sums across warps and trips through shared memory in every page, which takes longer on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.attend import CODES, FLOATS, GATHER, OPEN, REST, SEALED, attend
from winnow.kernels.triton.codes import halves
from winnow.kernels.triton.config import LEAST_TOKENS, LSE_REGISTERS, SPLITS, Tile, attend_registers, attend_tile
from winnow.kernels.triton.device import architecture, upload
from winnow.kernels.triton.merge import merge
from winnow.kernels.triton.step import DeviceBatch, device_batch
from winnow.kernels.triton.tiles import padded
from winnow.kernels.triton.votes import add_votes

HAS_FP8 = 89
"""The first architecture that converts fp8 by itself"""


@dataclass(frozen=True, slots=True)
class Work:
    """How a step's rows are shared out among programs; kept as `DeviceBatch.work`."""

    has_few: bool
    """Whether sequences have rows that go through decode"""
    has_many: bool
    """And through chunks"""
    many: NDArray[np.int32]
    """[B] rows of those, 0 for the others"""
    found: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, cu_rows: Tensor, few: int) -> Work:
        """Sequences with no more than `few` rows go through decode."""
        counts = np.diff(cu_rows.numpy())
        is_many = counts > few
        return cls(bool(((counts > 0) & ~is_many).any()), bool(is_many.any()), np.where(is_many, counts, 0))

    def blocks(self, rows: int) -> Tensor:
        """Of chunks, on the device, [n, 2] int32: b and first row of each block of `rows` rows."""
        if rows not in self.found:
            many = -(-self.many // rows)
            b = np.repeat(np.arange(len(many)), many)
            first = np.arange(len(b)) - (many.cumsum() - many)[b]
            # Those that see most begin first, and those that see least fill what the others leave.
            blocks = np.stack([b, first * rows], 1)[::-1].astype(np.int32)
            self.found[rows] = upload(torch.from_numpy(blocks))
        return self.found[rows]


def attention(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] f32, bf16 or f16 -> [T, Hq * D], of q's type; adds to `kv.mass` where rows vote."""
    heads = kv.table.shape[2]
    dim = kv.layout.head_dim
    if q.dim() != 3 or q.shape[2] != dim or q.shape[1] % heads or len(q) != len(batch.positions):
        raise ValueError(f"q {list(q.shape)} is not [{len(batch.positions)}, heads, {dim}] for {heads} KV heads")
    native, q, group = device_batch(batch, kv, layer), q.contiguous(), q.shape[1] // heads
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if native.voting.rows else None
    tile = attend_tile(True, group, dim, q.dtype == torch.float32, kv.layout.compute)
    few = tile.M // group
    if few not in native.work:  # once a step, for all layers
        native.work[few] = Work.of(batch.cu_rows, few)
    work, shared = native.work[few], _arguments(native, kv, layer, scale, window, group)
    if work.has_few:
        _decode(q, out, lse, native, kv, tile, min(native.most_rows, few), shared)
    if work.has_many:
        _chunks(q, out, lse, native, kv, work, shared)
    if lse is not None:
        add_votes(q, lse, batch, kv, layer, scale, window)
    return out.flatten(1)


def _decode(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    native: DeviceBatch,
    kv: PagedKV,
    tile: Tile,
    most_rows: int,
    shared: dict[str, Any],
) -> None:
    heads, width = kv.table.shape[2:]
    parts = _parts(native, kv.layout.compute)
    most_tokens = width * max(kv.layout.capacity(fmt) for _, fmt in parts)
    splits = min(SPLITS, max(1, triton.cdiv(most_tokens, LEAST_TOKENS)))
    columns = list(dict.fromkeys(part for part, _ in parts))
    slots_of_row = len(columns) * splits
    partial = q.new_empty(native.size * most_rows, q.shape[1], slots_of_row, q.shape[2], dtype=torch.float32)
    partial_lse = q.new_empty(partial.shape[:-1], dtype=torch.float32)
    for part, fmt in parts:
        attend[(splits, heads, native.size)](
            q,
            partial,
            partial_lse,
            None,
            None,
            blocks=None,
            most_rows=most_rows,
            slot=columns.index(part) * splits,
            slots_of_row=slots_of_row,
            IS_DECODE=True,
            SPLITS=SPLITS,
            **_of_part(native, kv, part, fmt, tile, q.dtype == torch.float32, True, shared),
            **shared,
        )
    merge[(native.size * most_rows, q.shape[1])](
        partial,
        partial_lse,
        out,
        lse,
        native.cu_rows,
        most_rows,
        len(columns),
        splits,
        D=q.shape[2],
        HEADS=q.shape[1],
        ROWS=tile.M // shared["GROUP"],
        SPLITS=SPLITS,
        maxnreg=None if lse is None else LSE_REGISTERS,
    )


def _chunks(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    native: DeviceBatch,
    kv: PagedKV,
    work: Work,
    shared: dict[str, Any],
) -> None:
    is_f32 = q.dtype == torch.float32
    parts = _parts(native, kv.layout.compute)
    before = before_lse = None
    if len(parts) > 1:
        before = torch.empty_like(q, dtype=torch.float32)
        before_lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for part, fmt in parts:
        is_last = part == int(OPEN)
        tile = attend_tile(False, shared["GROUP"], q.shape[2], is_f32, fmt)
        blocks = work.blocks(tile.M // shared["GROUP"])
        attend[(len(blocks), kv.table.shape[2])](
            q,
            out if is_last else before,
            lse if is_last else before_lse,
            before,
            before_lse,
            blocks=blocks,
            most_rows=0,
            slot=0,
            slots_of_row=1,
            IS_DECODE=False,
            SPLITS=1,
            **_of_part(native, kv, part, fmt, tile, is_f32, False, shared),
            **shared,
        )


def _parts(native: DeviceBatch, compute: PageFormat) -> list[tuple[int, PageFormat]]:
    """Every part and format that lanes of the step have, in the order of the parts."""
    sealed = [(int(SEALED), fmt) for fmt in sorted(native.sealed_formats)]
    return [*sealed, *((int(REST), fmt) for fmt in sorted(native.rest_formats)), (int(OPEN), compute)]


def _of_part(
    native: DeviceBatch,
    kv: PagedKV,
    part: int,
    fmt: PageFormat,
    tile: Tile,
    is_f32: bool,
    is_decode: bool,
    shared: dict[str, Any],
) -> dict[str, Any]:
    capacity, slots, has_fp8 = kv.layout.capacity(fmt), tile.N, architecture() >= HAS_FP8
    path, tokens = GATHER, slots
    if not fmt.is_quantized:
        if 2 * capacity == slots or capacity % slots == 0:
            path = FLOATS
    elif not is_f32 and (fmt in (PageFormat.INT8, PageFormat.INT4) or (fmt is PageFormat.FP8 and has_fp8)):
        of_page = padded(capacity // halves(fmt))
        # What eight warps read ahead of an int4 page of 64 channels, 8 bytes a thread, came out wrong on an H100.
        is_thin = fmt is PageFormat.INT4 and kv.layout.head_dim <= 64 and tile.num_warps > 4
        if of_page <= 128 and not is_thin:
            path, slots, tokens = CODES, of_page, capacity
    return {
        "formats": native.rest_format if part == int(REST) else native.sealed_format,
        "PART": part,
        "FORMAT": int(fmt),
        "C": capacity,
        "M": tile.M,
        "N": slots,
        "T": tokens,
        "LEAST": triton.cdiv(LEAST_TOKENS, tokens),
        "PATH": int(path),
        "num_warps": tile.num_warps,
        # Fused or not, by what else a variant computes: a row's bits would depend on what its batch mates have.
        "enable_fp_fusion": False,
        "maxnreg": attend_registers(
            is_decode, path == CODES, kv.layout.head_dim, is_f32, fmt, shared["WINDOWED"], shared["choices"] is not None
        ),
        # A page of codes takes long enough to compute with that one more on its way is enough.
        "num_stages": min(tile.num_stages, 2) if path == CODES else tile.num_stages,
    }


def _arguments(native: DeviceBatch, kv: PagedKV, layer: int, scale: float, window: int, group: int) -> dict[str, Any]:
    """What all launches of a call are given, by name of the parameters of `attend`."""
    _, layers, heads, width = kv.table.shape
    sides = native.sides
    positions, weights = (sides.get(name, (None, None)) for name in ("positions", "log_weights"))
    choices = sides.get("choices", (None, None))
    return {
        "data": kv.data,
        "table": native.table,
        "slots": native.slots,
        "cu_rows": native.cu_rows,
        "positions": native.positions,
        "kept": native.kept,
        "sealed": native.sealed,
        "rest": native.rest,
        "open_tokens": native.open_tokens,
        "lane_positions": positions[0] if window > 0 else None,
        "position_tokens": positions[1] if window > 0 else None,
        "log_weights": weights[0],
        "weight_tokens": weights[1],
        "choices": choices[0],
        "choice_tokens": choices[1],
        "modes": None if native.modes is None else native.modes[layer],
        "layer": layer,
        "layers": layers,
        "width": width,
        "scale": scale,
        "window": window,
        "PAGE_BYTES": kv.layout.page_bytes,
        "D": kv.layout.head_dim,
        "HEADS": heads,
        "GROUP": group,
        "WINDOWED": window > 0,
    }
