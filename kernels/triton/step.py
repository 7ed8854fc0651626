"""What the kernels of a step read of the arena's tables and of the batch, on the device.

The engine keeps tables and batch in host memory, where it changes them. Once a step, before its first layer, this
brings over what changed: lane tables of the slots in `PagedKV.stale`, and everything else that is said per sequence in
one copy. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.triton.device import device, upload
from winnow.kernels.triton.readers import Reading, Worked, no_readers, padded_readers, readers_of
from winnow.kernels.triton.rules import Voting, rules_of, vote_rules
from winnow.kernels.triton.sides import at, room, sides_of


@dataclass(slots=True)
class DeviceTable:
    """The lane tables' copy; kept as `PagedKV.native`."""

    source: tuple[int, torch.Size]
    """Address and shape of the host's table that it is a copy of"""
    table: Tensor
    """[slots + 1, layers, kv_heads, width] int32; in the last row, which is no slot's, the arena's last page"""
    held: Tensor
    """[slots, layers, kv_heads] int32, in host memory: leading pages of each lane that are in the arena"""


@dataclass(slots=True)
class DeviceBatch:
    """A step on the device; kept as `LaneBatch.native`. All int32 unless said otherwise; indexed by b, not by slot."""

    size: int
    """B"""
    rows: int
    """T"""
    most_rows: int
    """of one sequence"""
    angles_end: int
    """One more than the last row of the rotation tables that is looked up"""
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
    angles: Tensor
    """[T]: rows of the rotation tables"""
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
    ready: list[bool]
    """By layer: its lanes count the rows already, in open pages"""
    voting: Voting
    reading: Reading | None
    """None where all read all"""
    sides: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name of a part of `PagedKV` that is held by slot -> addresses [B] int64, 0 for a slot without, and capacities [B]
    int32 (the last dimension). A name is there if any sequence of the batch has the part. So with "choices", which
    `LaneBatch` holds by b"""
    modes: Tensor | None = None
    """[layers, B]: `ReadMode`, and of those who read by a rule"""
    settings: Tensor | None = None
    """[readers, SETTINGS] int64"""
    places: Tensor | None = None
    """[R, 2]: reader of a row, and which of its rows it is"""
    vote_numbers: Tensor | None = None
    """[B, 4] float32: log2 of the decay, temperature, heating; None where nobody votes"""
    vote_kinds: Tensor | None = None
    """[B, 4]: warm_from, whether the largest counts, whether noise is added, whether the softmax is its own; so too"""
    lanes: Tensor | None = None
    """columns.py makes them when first asked for"""
    ballot: Tensor | None = None
    """So does ballots.py"""
    worked: Worked | None = None
    """And reading.py"""
    work: dict[int, Any] = field(default_factory=dict)
    """And attention.py, by the most rows of a sequence that go through decode"""
    tokens: Tensor | None = None
    """[T]: what the rows read, where it was brought along"""
    no_side: tuple[Tensor, Tensor] | None = None
    """Zeros, made when first asked for"""

    @property
    def formats(self) -> frozenset[PageFormat]:
        """Of the full pages, in either part."""
        return self.sealed_formats | self.rest_formats

    def forget_what_was_made(self) -> None:
        """Of numbers that have been brought over anew."""
        self.lanes = self.ballot = self.worked = self.no_side = None

    def side(self, name: str) -> tuple[Tensor, Tensor]:
        """Of `sides`, with zeros where no sequence of the batch has the part."""
        if name in self.sides:
            return self.sides[name]
        if self.no_side is None:
            self.no_side = (torch.zeros_like(self.slots, dtype=torch.int64), torch.zeros_like(self.slots))
        return self.no_side


def device_table(kv: PagedKV) -> Tensor:
    """[slots + 1, layers, kv_heads, width] int32: the lane tables as the engine has them, and a row for `padded`."""
    source, native = (kv.table.data_ptr(), kv.table.shape), kv.native
    if not isinstance(native, DeviceTable) or native.source != source:
        table = pad(kv.table, (0, 0, 0, 0, 0, 0, 0, 1), value=len(kv.data) - 1)
        kv.native = native = DeviceTable(source, upload(table), _held(kv.table, len(kv.data)))
    elif kv.stale:
        slots = torch.tensor(sorted(kv.stale))
        rows = kv.table[slots]
        native.table[upload(slots)] = upload(rows)
        native.held[slots] = _held(rows, len(kv.data))
    kv.stale.clear()
    return native.table


def _held(table: Tensor, pages: int) -> Tensor:
    """[..., width] -> [...] int32: how many page ids stand before the first that is not in the arena."""
    is_out = torch.ones((*table.shape[:-1], table.shape[-1] + 1), dtype=torch.bool)
    torch.logical_or(table < 0, table >= pages, out=is_out[..., :-1])
    return torch.from_numpy(is_out.numpy().argmax(-1).astype(np.int32))


def device_batch(batch: LaneBatch, kv: PagedKV, layer: int) -> DeviceBatch:
    """The step on the device, brought over when first asked for: tables and side state must be in place before.

    IndexError or ValueError where there is no such layer, or rows would reach into its full pages.
    """
    if not isinstance(batch.native, DeviceBatch):
        batch.native = bring(host_step(batch, kv), kv)
    native = cast(DeviceBatch, batch.native)
    if not 0 <= layer < len(native.ready):
        raise IndexError(f"layer {layer} is not among {len(native.ready)}")
    if not native.ready[layer]:
        raise ValueError(f"in layer {layer} a sequence has more rows than a lane has tokens in open pages")
    return native


@dataclass(frozen=True, slots=True)
class HostStep:
    """What is to be brought over, in host memory."""

    parts: dict[str, Tensor]
    """What `DeviceBatch` has under these names; of `sides`, "name at" and "name room" """
    size: int
    rows: int
    most_rows: int
    angles_end: int
    sealed_formats: frozenset[PageFormat]
    rest_formats: frozenset[PageFormat]
    sides: tuple[str, ...]
    ready: list[bool]
    voting: Voting
    reading: Reading | None


def host_step(batch: LaneBatch, kv: PagedKV) -> HostStep:
    """IndexError or ValueError for what would lead a kernel outside the arena."""
    _check_batch(batch, kv)
    slots, size, rows, counts = batch.slots.long(), len(batch.slots), len(batch.positions), batch.cu_rows.diff()
    kept, sealed, rest = kv.kept[slots], kv.sealed[slots], kv.rest[slots]
    formats, rest_formats = kv.formats[slots].int(), kv.rest_formats[slots].int()
    open_tokens = _open_tokens(kv, slots, kept, (sealed, formats), (rest, rest_formats))
    parts = {
        "slots": batch.slots,
        "cu_rows": batch.cu_rows,
        "first_vote": batch.first_vote,
        "positions": batch.positions,
        "angles": batch.turned_by,
        "owners": torch.repeat_interleave(torch.arange(size, dtype=torch.int32), counts.long()),
        "kept": kept,
        "sealed": sealed,
        "rest": rest,
        "open_tokens": open_tokens,
        "sealed_format": formats,
        "rest_format": rest_formats,
    }
    if not batch.choices:
        batch.make_room_for_choices(kv)
    voting, rules = vote_rules(batch, kv)
    reading, readers = readers_of(batch, kv)
    sides = sides_of(batch, kv, voting)
    for name, (addresses, capacities) in sides.items():
        parts |= {at(name): addresses, room(name): capacities}
    parts |= rules | readers
    return HostStep(
        parts=parts,
        size=size,
        rows=rows,
        most_rows=int(counts.max()) if size else 0,
        angles_end=int(batch.turned_by.max()) + 1 if rows else 0,
        sealed_formats=_present(formats, sealed),
        rest_formats=_present(rest_formats, rest),
        sides=tuple(sides),
        ready=(open_tokens >= counts[:, None, None]).all(2).all(0).tolist(),
        voting=voting,
        reading=reading,
    )


def bring(step: HostStep, kv: PagedKV) -> DeviceBatch:
    """The step on the device: one copy that is under way, and what changed of the tables."""
    memory = upload(_flat(step))
    pieces = memory.split([_padded_size(part) for part in step.parts.values()])
    views = {
        name: piece.view(part.dtype)[: part.numel()].view(part.shape)
        for (name, part), piece in zip(step.parts.items(), pieces, strict=True)
    }
    sides = {name: (views.pop(at(name)), views.pop(room(name))) for name in step.sides}
    return DeviceBatch(
        size=step.size,
        rows=step.rows,
        most_rows=step.most_rows,
        angles_end=step.angles_end,
        sealed_formats=step.sealed_formats,
        rest_formats=step.rest_formats,
        table=device_table(kv),
        memory=memory,
        ready=step.ready,
        voting=step.voting,
        reading=step.reading,
        sides=sides,
        **views,
    )


def bring_into(there: DeviceBatch, step: HostStep, kv: PagedKV) -> None:
    """The same in the place of an earlier step of the same shape, whose addresses stay."""
    device_table(kv)
    there.memory.copy_(_flat(step), non_blocking=True)


def padded(step: HostStep, size: int, kv: PagedKV, reading: Reading | None) -> HostStep:
    """A step of sequences with one row each, with further ones up to `size` that are nobody's, and readers as `reading`
    says, of which the step has no more.

    Theirs is the row of the tables behind all slots, where `device_table` puts the arena's last page, and one token in
    it. Nothing that anybody reads is in that page.
    """
    more, compute = size - step.size, int(kv.layout.compute)
    last = {"slots": len(kv.table), "first_vote": 1, "kept": 1, "open_tokens": 1}
    last |= {"sealed_format": compute, "rest_format": compute}
    readers = {} if reading is None else padded_readers(step.parts, reading, size)
    parts = {
        name: readers[name]
        if name in readers
        else torch.cat([part, part.new_full((more, *part.shape[1:]), last.get(name, 0))])
        for name, part in step.parts.items()
    }
    parts["owners"] = torch.arange(size, dtype=torch.int32)
    parts["cu_rows"] = torch.arange(size + 1, dtype=torch.int32)
    return replace(step, parts=parts, size=size, rows=size, reading=reading)


def nobody(
    size: int,
    kv: PagedKV,
    sealed_formats: frozenset[PageFormat],
    rest_formats: frozenset[PageFormat],
    sides: tuple[str, ...],
    voting: Voting,
    reading: Reading | None,
) -> HostStep:
    """A step of rows that are nobody's, for which kernels are chosen as for lanes of these."""
    none = torch.empty(0, dtype=torch.int32)
    empty = host_step(LaneBatch(none, torch.zeros(1, dtype=torch.int32), none, none), kv)
    for name in sides:
        empty.parts.update({at(name): none.long(), room(name): none})
    if voting.rows:
        empty.parts.update(rules_of([]))
    if reading is not None:
        empty.parts.update(no_readers(kv.table.shape[1]))
    empty.parts["tokens"] = none
    alike = replace(
        empty,
        most_rows=1,
        ready=[True] * kv.table.shape[1],
        sealed_formats=sealed_formats,
        rest_formats=rest_formats,
        sides=sides,
        voting=voting,
    )
    return padded(alike, size, kv, reading)


