"""What the kernels of a step read of the arena's tables and of the batch, on the device.

The engine keeps tables and batch in host memory, where it changes them. Once a step, before its first layer, this
brings over what changed: lane tables of the slots in `PagedKV.stale`, and everything else that is said per sequence in
one copy. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadMode
from winnow.kernels.triton.device import upload


@dataclass(slots=True)
class DeviceTable:
    """The lane tables' copy; kept as `PagedKV.native`."""

    source: tuple[int, torch.Size]
    """Address and shape of the host's table that it is a copy of"""
    table: Tensor
    """[slots + 1, layers, kv_heads, width] int32; in the last row, which is no slot's, the arena's last page"""


@dataclass(slots=True)
class DeviceBatch:
    """A step on the device; kept as `LaneBatch.native`. All int32 unless said otherwise; indexed by b, not by slot."""

    size: int
    """B"""
    rows: int
    """T"""
    most_rows: int
    """of one sequence"""
    positions_end: int
    """One more than the highest position"""
    sealed_formats: frozenset[PageFormat]
    """of the sealed pages that any of the lanes has"""
    rest_formats: frozenset[PageFormat]
    """of those in a second format"""
    table: Tensor
    """[slots + 1, layers, kv_heads, width]: the one thing that is indexed by slot"""
    slots: Tensor
    """[B]"""
    cu_rows: Tensor
    """[B+1]"""
    first_vote: Tensor
    """[B]"""
    positions: Tensor
    """[T]"""
    owners: Tensor
    """[T]: b of each row"""
    kept: Tensor
    """[B, layers, kv_heads]"""
    sealed: Tensor
    """[B, layers, kv_heads]"""
    rest: Tensor
    """[B, layers, kv_heads]"""
    open_tokens: Tensor
    """[B, layers, kv_heads]: tokens behind the full pages"""
    sealed_format: Tensor
    """[B]"""
    rest_format: Tensor
    """[B]"""
    memory: Tensor
    """Where all of this lies, but for the table"""
    sides: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name of a part of `PagedKV` that is held by slot -> addresses [B] int64, 0 for a slot without, and capacities [B]
    int32 (the last dimension). A name is there if any sequence of the batch has the part. So with "choices", which
    `LaneBatch` holds by b"""
    modes: Tensor | None = None
    """[layers, B]: `ReadMode`; None where all read all"""
    lanes: Tensor | None = None
    """columns.py makes them when first asked for"""
    ballot: Any = None
    """So does votes.py"""
    tokens: Tensor | None = None
    """[T]: what the rows read, where it was brought along"""
    no_side: tuple[Tensor, Tensor] | None = None
    """Zeros, made when first asked for"""

    @property
    def formats(self) -> frozenset[PageFormat]:
        """Of the full pages, in either part."""
        return self.sealed_formats | self.rest_formats

    def side(self, name: str) -> tuple[Tensor, Tensor]:
        """Of `sides`, with zeros where no sequence of the batch has the part."""
        if name in self.sides:
            return self.sides[name]
        if self.no_side is None:
            self.no_side = (torch.zeros_like(self.slots, dtype=torch.int64), torch.zeros_like(self.slots))
        return self.no_side


def device_table(kv: PagedKV) -> Tensor:
    """[slots + 1, layers, kv_heads, width] int32: the lane tables as the engine has them, and a row for `padded`."""
    if not _has_copy(kv):
        table = pad(kv.table, (0, 0, 0, 0, 0, 0, 0, 1), value=len(kv.data) - 1)
        kv.native = DeviceTable((kv.table.data_ptr(), kv.table.shape), upload(table))
    elif kv.stale:
        slots = torch.tensor(sorted(kv.stale))
        kv.native.table[upload(slots)] = upload(kv.table[slots])
    kv.stale.clear()
    return kv.native.table


def device_batch(batch: LaneBatch, kv: PagedKV) -> DeviceBatch:
    """The step on the device, brought over when first asked for: tables and side state must be in place before."""
    if not isinstance(batch.native, DeviceBatch):
        batch.native = bring(host_step(batch, kv), kv)
    return cast(DeviceBatch, batch.native)


@dataclass(frozen=True, slots=True)
class HostStep:
    """What is to be brought over, in host memory."""

    parts: dict[str, Tensor]
    """What `DeviceBatch` has under these names; of `sides`, "name at" and "name room" """
    size: int
    rows: int
    most_rows: int
    positions_end: int
    sealed_formats: frozenset[PageFormat]
    rest_formats: frozenset[PageFormat]
    sides: tuple[str, ...]


def host_step(batch: LaneBatch, kv: PagedKV) -> HostStep:
    """IndexError or ValueError for what would lead a kernel outside the arena."""
    slots, size, rows = batch.slots.long(), len(batch.slots), len(batch.positions)
    open_tokens = check_batch(batch, kv, rows)
    counts = batch.cu_rows.diff()
    kept, sealed, rest = kv.kept[slots], kv.sealed[slots], kv.rest[slots]
    formats, rest_formats = kv.formats[slots].int(), kv.rest_formats[slots].int()
    parts = {
        "slots": batch.slots,
        "cu_rows": batch.cu_rows,
        "first_vote": batch.first_vote,
        "positions": batch.positions,
        "owners": torch.repeat_interleave(torch.arange(size, dtype=torch.int32), counts.long()),
        "kept": kept,
        "sealed": sealed,
        "rest": rest,
        "open_tokens": open_tokens.int(),
        "sealed_format": formats,
        "rest_format": rest_formats,
    }
    if not batch.choices:
        batch.make_room_for_choices(kv)
    if batch.choices:
        parts["modes"] = _modes(batch, kv)
    sides = _sides(batch, kv)
    for name, (addresses, capacities) in sides.items():
        parts |= {_at(name): addresses, _room(name): capacities}
    return HostStep(
        parts=parts,
        size=size,
        rows=rows,
        most_rows=int(counts.max()) if size else 0,
        positions_end=int(batch.positions.max()) + 1 if rows else 0,
        sealed_formats=_present(formats, sealed),
        rest_formats=_present(rest_formats, rest),
        sides=tuple(sides),
    )


def bring(step: HostStep, kv: PagedKV) -> DeviceBatch:
    """The step on the device: one copy that is under way, and what changed of the tables."""
    memory = upload(_flat(step))
    pieces = memory.split([_padded_size(part) for part in step.parts.values()])
    views = {
        name: piece.view(part.dtype)[: part.numel()].view(part.shape)
        for (name, part), piece in zip(step.parts.items(), pieces, strict=True)
    }
    sides = {name: (views.pop(_at(name)), views.pop(_room(name))) for name in step.sides}
    return DeviceBatch(
        size=step.size,
        rows=step.rows,
        most_rows=step.most_rows,
        positions_end=step.positions_end,
        sealed_formats=step.sealed_formats,
        rest_formats=step.rest_formats,
        table=device_table(kv),
        memory=memory,
        sides=sides,
        **views,
    )


def bring_into(there: DeviceBatch, step: HostStep, kv: PagedKV) -> None:
    """The same in the place of an earlier step of the same shape, whose addresses stay."""
    device_table(kv)
    flat = _flat(step)
    there.memory.copy_(flat.pin_memory() if there.memory.is_cuda else flat, non_blocking=True)


def padded(step: HostStep, size: int, kv: PagedKV) -> HostStep:
    """A step of sequences with one row each, with further ones up to `size` that are nobody's.

    Theirs is the row of the tables behind all slots, where `device_table` puts the arena's last page, and one token in
    it. Nothing that anybody reads is in that page.
    """
    more, compute = size - step.size, int(kv.layout.compute)
    last = {"slots": len(kv.table), "first_vote": 1, "kept": 1, "open_tokens": 1}
    last |= {"sealed_format": compute, "rest_format": compute}
    parts = {
        name: torch.cat([part, part.new_full((more, *part.shape[1:]), last.get(name, 0))])
        for name, part in step.parts.items()
    }
    parts["owners"] = torch.arange(size, dtype=torch.int32)
    parts["cu_rows"] = torch.arange(size + 1, dtype=torch.int32)
    return replace(step, parts=parts, size=size, rows=size)


def nobody(
    size: int,
    kv: PagedKV,
    sealed_formats: frozenset[PageFormat],
    rest_formats: frozenset[PageFormat],
    sides: tuple[str, ...],
) -> HostStep:
    """A step of rows that are nobody's, for which kernels are chosen as for lanes of these."""
    none = torch.empty(0, dtype=torch.int32)
    empty = host_step(LaneBatch(none, torch.zeros(1, dtype=torch.int32), none, none), kv)
    for name in sides:
        empty.parts.update({_at(name): none.long(), _room(name): none})
    empty.parts["tokens"] = none
    alike = replace(empty, most_rows=1, sealed_formats=sealed_formats, rest_formats=rest_formats, sides=sides)
    return padded(alike, size, kv)


