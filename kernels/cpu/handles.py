"""What the native module is given of an arena and of a step: addresses, bound once and kept with their owner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels import _cpu
from winnow.kernels.cpu.reading import set_reading
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.vote import Vote


def native_kv(kv: PagedKV) -> Any:
    """The arena's addresses, bound again where the engine has replaced a table."""
    tables = (kv.table, kv.kept, kv.sealed, kv.formats, kv.rest, kv.rest_formats)
    table, kept, sealed, formats, rest, rest_formats = (tensor.data_ptr() for tensor in tables)
    key = (table, kept, sealed, formats, rest, rest_formats, kv.data.data_ptr(), kv.table.shape)
    if kv.native is None or kv.native[0] != key:
        layout = kv.layout
        shapes = [[0] * 8] * (1 + max(PageFormat))  # of no capacity where no format has the number
        for fmt in PageFormat:
            o = layout.offsets(fmt)
            blocks = [layout.key_block(fmt), layout.value_block(fmt)]
            if fmt.is_opened:
                shapes[fmt] = [layout.capacity(fmt), *blocks, o.values, 0, 0, 0, 0, *o.parts]
            else:
                shapes[fmt] = [layout.capacity(fmt), *blocks, o.values, o.k_scale, o.k_zero, o.v_scale, o.v_zero]
        handle = _cpu.KV(
            kv.data.data_ptr(), kv.data.shape[0], layout.page_bytes, layout.head_dim, int(layout.compute), shapes
        )
        for tensor in (kv.table, kv.kept, kv.sealed, kv.rest):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError("lane tables must be contiguous int32")
        slots, layers, heads, width = kv.table.shape
        handle.bind(table, kept, sealed, formats, rest, rest_formats, slots, layers, heads, width)
        _set_bases(handle, kv)
        kv.native = (key, handle)
    return kv.native[1]


def _set_bases(handle: Any, kv: PagedKV) -> None:
    layout, (layers, heads) = kv.layout, kv.table.shape[1:3]
    for fmt, bases in kv.bases.items():
        rank = layout.head_dim // 2
        shapes = (layers, heads, layout.head_dim, rank), (layers, heads, rank, layout.head_dim)
        for basis, shape in zip((bases.keys, bases.values), shapes, strict=True):
            if basis.shape != shape or basis.dtype != torch.float32 or not basis.is_contiguous():
                raise ValueError(f"a basis {list(basis.shape)} of {fmt.label} is not contiguous f32 {list(shape)}")
        handle.set_bases(int(fmt), bases.keys.data_ptr(), bases.values.data_ptr())
    if (rope := kv.rope) is not None:
        for table in (rope.cos, rope.sin):
            if table.shape[1:] != (layout.head_dim // 2,) or table.dtype != torch.float32 or not table.is_contiguous():
                raise ValueError("rotation tables must be contiguous f32")
        handle.set_rope(rope.cos.data_ptr(), rope.sin.data_ptr(), len(rope.cos), rope.factor)


def native_batch(batch: LaneBatch, kv: PagedKV) -> Any:
    """The step's addresses; made once a step, so the lanes' side state must be in place before its first layer."""
    if batch.native is None:
        for tensor in (batch.slots, batch.cu_rows, batch.positions, batch.turned_by, batch.first_vote):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise ValueError("a batch holds contiguous int32 tensors")
        size, rows = batch.slots.shape[0], batch.positions.shape[0]
        fits = len(batch.cu_rows) == size + 1 and len(batch.first_vote) == size and len(batch.turned_by) == rows
        if not fits or int(batch.cu_rows[-1]) != rows:
            raise ValueError("the batch's tensors do not fit each other")
        native = _cpu.Batch(
            size,
            rows,
            batch.slots.data_ptr(),
            batch.cu_rows.data_ptr(),
            batch.positions.data_ptr(),
            batch.turned_by.data_ptr(),
            batch.first_vote.data_ptr(),
        )
        if kv.mass or kv.positions or kv.log_weights or kv.moments or kv.energy:
            for b, slot in enumerate(batch.slots.tolist()):
                if slot in kv.mass:
                    _set_mass(native, b, kv, slot)
                if (moments := kv.moments.get(slot)) is not None:
                    native.set_moments(b, moments.data_ptr())
                if (energy := kv.energy.get(slot)) is not None:
                    native.set_energy(b, energy.sums.data_ptr(), energy.first, energy.last)
                if (positions := kv.positions.get(slot)) is not None:
                    native.set_positions(b, positions.data_ptr(), positions.shape[2])
                if (weights := kv.log_weights.get(slot)) is not None:
                    native.set_log_weights(b, weights.data_ptr(), weights.shape[2])
        if kv.reading:
            batch.make_room_for_choices(kv)
            slots = batch.slots.tolist()
            for b, choice in batch.choices.items():
                set_reading(native, b, kv.reading[slots[b]], choice, kv)
        batch.native = native
    return batch.native


def _set_mass(native: Any, b: int, kv: PagedKV, slot: int) -> None:
    mass, vote = kv.mass[slot], kv.votes.get(slot, Vote())
    noise = kv.noise[slot] if vote.is_noisy else None
    if noise is not None and noise.shape != mass.shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)} does not fit mass of shape {tuple(mass.shape)}")
    is_max = vote.reduce == "max"
    native.set_mass(
        b,
        mass.data_ptr(),
        mass.shape[2],
        is_max,
        vote.decay,
        vote.temperature,
        vote.heating,
        vote.warm_from,
        address(noise),
    )


def address(tensor: Tensor | None) -> int:
    """0 is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()