def _padded_size(part: Tensor) -> int:
    """int32 words: each part begins at a multiple of 16 bytes, since kernels are compiled for what they are told of
    alignment."""
    return -(-part.nbytes // 16) * 4


def _flat(step: HostStep) -> Tensor:
    """All parts as one int32 tensor, which copies to a GPU need not wait for."""
    sizes = [_padded_size(part) for part in step.parts.values()]
    flat = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device().type == "cuda")
    for piece, part in zip(flat.split(sizes), step.parts.values(), strict=True):
        piece.view(part.dtype)[: part.numel()].copy_(part.reshape(-1))
    return flat


def _check_batch(batch: LaneBatch, kv: PagedKV) -> None:
    """IndexError or ValueError unless the batch's tensors fit each other and the tables."""
    bounds, size, rows = batch.cu_rows, len(batch.slots), len(batch.positions)
    for tensor in (batch.slots, bounds, batch.positions, batch.turned_by, batch.first_vote):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError("a batch holds contiguous int32 tensors")
    fits = len(bounds) == size + 1 and len(batch.first_vote) == size and len(batch.turned_by) == rows
    if not fits or int(bounds[0]) != 0 or int(bounds[-1]) != rows:
        raise ValueError("the batch's tensors do not fit each other")
    if not size:
        return
    if int(batch.slots.min()) < 0 or int(batch.slots.max()) >= len(kv.table):
        raise IndexError(f"a slot is not among {len(kv.table)}")
    if int(bounds.diff().min()) < 0 or int(batch.first_vote.min()) < 0:
        raise ValueError("row bounds must ascend, and no first vote is negative")
    if rows and min(int(batch.positions.min()), int(batch.turned_by.min())) < 0:
        raise IndexError("a position is negative")