def _at(side: str) -> str:
    return f"{side} at"


def _room(side: str) -> str:
    return f"{side} room"


def _padded_size(part: Tensor) -> int:
    """int32 words: each part begins at a multiple of 16 bytes, since kernels are compiled for what they are told of
    alignment."""
    return -(-part.nbytes // 16) * 4


def _flat(step: HostStep) -> Tensor:
    words = [part.reshape(-1).view(torch.int32) for part in step.parts.values()]
    return torch.cat([pad(part, (0, -part.numel() % 4)) for part in words])


def check_batch(batch: LaneBatch, kv: PagedKV, rows: int) -> Tensor:
    """[B, layers, kv_heads] int64: tokens in open pages. IndexError or ValueError where the host's tables would lead a
    kernel outside the arena."""
    slots, bounds, size = batch.slots.long(), batch.cu_rows, len(batch.slots)
    for tensor in (batch.slots, bounds, batch.positions, batch.first_vote):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError("a batch holds contiguous int32 tensors")
    if len(bounds) != size + 1 or len(batch.first_vote) != size or int(bounds[0]) != 0 or int(bounds[-1]) != rows:
        raise ValueError("the batch's tensors do not fit each other")
    if not size:
        return torch.empty((0, *kv.kept.shape[1:]), dtype=torch.int64)
    if int(slots.min()) < 0 or int(slots.max()) >= len(kv.table):
        raise IndexError(f"a slot is not among {len(kv.table)}")
    counts = bounds.diff()
    if int(counts.min()) < 0 or int(batch.first_vote.min()) < 0:
        raise ValueError("row bounds must ascend, and no first vote is negative")
    if rows and int(batch.positions.min()) < 0:
        raise IndexError("a position is negative")
    kept, sealed, rest = (part[slots].long() for part in (kv.kept, kv.sealed, kv.rest))
    capacity = torch.tensor([kv.layout.capacity(fmt) for fmt in PageFormat])
    first, second = (capacity[formats[slots].long()][:, None, None] for formats in (kv.formats, kv.rest_formats))
    open_tokens = kept - sealed * first - rest * second
    if int(sealed.min()) < 0 or int(rest.min()) < 0 or int(open_tokens.min()) < 0:
        raise ValueError("a lane's full pages hold more tokens than it keeps")
    if bool((counts[:, None, None] > open_tokens).any()):
        raise ValueError("a sequence has more rows than its lanes have tokens in open pages")
    columns = sealed + rest + -(-open_tokens // kv.layout.page_tokens)
    if int(columns.max()) > kv.table.shape[3]:
        raise IndexError(f"a lane of {int(columns.max())} pages in a table {kv.table.shape[3]} wide")
    _check_pages(kv, slots, columns)
    return open_tokens


def _has_copy(kv: PagedKV) -> bool:
    return isinstance(kv.native, DeviceTable) and kv.native.source == (kv.table.data_ptr(), kv.table.shape)


def _check_pages(kv: PagedKV, slots: Tensor, columns: Tensor) -> None:
    """IndexError unless the first `columns` [B, layers, kv_heads] pages of all lanes are in the arena: looks at all of
    them where the device has no copy of them yet, else at the last."""
    new = torch.tensor([slot in kv.stale or not _has_copy(kv) for slot in slots.tolist()])
    layers, heads, width = kv.table.shape[1:]
    lanes = (slots[:, None, None], torch.arange(layers)[:, None], torch.arange(heads))
    for pages, used in (
        (kv.table[slots[new]], torch.arange(width) < columns[new][..., None]),
        (kv.table[(*lanes, (columns - 1).clamp_min(0))], columns > 0),
    ):
        if bool((((pages < 0) | (pages >= len(kv.data))) & used).any()):
            raise IndexError(f"a page of a lane is not in the arena of {len(kv.data)} pages")


def _present(formats: Tensor, pages: Tensor) -> frozenset[PageFormat]:
    """Those of formats [B] of which a sequence has any of its pages [B, layers, kv_heads]."""
    return frozenset(PageFormat(fmt) for fmt in formats[pages.flatten(1).any(1)].unique().tolist())


def _modes(batch: LaneBatch, kv: PagedKV) -> Tensor:
    """[layers, B] int32"""
    states = [kv.reading.get(slot) for slot in batch.slots.tolist()]
    all_ = torch.full((kv.table.shape[1],), int(ReadMode.ALL), dtype=torch.uint8)
    return torch.stack([all_ if state is None else state.rule.modes for state in states], 1).int()


def _sides(batch: LaneBatch, kv: PagedKV) -> dict[str, tuple[Tensor, Tensor]]:
    """Addresses are the device's: side state is made there. IndexError where a part is shorter than a lane."""
    slots = batch.slots.tolist()
    held: dict[str, list[Tensor | None]] = {"choices": [batch.choices.get(b) for b in range(len(slots))]}
    for name in ("mass", "noise", "moments", "positions", "log_weights"):
        held[name] = [getattr(kv, name).get(slot) for slot in slots]
    longest = kv.kept[batch.slots.long()].flatten(1).amax(1).tolist() if slots else []
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
