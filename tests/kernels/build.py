"""Random paged states for the kernel tests: lanes of any raggedness on shuffled pages, garbage everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from winnow.kernels.bases import Bases, Rope
from winnow.kernels.dispatch import Backend
from winnow.kernels.formats.think import THINK
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reference.codec import as_float, encode_pages, float_views
from winnow.kernels.reference.formats import Place
from winnow.kernels.reference.lanes import lane_positions

FORMATS = [fmt for fmt in PageFormat if not fmt.spans_layers]
"""Those whose pages one lane has for itself"""


@dataclass(frozen=True)
class Held:
    """What a sequence holds. `open` and `sealed` go by lane (layer by layer, head by head) and are repeated."""

    open: tuple[int, ...]
    """tokens after the sealed pages, the step's rows included"""
    rows: int = 1
    sealed: tuple[int, ...] = (0,)
    """full pages in `fmt`"""
    fmt: PageFormat = PageFormat.INT4
    rest: tuple[int, ...] = (0,)
    """full pages in `rest_fmt` behind the sealed ones"""
    rest_fmt: PageFormat = PageFormat.INT2
    evicted: bool = False
    """positions have gaps, and are written down, as they are anyway where lanes differ in kept length"""
    first_vote: int | None = None
    """with a number the slot has mass"""
    weighted: bool = False
    """its tokens have log weights, as if some stood for many"""

    def kept(self, layout: PageLayout, lanes: int) -> list[int]:
        """Tokens of each lane."""
        first, second = layout.capacity(self.fmt), layout.capacity(self.rest_fmt)
        return [
            self.sealed[i % len(self.sealed)] * first
            + self.rest[i % len(self.rest)] * second
            + self.open[i % len(self.open)]
            for i in range(lanes)
        ]


def formats_in(value: Any) -> set[PageFormat]:
    """The page formats that a test's parameter asks for. A list of `Held` asks for none: `read_by` leaves out what a
    backend does not have."""
    if isinstance(value, PageFormat):
        return {value}
    if isinstance(value, Held):
        return {fmt for fmt, pages in ((value.fmt, value.sealed), (value.rest_fmt, value.rest)) if any(pages)}
    if isinstance(value, list | tuple):
        return set().union(*(formats_in(one) for one in value if not isinstance(one, Held)))
    if is_dataclass(value):
        return set().union(*(formats_in(getattr(value, part.name)) for part in fields(value)))
    return set()


def read_by(ops: Backend, held: list[Held]) -> list[Held]:
    """What of this lies in formats that a backend has; the test is skipped if nothing does."""
    there = [one for one in held if formats_in(one) <= {*ops.page_formats()}]
    if not there:
        pytest.skip("the backend has no pages in these formats")
    return there


@dataclass
class State:
    """A paged memory, the batch of its sequences' newest rows, and what was put into the lanes."""

    kv: PagedKV
    batch: LaneBatch
    free: Tensor
    """page ids of no lane"""
    keys: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    """(slot, layer, head) -> [kept, D] f32, before any format rounded it"""
    values: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.batch.cu_rows[-1])

    def copy(self) -> State:
        """The same state on memory of its own. The batch too: a backend may keep addresses in it."""
        batch = self.batch
        fresh = LaneBatch(batch.slots, batch.cu_rows, batch.positions, batch.first_vote, batch.angles)
        return replace(self, kv=copy_kv(self.kv), batch=fresh)


def copy_kv(kv: PagedKV) -> PagedKV:
    names = ("data", "table", "kept", "sealed", "formats", "rest", "rest_formats")
    tables = {name: getattr(kv, name).clone() for name in names}
    kinds = ("mass", "noise", "moments", "channels", "positions", "log_weights")
    sides = {kind: {slot: part.clone() for slot, part in getattr(kv, kind).items()} for kind in kinds}
    return PagedKV(kv.layout, **tables, **sides, votes=dict(kv.votes), bases=kv.bases, rope=kv.rope)