def _open_tokens(kv: PagedKV, slots: Tensor, kept: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """[B, layers, kv_heads] int32: tokens behind the full pages, given as pages and their format for both parts.

    IndexError or ValueError where lanes would lead a kernel outside the arena.
    """
    capacity = torch.tensor([kv.layout.capacity(fmt) for fmt in PageFormat], dtype=torch.int32)
    open_tokens, columns, width = kept, torch.zeros_like(kept), kv.table.shape[3]
    for pages, formats in parts:
        if bool(pages.any()):
            if int(pages.min()) < 0 or int(pages.max()) > width:
                raise ValueError(f"a lane's full pages do not fit a table {width} wide")
            open_tokens = open_tokens - pages * capacity[formats][:, None, None]
            columns = columns + pages
    if bool((open_tokens < 0).any()):
        raise ValueError("a lane's full pages hold more tokens than it keeps")
    columns = columns + (open_tokens + (kv.layout.page_tokens - 1)) // kv.layout.page_tokens
    device_table(kv)
    if bool((columns > kv.native.held[slots]).any()):
        raise IndexError(f"a lane's pages are not all in the arena of {len(kv.data)}")
    return open_tokens


def _present(formats: Tensor, pages: Tensor) -> frozenset[PageFormat]:
    """Those of formats [B] of which a sequence has any of its pages [B, layers, kv_heads]."""
    return frozenset(PageFormat(fmt) for fmt in formats[pages.flatten(1).any(1)].unique().tolist())
