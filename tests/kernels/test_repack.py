"""Rewriting lanes: eviction, sealing and both, in place and to fresh pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.layout import PageFormat, PageLayout

from .build import FORMATS, Held, State, assert_same_bits, build, fixed, int32, place_of, randn
from .repacking import Move, plan, stored

F32, BF16, INT8, INT4, INT2, FP8, F16, *_ = PageFormat
OPENED = [fmt for fmt in FORMATS if fmt.is_opened]

# Lane tokens are long enough for a few pages of every format: at head_dim 32 a page of 16 f32 tokens holds 56 in
# int8 and 96 in int4, and one of 16 bf16 tokens 24 and 48.
MOVES = {
    "evict": Move(Held((60,)), INT4, keep=(33,), residual=99),
    "evict to one token": Move(Held((60,)), INT4, keep=(1,), residual=99),
    "evict to a page - 1, ± 0 and + 1": Move(Held((60,)), INT4, keep=(15, 16, 17), residual=99),
    "keep every token, listed": Move(Held((60, 16)), INT4, keep=(999,), residual=999),
    "keep no token of one lane": Move(Held((60,)), INT4, keep=(20, 0, 5), residual=99),
    "keep no token at all": Move(Held((60,), sealed=(0, 1)), INT4, keep=(0,)),
    "evict ragged lanes to ragged ones": Move(Held((60, 3, 117)), INT4, keep=(9, 3, 40, 1), residual=99),
    "evict in a float format that is sealed": Move(Held((60, 90), fmt=BF16, sealed=(2, 0)), BF16, keep=(70, 20)),
    "seal": Move(Held((300,)), INT4),
    "seal to int8": Move(Held((300,)), INT8),
    "seal to bf16": Move(Held((300,)), BF16),
    "seal and leave a residual": Move(Held((300, 211)), INT4, residual=50),
    "seal nothing: fewer tokens than a page": Move(Held((17,)), INT4),
    "seal a whole number of pages": Move(Held((192, 96, 288)), INT4),
    "seal odd counts": Move(Held((193, 97, 101, 5)), INT4),
    "seal what follows pages that are sealed": Move(Held((150,), sealed=(2, 1, 0)), INT4, start=(2, 1, 0)),
    "seal to int8 behind int8": Move(Held((150,), fmt=INT8, sealed=(2, 0)), INT8, start=(2, 0), residual=9),
    "seal to int2": Move(Held((700, 300, 20)), INT2, residual=9),
    "seal to fp8": Move(Held((300, 90, 20)), FP8, residual=9),
    "seal to f16": Move(Held((300, 90, 20)), F16, residual=9),
    "evict sealed f16 tokens": Move(Held((40, 9), sealed=(3, 1), fmt=F16), F16, keep=(60, 30)),
    **{f"seal to {fmt.label}": Move(Held((300, 90, 20)), fmt, residual=9) for fmt in OPENED},
    **{
        f"evict sealed {fmt.label} tokens": Move(Held((40, 9), sealed=(3, 1), fmt=fmt), fmt, keep=(150, 60))
        for fmt in OPENED
    },
    "evict sealed int2 tokens": Move(Held((40, 9), sealed=(3, 1), fmt=INT2), INT2, keep=(350, 60)),
    "evict sealed fp8 tokens": Move(Held((40, 9), sealed=(3, 1), fmt=FP8), FP8, keep=(150, 60)),
    "nothing behind the pages that stay": Move(Held((0,), rows=0, sealed=(2, 1)), INT4, start=(2, 1)),
    "drop everything behind the pages that stay": Move(Held((60,), sealed=(2,)), INT4, keep=(0,), start=(2, 1)),
    "evict behind pages that stay": Move(Held((150,), sealed=(2,)), INT4, keep=(130, 30, 111), start=(1, 2, 1)),
    "evict, then seal": Move(Held((400, 250)), INT4, keep=(210, 101, 3)),
    "evict, then seal with a residual": Move(Held((400, 250)), INT8, keep=(210, 101, 3), residual=32),
    "evict sealed tokens": Move(Held((40, 9), sealed=(3, 1)), INT4, keep=(150, 60)),
    "evict sealed tokens until none is sealed": Move(Held((40,), sealed=(3, 1)), INT4, keep=(90, 30)),
    # A sealed page gives way to an open one that holds fewer tokens: what it held must be read before.
    "a sealed column becomes an open one": Move(Held((40,), sealed=(4,)), INT4, keep=(230,), residual=150),
    "unseal": Move(Held((40,), sealed=(2, 1)), INT4, residual=9999),
    "seal to another format": Move(Held((40,), fmt=INT8, sealed=(4, 0)), INT4),
    "seal to a wider format": Move(Held((40,), fmt=INT4, sealed=(3, 1)), INT8, keep=(170, 80)),
}
moves = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
pages = pytest.mark.parametrize("fresh", [False, True], ids=["in place", "to fresh pages"])


def _state(move: Move, layout: PageLayout) -> State:
    """The sequence to move and a bystander."""
    bystander = Held((20, 40), sealed=(1, 0), fmt=INT8)
    return build(layout, [move.held, bystander], layers=2, kv_heads=2, spare=160, seed=len(repr(move)))


def _check(ops: Backend, move: Move, layout: PageLayout) -> State:
    """Runs a move; every lane must hold the chosen tokens as their pages store them, and no other page change."""
    state = _state(move, layout)
    kv, slot = state.kv, int(state.batch.slots[0])
    before = [ops.read_lanes(kv, slot, layer) for layer in range(2)]
    arena = kv.data.clone()
    tables = [part.clone() for part in (kv.table, kv.kept, kv.sealed, kv.formats)]
    repack = plan(state, slot, move)
    repack.run(ops, kv)
    for part, old in zip((kv.table, kv.kept, kv.sealed, kv.formats), tables, strict=True):
        assert torch.equal(part, old), "the tables are the caller's"
    others = torch.ones(arena.shape[0], dtype=torch.bool)
    others[repack.written()] = False
    assert torch.equal(kv.data[others], arena[others])

    places = {lane: place_of(kv, slot, *lane, index) for lane, index in repack.tokens.items()}
    repack.commit(kv)
    capacity = layout.capacity(move.fmt)
    for layer in range(2):
        after = ops.read_lanes(kv, slot, layer)
        for head in range(2):
            chosen, kept = repack.tokens[layer, head], int(kv.kept[slot, layer, head])
            assert kept == chosen.numel()
            stay = int(repack.start[layer, head]) * capacity
            full = int(repack.dst_sealed[layer, head]) * capacity - stay
            was = [part[head, chosen] for part in before[layer]]
            place = replace(places[layer, head], positions=places[layer, head].positions[stay:])
            expected = stored(layout, [part[stay:] for part in was], move.fmt, full, place=place)
            for part, old, new in zip(after, was, expected, strict=True):
                assert_same_bits(part[head, :stay], old[:stay])
                assert_same_bits(part[head, stay:kept], new)
                assert not part[head, kept:].any()
    return state


@moves
@pages
@pytest.mark.parametrize("compute", [F32, BF16])
def test_lanes_hold_the_chosen_tokens(ops: Backend, move: Move, fresh: bool, compute: PageFormat) -> None:
    _check(ops, _placed(move, fresh), PageLayout(32, compute))


@pytest.mark.parametrize("compute", [F32, BF16])
def test_full_pages_stay_that_nobody_sealed(ops: Backend, compute: PageFormat) -> None:
    """As an eviction leaves those before the first token that goes."""
    move = Move(Held((150, 60), fmt=compute), compute, keep=(30, 5), start=(2, 1, 0), residual=999)
    _check(ops, move, PageLayout(32, compute))
    state = _state(move, PageLayout(32, compute))
    for start in ((10, 1), (0, -1)):  # a lane of 150 tokens has nine full pages
        repack = plan(state, int(state.batch.slots[0]), move)
        repack.start[0] = int32(start)
        with pytest.raises((ValueError, IndexError)):
            repack.run(ops, state.kv)


@moves
@pages
@pytest.mark.parametrize("compute", [F32, BF16])
def test_every_byte_matches_the_reference(
    native: Backend, reference: Backend, move: Move, fresh: bool, compute: PageFormat
) -> None:
    move, layout = _placed(move, fresh), PageLayout(80, compute)
    assert torch.equal(_check(native, move, layout).kv.data, _check(reference, move, layout).kv.data)


@pytest.mark.parametrize("dim", [16, 64, 96, 128])
@pytest.mark.parametrize("fmt", FORMATS[2:])
def test_head_dims(native: Backend, reference: Backend, dim: int, fmt: PageFormat) -> None:
    move, layout = Move(Held((300, 211)), fmt, keep=(250, 140)), PageLayout(dim, BF16, 32)
    assert torch.equal(_check(native, move, layout).kv.data, _check(reference, move, layout).kv.data)


@pytest.mark.parametrize("fmt", FORMATS[2:])
def test_extreme_numbers_match_the_reference(native: Backend, reference: Backend, fmt: PageFormat) -> None:
    move, layout = Move(Held((200,), fmt=F32, sealed=(0,)), fmt), PageLayout(32)
    arenas = []
    for ops in (native, reference):
        state = _state(move, layout)
        slot = int(state.batch.slots[0])
        used = state.kv.table[slot][state.kv.table[slot] >= 0].long()
        numbers = state.kv.data.view(torch.float32)
        size = numbers[used].shape
        # Steps below the least scale, beyond half precision, and numbers that round between two codes.
        kinds = torch.stack([1e-8 * randn(*size), 1e6 * randn(*size), (8 * randn(*size)).round(), torch.zeros(size)])
        numbers[used] = kinds[torch.arange(size[0]) % 4, torch.arange(size[0])]
        plan(state, slot, move).run(ops, state.kv)
        arenas.append(state.kv.data)
    assert torch.equal(*arenas)


@st.composite
def _any_move(draw: st.DrawFn) -> Move:
    lanes = 4
    source, fmt = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(FORMATS))
    sealed = draw(st.tuples(*[st.integers(0, 3)] * lanes))
    start = tuple(draw(st.integers(0, s)) if source is fmt else 0 for s in sealed)
    return Move(
        Held(draw(st.tuples(*[st.integers(1, 90)] * lanes)), sealed=sealed, fmt=source),
        fmt,
        keep=draw(st.none() | st.tuples(*[st.integers(0, 200)] * lanes)),
        start=start,
        residual=draw(st.integers(0, 120)),
        fresh=draw(st.booleans()),
    )


@fixed(max_examples=60)
@given(move=_any_move(), compute=st.sampled_from([F32, BF16, F16]))
def test_any_move(move: Move, compute: PageFormat) -> None:
    layout = PageLayout(16, compute)
    states = [_check(backend(name), move, layout) for name in ("cpu", "reference")]
    assert torch.equal(states[0].kv.data, states[1].kv.data)


def _placed(move: Move, fresh: bool) -> Move:
    return Move(move.held, move.fmt, move.keep, move.start, move.residual, fresh)
