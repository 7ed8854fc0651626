"""Attention of a step's rows over what their lanes keep (the formula is in kernels/reference/attention.py).

Sequences with few rows (decode) share each part of a lane among programs, whose results `merge` puts together; those
with many (chunks) have a program for each block of rows, which goes through the parts of the lane one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.attend import CODES, FLOATS, GATHER, OPEN, REST, SEALED, attend
from winnow.kernels.triton.codes import halves
from winnow.kernels.triton.config import LEAST_TOKENS, SPLITS, Tile, attend_tile
from winnow.kernels.triton.device import architecture, upload
from winnow.kernels.triton.merge import merge
from winnow.kernels.triton.step import DeviceBatch, device_batch
from winnow.kernels.triton.tiles import padded
from winnow.kernels.triton.votes import add_votes

CODE_REGISTERS = 128
"""A thread's in decode over pages of codes: four blocks of threads then share a multiprocessor's, and hide each other's
waits. Blackwell's code spills at that"""
HAS_FP8 = 89
"""The first architecture that converts fp8 by itself"""


def attention(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> Tensor:
    """q [T, Hq, D] f32 or bf16 -> [T, Hq * D], of q's type; adds to `kv.mass` where rows vote."""
    heads = kv.table.shape[2]
    dim = kv.layout.head_dim
    if q.dim() != 3 or q.shape[2] != dim or q.shape[1] % heads or len(q) != len(batch.positions):
        raise ValueError(f"q {list(q.shape)} is not [{len(batch.positions)}, heads, {dim}] for {heads} KV heads")
    native, q, group = device_batch(batch, kv, layer), q.contiguous(), q.shape[1] // heads
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32) if "mass" in native.sides else None
    decode, chunk = (attend_tile(is_decode, group, dim, q.dtype == torch.float32) for is_decode in (True, False))
    few, rows = decode.M // group, chunk.M // group
    if (few, rows) not in native.work:  # once a step, for all layers
        native.work[few, rows] = _work(batch.cu_rows, few, rows)
    has_few, blocks = native.work[few, rows]
    shared = _arguments(native, kv, layer, scale, window, group)
    if has_few:
        _decode(q, out, lse, native, kv, decode, min(native.most_rows, few), shared)
    if blocks is not None:
        _chunks(q, out, lse, native, kv, chunk, blocks, shared)
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
            **_of_part(native, kv, part, fmt, tile, q.dtype == torch.float32),
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
    )


def _chunks(
    q: Tensor,
    out: Tensor,
    lse: Tensor | None,
    native: DeviceBatch,
    kv: PagedKV,
    tile: Tile,
    blocks: Tensor,
    shared: dict[str, Any],
) -> None:
    parts = _parts(native, kv.layout.compute)
    before = before_lse = None
    if len(parts) > 1:
        before = torch.empty_like(q, dtype=torch.float32)
        before_lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for part, fmt in parts:
        is_last = part == int(OPEN)
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
            **_of_part(native, kv, part, fmt, tile, q.dtype == torch.float32),
            **shared,
        )


def _work(cu_rows: Tensor, few: int, rows: int) -> tuple[bool, Tensor | None]:
    """Whether sequences have rows, but no more than `few`; and of those that have more, on the device, [n, 2] int32: b
    and first row of each block of `rows` rows. None if there are none."""
    counts = np.diff(cu_rows.numpy())
    has_few = bool(((counts > 0) & (counts <= few)).any())
    many = np.where(counts > few, -(-counts // rows), 0)
    if not many.any():
        return has_few, None
    b = np.repeat(np.arange(len(counts)), many)
    first = np.arange(len(b)) - (many.cumsum() - many)[b]
    # Those that see most begin first, and those that see least fill what the others leave.
    blocks = np.stack([b, first * rows], 1)[::-1].astype(np.int32)
    return has_few, upload(torch.from_numpy(blocks))


def _parts(native: DeviceBatch, compute: PageFormat) -> list[tuple[int, PageFormat]]:
    """Every part and format that lanes of the step have, in the order of the parts."""
    sealed = [(int(SEALED), fmt) for fmt in sorted(native.sealed_formats)]
    return [*sealed, *((int(REST), fmt) for fmt in sorted(native.rest_formats)), (int(OPEN), compute)]


def _of_part(native: DeviceBatch, kv: PagedKV, part: int, fmt: PageFormat, tile: Tile, is_f32: bool) -> dict[str, Any]:
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
        # A page of codes takes long enough to compute with that one more on its way is enough.
        "maxnreg": CODE_REGISTERS if path == CODES and tile.M < 64 and architecture() < 100 else None,
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
