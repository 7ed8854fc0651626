"""Rewriting lanes that hold two formats: important tokens first, the rest behind them, the newest open."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.kv import Rest
from winnow.kernels.layout import PageFormat, PageLayout

from .build import FORMATS, Held, assert_same_bits, build, fixed, int32, place_of
from .repacking import stored

LANES = 2


@dataclass(frozen=True)
class Mix:
    """One lane before and after; pages are counted in each part's format."""

    sealed: int
    rest: int
    open: int
    stay: int
    """leading sealed pages that stay"""
    rest_stay: int
    """leading pages of the second part that stay"""
    dropped: int
    """tokens of the other pages that go"""
    into_sealed: int
    """pages that are wanted anew in the first format, as far as there are tokens"""
    into_rest: int


def _mixes() -> st.SearchStrategy[Mix]:
    few = st.integers(0, 2)
    return st.builds(Mix, few, few, st.integers(1, 70), few, few, st.integers(0, 150), few, few)


@fixed(max_examples=40)
@given(
    mixes=st.tuples(*[_mixes()] * LANES),
    formats=st.sampled_from(
        [(PageFormat.INT4, PageFormat.INT2), (PageFormat.INT8, PageFormat.INT4), (PageFormat.BF16, PageFormat.INT2)]
        + [(PageFormat.F16, fmt) for fmt in FORMATS if fmt.is_opened]
        + [(PageFormat.MATRYOSHKA, PageFormat.CSKV), (PageFormat.THINK, PageFormat.MATRYOSHKA)]
    ),
    compute=st.sampled_from([PageFormat.F32, PageFormat.BF16]),
    fresh=st.booleans(),
)
def test_lanes_hold_the_chosen_tokens_in_their_new_order(
    mixes: tuple[Mix, ...], formats: tuple[PageFormat, PageFormat], compute: PageFormat, fresh: bool
) -> None:
    arenas = [_check(backend(name), mixes, formats, PageLayout(16, compute), fresh) for name in ("cpu", "reference")]
    assert torch.equal(*arenas)


def _check(
    ops: Backend, mixes: tuple[Mix, ...], formats: tuple[PageFormat, PageFormat], layout: PageLayout, fresh: bool
) -> torch.Tensor:
    fmt, rest_fmt = formats
    first, second = layout.capacity(fmt), layout.capacity(rest_fmt)
    held = Held(
        tuple(mix.open for mix in mixes),
        sealed=tuple(mix.sealed for mix in mixes),
        fmt=fmt,
        rest=tuple(mix.rest for mix in mixes),
        rest_fmt=rest_fmt,
    )
    state = build(layout, [held], kv_heads=LANES, spare=80)
    kv, slot = state.kv, int(state.batch.slots[0])
    before = ops.read_lanes(kv, slot, 0)
    places = [place_of(kv, slot, 0, head, torch.arange(int(kv.kept[slot, 0, head]))) for head in range(LANES)]
    rng = torch.Generator().manual_seed(1)
    width = 24
    table = torch.full((1, LANES, width), -1, dtype=torch.int32)
    lists, starts, sealed, rest_starts, rest, orders = [], [], [], [], [], []
    free = state.free.tolist()
    for head, mix in enumerate(mixes):
        kept = int(kv.kept[slot, 0, head])
        stay, rest_stay = min(mix.stay, mix.sealed), min(mix.rest_stay, mix.rest)
        old = kv.table[slot, 0, head, : mix.sealed + mix.rest + layout.pages(mix.open)].tolist()
        low = torch.arange(mix.sealed * first, mix.sealed * first + rest_stay * second)
        tokens = torch.arange(stay * first, kept)
        tokens = tokens[~torch.isin(tokens, low)]
        tokens = tokens[torch.randperm(len(tokens), generator=rng)][: max(1, len(tokens) - mix.dropped)]
        new_sealed = min(mix.into_sealed, len(tokens) // first)
        new_rest = min(mix.into_rest, (len(tokens) - new_sealed * first) // second)
        closed = stay + new_sealed + rest_stay + new_rest
        columns = closed + layout.pages(len(tokens) - new_sealed * first - new_rest * second)
        staying = old[mix.sealed : mix.sealed + rest_stay]
        own = [] if fresh else [page for page in old[stay:] if page not in staying]
        for column in range(stay, columns):
            is_staying = stay + new_sealed <= column < stay + new_sealed + rest_stay
            if not is_staying:
                table[0, head, column] = own.pop() if own else free.pop()
        lists.append(tokens)
        starts.append(stay)
        sealed.append(stay + new_sealed)
        rest_starts.append(rest_stay)
        rest.append(rest_stay + new_rest)
        made = int(new_sealed * first)
        orders.append((torch.arange(stay * first), tokens[:made], low, tokens[made:]))
    keep = torch.full((1, LANES, max(map(len, lists))), -1, dtype=torch.int32)
    for head, tokens in enumerate(lists):
        keep[0, head, : len(tokens)] = tokens
    target = Rest(int32(rest_starts)[None], int32(rest)[None], rest_fmt)
    counts = int32([len(tokens) for tokens in lists])[None]
    ops.repack(kv, slot, keep, counts, int32(starts)[None], table, int32(sealed)[None], fmt, target)

    wider = torch.full((*kv.table.shape[:3], width), -1, dtype=torch.int32)
    for head, mix in enumerate(mixes):
        old = kv.table[slot, 0, head].clone()
        wider[slot, 0, head] = table[0, head]
        wider[slot, 0, head, : starts[head]] = old[: starts[head]]
        at = sealed[head]
        wider[slot, 0, head, at : at + rest_starts[head]] = old[mix.sealed : mix.sealed + rest_starts[head]]
        kv.kept[slot, 0, head] = sum(map(len, orders[head]))
    kv.table = wider
    kv.sealed[slot, 0], kv.rest[slot, 0] = int32(sealed), int32(rest)
    order = [torch.cat(order) for order in orders]
    kv.positions[slot] = torch.zeros(1, LANES, max(map(len, order)), dtype=torch.int32)
    for head, lane in enumerate(order):
        kv.positions[slot][0, head, : len(lane)] = places[head].positions[lane]
    after = ops.read_lanes(kv, slot, 0)
    for head, (stayed, new_sealed, low, others) in enumerate(orders):
        new_rest = (rest[head] - rest_starts[head]) * second
        made = [part[head] for part in before]
        moved = torch.cat([new_sealed, others])
        place = replace(places[head], positions=places[head].positions[moved])
        tokens = [m[moved] for m in made]
        written = stored(layout, tokens, fmt, len(new_sealed), rest_fmt, new_rest, place=place)
        for part, was, new in zip(after, made, written, strict=True):
            wanted = torch.cat([was[stayed], new[: len(new_sealed)], was[low], new[len(new_sealed) :]])
            assert_same_bits(part[head, : len(wanted)], wanted)
    return kv.data


def test_a_part_that_shrinks_below_what_stays_is_refused(ops: Backend) -> None:
    state = build(PageLayout(16), [Held((5,), sealed=(1,), rest=(1,))], kv_heads=LANES)
    one, none = torch.ones(1, LANES, dtype=torch.int32), torch.zeros(1, LANES, dtype=torch.int32)
    table = state.kv.table[int(state.batch.slots[0])].clone()
    keep = torch.zeros(1, LANES, 1, dtype=torch.int32)
    rest = Rest(one, none, PageFormat.INT2)
    with pytest.raises((ValueError, IndexError)):
        ops.repack(state.kv, int(state.batch.slots[0]), keep, one, none, table, none, PageFormat.INT4, rest)