def build(
    layout: PageLayout, held: Sequence[Held], *, layers: int = 1, kv_heads: int = 2, spare: int = 8, seed: int = 0
) -> State:
    """One sequence for each of `held`, in shuffled slots; `spare` pages and one slot stay free."""
    rng = torch.Generator().manual_seed(seed)
    lanes, slots = layers * kv_heads, len(held) + 1
    longest = max(max(h.kept(layout, lanes)) for h in held)
    most = [max(h.sealed) + max(h.rest) + layout.pages(max(h.open)) for h in held]
    kv = PagedKV.allocate(layout, sum(most) * lanes + spare, slots, layers, kv_heads, max(most) + 1)
    kv.data.fill_(255)  # a NaN in every float format: what no token wrote must not be read
    add_bases(kv, rng)
    free = torch.randperm(kv.data.shape[0], generator=rng).int()
    order = torch.randperm(slots, generator=rng).int()[: len(held)]
    bounds, positions = [0], []
    state = State(kv, LaneBatch(order, order, order, order), free)
    for slot, one in zip(order.tolist(), held, strict=True):
        kept = one.kept(layout, lanes)
        kv.formats[slot], kv.rest_formats[slot] = int(one.fmt), int(one.rest_fmt)
        for i in range(lanes):
            lane = (slot, i // kv_heads, i % kv_heads)
            sealed, rest = one.sealed[i % len(one.sealed)], one.rest[i % len(one.rest)]
            tokens = one.open[i % len(one.open)]
            assert one.rows <= tokens, "the step's rows must fit the open pages"
            count = sealed + rest + layout.pages(tokens)
            kv.table[lane][:count], state.free = state.free[:count], state.free[count:]
            kv.kept[lane], kv.sealed[lane], kv.rest[lane] = kept[i], sealed, rest
        evicted = one.evicted or min(kept) < max(kept)
        seen = max(kept) + (37 if evicted else 0)
        if evicted:
            kv.positions[slot] = gapped_positions(kv, slot, one.rows, seen, rng)
        for i in range(lanes):
            fill_lane(state, (slot, i // kv_heads, i % kv_heads), rng)
        if one.first_vote is not None:
            kv.mass[slot] = torch.rand(layers, kv_heads, longest + 5, generator=rng)
        if one.weighted:
            kv.log_weights[slot] = 4 * torch.rand(layers, kv_heads, max(kept) + 1, generator=rng)
        bounds.append(bounds[-1] + one.rows)
        positions.append(torch.arange(seen - one.rows, seen))
    votes = [h.rows if h.first_vote is None else h.first_vote for h in held]
    state.batch = LaneBatch(order, int32(bounds), torch.cat(positions).int(), int32(votes))
    return state


def add_bases(kv: PagedKV, rng: torch.Generator) -> None:
    """Random bases and channels for the formats that go by them, and RoPE's tables with a factor."""
    layers, heads, dim = *kv.table.shape[1:3], kv.layout.head_dim
    for fmt in PageFormat:
        if fmt.has_bases:
            keys, values = torch.linalg.qr(torch.randn(2, layers, heads, dim, dim // 2, generator=rng)).Q
            kv.bases[fmt] = Bases(keys.contiguous(), values.mT.contiguous())
    angles = torch.arange(4096)[:, None] * 100.0 ** -(torch.arange(dim // 2) * 2 / dim)
    kv.rope = Rope(1.25 * angles.cos(), 1.25 * angles.sin(), 1.25)
    for slot in range(kv.table.shape[0]):
        chosen = torch.rand(layers, heads, dim, generator=rng).argsort(dim=-1) < THINK.channels(dim)
        kv.channels[slot] = chosen.to(torch.uint8)


def place_of(kv: PagedKV, slot: int, layer: int, head: int, index: Tensor) -> Place:
    """Of a lane's tokens `index` [n]."""
    positions = lane_positions(kv, slot, layer, head)[index]
    return Place(kv, layer, head, positions, kv.channels[slot][layer, head])


def fill_lane(state: State, lane: tuple[int, int, int], rng: torch.Generator) -> None:
    """Random tokens of unit scale, a key channel in eight ten times larger, as models have them."""
    kv, layout, (slot, layer, head) = state.kv, state.kv.layout, lane
    kept = int(kv.kept[lane])
    keys, values = (torch.randn(kept, layout.head_dim, generator=rng) for _ in range(2))
    keys[:, ::8] += 4
    state.keys[slot, layer, head], state.values[slot, layer, head] = keys, values
    pages, sealed, full = kv.table[lane].long(), 0, 0
    for count, code in ((kv.sealed[lane], kv.formats[slot]), (kv.rest[lane], kv.rest_formats[slot])):
        fmt = PageFormat(int(code))
        tokens = slice(full, full + int(count) * layout.capacity(fmt))
        if count:
            place = place_of(kv, *lane, torch.arange(tokens.start, tokens.stop))
            raw = encode_pages(keys[tokens], values[tokens], layout, fmt, place)
            kv.data[pages[sealed : sealed + int(count)], : raw.shape[1]] = raw
        sealed, full = sealed + int(count), tokens.stop
    k_view, v_view = float_views(kv.data, layout, layout.compute)
    at = torch.arange(kept - full)
    page, place = pages[sealed + at // layout.page_tokens], at % layout.page_tokens
    k_view[page, :, place] = as_float(keys[full:], layout.compute)
    v_view[page, place] = as_float(values[full:], layout.compute)


def gapped_positions(kv: PagedKV, slot: int, rows: int, seen: int, rng: torch.Generator) -> Tensor:
    """[layers, kv_heads, capacity] int32: each lane keeps a random subset of what came before the step's rows."""
    layers, heads = kv.kept.shape[1:]
    positions = torch.full((layers, heads, int(kv.kept[slot].max()) + 3), -7, dtype=torch.int32)
    for layer in range(layers):
        for head in range(heads):
            old = int(kv.kept[slot, layer, head]) - rows
            positions[layer, head, :old] = torch.randperm(seen - rows, generator=rng)[:old].sort().values.int()
            positions[layer, head, old : old + rows] = torch.arange(seen - rows, seen)
    return positions


def one_sequence(batch: LaneBatch, index: int) -> tuple[LaneBatch, slice]:
    """The batch of one of its sequences alone, and where that one's rows are."""
    first, last = batch.cu_rows[index : index + 2].tolist()
    alone = LaneBatch(
        batch.slots[index : index + 1].clone(),
        int32([0, last - first]),
        batch.positions[first:last].clone(),
        batch.first_vote[index : index + 1].clone(),
    )
    return alone, slice(first, last)


def chunk_of(batch: LaneBatch, first: int, last: int) -> LaneBatch:
    """Rows [first, last) of a batch of one sequence, as a step of their own; the caller sets `kept` to match."""
    vote = min(max(int(batch.first_vote[0]) - first, 0), last - first)
    return LaneBatch(batch.slots.clone(), int32([0, last - first]), batch.positions[first:last].clone(), int32([vote]))


def sealed_pages(kv: PagedKV) -> Tensor:
    """[n] int64: ids of all full pages, in either format."""
    return kv.table[torch.arange(kv.table.shape[3]) < (kv.sealed + kv.rest)[..., None]].long()


def fixed(max_examples: int = 100) -> settings:
    """Hypothesis draws the same examples in every run."""
    return settings(max_examples=max_examples, derandomize=True, deadline=None)


def int32(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    differ = actual.contiguous().view(torch.int32) != expected.contiguous().view(torch.int32)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} numbers differ in their bits"
