"""Choosing what is read, and reading it: backends against each other, and against dense attention with a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.reading import ReadMode, ReadRule, ReadState

from .build import Held, State, assert_same_bits, build, chunk_of, int32, one_sequence, randn
from .on_device import OnDevice

F32, BF16, INT8, INT4, INT2, FP8, *_ = PageFormat
HEADS, GROUP = 2, 3

MakeRule = Callable[[int, int], ReadRule]
"""(layers, head_dim) -> a rule"""


def modes(layers: int, mode: ReadMode = ReadMode.CHOSEN) -> Tensor:
    return torch.full((layers,), int(mode), dtype=torch.uint8)


def channels(layers: int, dim: int, count: int) -> Tensor:
    rng = torch.Generator().manual_seed(9)
    lanes = [torch.randperm(dim, generator=rng)[:count] for _ in range(layers * HEADS)]
    return torch.stack(lanes).view(layers, HEADS, count).int()


RULES: dict[str, MakeRule] = {
    "pages": lambda layers, dim: ReadRule(modes(layers), tokens=40),
    "a share of pages, with sinks": lambda layers, dim: ReadRule(modes(layers), 1, 0.3, sinks=5, recent=20),
    "tokens": lambda layers, dim: ReadRule(modes(layers), 17, recent=5, channels=channels(layers, dim, dim)),
    "tokens by a few channels": lambda layers, dim: ReadRule(
        modes(layers), 1, 0.2, sinks=3, channels=channels(layers, dim, dim // 4)
    ),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
POOLED: MakeRule = lambda layers, dim: ReadRule(  # noqa: E731
    modes(layers), 30, sinks=2, recent=9, channels=channels(layers, dim, dim), votes_by_layer=True, pool=5
)
TAKEN_OVER: MakeRule = lambda layers, dim: ReadRule(  # noqa: E731
    modes(layers), 30, recent=9, channels=channels(layers, dim, dim), votes_by_layer=True, similarity=0.6
)

LANES: dict[str, list[Held]] = {
    "one token": [Held((1,))],
    "fewer tokens than are wanted": [Held((30,))],
    "pages in the compute format": [Held((200, 133)), Held((64,)), Held((65, 80), rows=3)],
    "int8": [Held((40, 17), sealed=(3, 2), fmt=INT8), Held((2,), sealed=(4,), fmt=INT8, rows=2)],
    "int4": [Held((40, 17), sealed=(2, 1), fmt=INT4)],
    "int2": [Held((40, 17), sealed=(2, 1), fmt=INT2), Held((90,), sealed=(0,), fmt=INT2)],
    "fp8": [Held((40, 17), sealed=(2, 1), fmt=FP8, rows=2)],
    "bf16": [Held((40, 90), sealed=(3, 1), fmt=BF16, rows=4)],
    "several spans": [Held((1100, 700)), Held((600,), rows=5)],
    "evicted": [Held((100, 64), evicted=True), Held((150, 70), rows=3, evicted=True)],
}
lanes = pytest.mark.parametrize("held", LANES.values(), ids=LANES.keys())


def read_by(state: State, rule: ReadRule, *, but: tuple[int, ...] = ()) -> State:
    """Every sequence of the batch reads by the rule, except those at places `but`."""
    kv = state.kv
    layers, heads = kv.kept.shape[1:]
    for b, slot in enumerate(state.batch.slots.tolist()):
        if b not in but:
            kv.reading[slot] = ReadState.empty(rule, layers, heads, heads * GROUP, kv.layout.head_dim)
            kv.reading[slot].resize(int(kv.kept[slot].max()), int((kv.table[slot] >= 0).sum(-1).max()))
    return state


def made(held: list[Held], rule: MakeRule, dim: int = 32, compute: PageFormat = F32, **more: int) -> State:
    state = build(PageLayout(dim, compute), held, kv_heads=HEADS, **more)
    return read_by(state, rule(state.kv.kept.shape[1], dim))


def queries(state: State, seed: int = 5) -> Tensor:
    return randn(state.rows, GROUP * HEADS, state.kv.layout.head_dim, seed=seed)


def attend(ops: Backend, state: State, q: Tensor, window: int = 0, layer: int = 0) -> Tensor:
    scale = state.kv.layout.head_dim**-0.5
    ops.choose_reads(q, state.batch, state.kv, layer, scale, window)
    return ops.attention(q, state.batch, state.kv, layer, scale, window)


def assert_parity(native: Backend, reference: Backend, state: State, window: int = 0, rounds: int = 1) -> None:
    """The same choices, output and count of bytes; what a choice is made from is the same bits."""
    theirs = copy_state(state)
    for seed in range(rounds):
        state.batch.choices, theirs.batch.choices = {}, {}
        state.batch.native = None
        q = queries(state, seed)
        expected = attend(reference, theirs, q, window)
        out = attend(native, state, q, window)
        assert bool(expected.isfinite().all())
        for b, choice in theirs.batch.choices.items():
            assert torch.equal(state.batch.choices[b], choice), f"sequence {b}"
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
        for slot, one in theirs.kv.reading.items():
            other = state.kv.reading[slot]
            for name in ("touched", "bounded", "anchored", "anchors", "anchor_choice"):
                if getattr(one, name) is not None:
                    assert torch.equal(getattr(other, name), getattr(one, name)), name
            if one.bounds is not None and other.bounds is not None:
                known = torch.arange(one.bounds.shape[2]) < one.bounded[..., None]
                assert torch.equal(other.bounds[known], one.bounds[known])


def copy_state(state: State) -> State:
    copy = state.copy()
    for slot, one in state.kv.reading.items():
        parts = {name: getattr(one, name) for name in ("touched", "bounds", "bounded", "anchors", "anchored")}
        parts |= {"touched_before": one.touched_before, "anchor_choice": one.anchor_choice}
        cloned = {name: None if part is None else part.clone() for name, part in parts.items()}
        copy.kv.reading[slot] = ReadState(one.rule, **cloned)
    return copy


# Backends agree ------------------------------------------------------------------------------------------------------


@lanes
@rules
@pytest.mark.parametrize("window", [0, 50])
def test_matches_the_reference(
    native: Backend, reference: Backend, held: list[Held], rule: MakeRule, window: int
) -> None:
    assert_parity(native, reference, made(held, rule), window)


@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("compute", [F32, BF16])
@rules
def test_shapes(native: Backend, reference: Backend, dim: int, compute: PageFormat, rule: MakeRule) -> None:
    held = [Held((150, 90), rows=2), Held((40,), sealed=(2, 1), fmt=INT8)]
    assert_parity(native, reference, made(held, rule, dim, compute))


def test_heads_that_vote_together(native: Backend, reference: Backend) -> None:
    held = [Held((150,)), Held((90,), sealed=(1,), fmt=INT8), Held((700,), rows=3), Held((30,))]
    assert_parity(native, reference, made(held, POOLED))


def test_choices_that_are_taken_over(native: Backend, reference: Backend) -> None:
    """Round after round with the same tokens: random queries are not alike, a second look with the same ones is."""
    state = made([Held((150,)), Held((90,), sealed=(1,), fmt=INT8), Held((30,))], TAKEN_OVER)
    assert_parity(native, reference, state, rounds=3)
    q, before = queries(state, 2), {b: choice.clone() for b, choice in state.batch.choices.items()}
    for _ in range(2):
        touched = {slot: reading.touched.clone() for slot, reading in state.kv.reading.items()}
        state.batch.choices, state.batch.native = {}, None
        attend(native, state, q)
        for b, slot in enumerate(state.batch.slots.tolist()):
            assert torch.equal(state.batch.choices[b], before[b])
            read = int((state.kv.reading[slot].touched - touched[slot])[0])
            assert read == bytes_of_choice(state, b), "keys are not scored again"


def bytes_of_choice(state: State, b: int) -> int:
    """What attention reads of pages in f32 and int8 for the choices of a sequence."""
    kv, slot, total = state.kv, int(state.batch.slots[b]), 0
    for head in range(HEADS):
        sealed, fmt = int(kv.sealed[slot, 0, head]), PageFormat(int(kv.formats[slot]))
        first = 0
        for column in range(int((kv.table[slot, 0, head] >= 0).sum())):
            page = fmt if column < sealed else F32
            capacity = kv.layout.capacity(page)
            values = int(state.batch.choices[b][:, head, first : first + capacity].sum())
            whole = 2 * capacity * 32 + 4 * (32 + capacity)  # of a page in int8
            total += (whole if page is INT8 else (capacity + values) * 32 * 4) * (values > 0)
            first += capacity
    return total


# A choice is a mask --------------------------------------------------------------------------------------------------


@lanes
@rules
def test_a_choice_is_a_mask(ops: Backend, held: list[Held], rule: MakeRule) -> None:
    held = [replace(h, fmt=F32) for h in held]  # that loses nothing
    state = made(held, rule)
    q = queries(state)
    out = attend(ops, state, q).view(-1, HEADS, GROUP, 32)
    for b, slot in enumerate(state.batch.slots.tolist()):
        _, rows = one_sequence(state.batch, b)
        count = rows.stop - rows.start
        for head in range(HEADS):
            keys, values = state.keys[slot, 0, head].double(), state.values[slot, 0, head].double()
            mask = state.batch.choices[b][:, head, : len(keys)].bool()
            assert not (mask & ~torch.ones_like(mask).tril(len(keys) - count)).any(), "a later token was chosen"
            queries_ = q[rows, head * GROUP : (head + 1) * GROUP].double().transpose(0, 1)
            dense = torch.nn.functional.scaled_dot_product_attention(
                queries_, keys.expand(GROUP, -1, -1), values.expand(GROUP, -1, -1), attn_mask=mask
            )
            torch.testing.assert_close(out[rows, head].transpose(0, 1).double(), dense, atol=2e-5, rtol=1e-5)


@lanes
@pytest.mark.parametrize("window", [0, 50])
def test_choosing_everything_is_dense_attention(native: Backend, held: list[Held], window: int) -> None:
    for wanted in (ReadRule(modes(1), 10_000), ReadRule(modes(1), 1, 1.0, channels=channels(1, 32, 8))):
        state = made(held, lambda layers, dim, wanted=wanted: wanted)  # type: ignore[misc]
        dense, q = state.copy(), queries(state)
        assert_same_bits(attend(native, state, q, window), attend(native, dense, q, window))
        for reading in state.kv.reading.values():
            read, all_, _ = reading.touched.tolist()
            made_bounds = int(reading.bounded.sum()) * state.kv.layout.page_bytes // 2
            assert read <= all_ + made_bounds


def test_what_is_not_chosen_is_not_read(native: Backend) -> None:
    """Its pages could be lost: values and keys of other pages are never looked at."""
    state = made([Held((400, 333))], RULES["pages"])
    q = queries(state)
    expected = attend(native, state, q)
    slot = int(state.batch.slots[0])
    for head in range(HEADS):
        chosen = state.batch.choices[0][0, head].nonzero().flatten() // 16
        pages = set(range(int(state.kv.kept[slot, 0, head] + 15) // 16)) - set(chosen.tolist())
        assert len(pages) > 15
        for page in pages:
            state.kv.table[slot, 0, head, page] = 0
    scale = 32**-0.5
    assert_same_bits(native.attention(q, state.batch, state.kv, 0, scale, 0), expected)


# The same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 60])
@rules
def test_alone_and_in_a_batch(native: Backend, rule: MakeRule, window: int) -> None:
    held = [
        Held((150, 90), rows=2),
        Held((40,), sealed=(2, 1), fmt=INT8),
        Held((5,)),
        Held((900, 700)),
        Held((130,), rows=130),
    ]
    state = read_by(build(PageLayout(32), held, kv_heads=HEADS), rule(1, 32), but=(2, 4))
    untouched = copy_state(state)
    q = queries(state)
    together = attend(native, state, q, window)
    for b, slot in enumerate(state.batch.slots.tolist()):
        alone = copy_state(untouched)
        alone.batch, rows = one_sequence(state.batch, b)
        assert_same_bits(attend(native, alone, q[rows].contiguous(), window), together[rows])
        if slot in state.kv.reading:
            assert torch.equal(alone.kv.reading[slot].touched, state.kv.reading[slot].touched)


@pytest.mark.parametrize("cut", [range(42), [0, 7, 41], [0, 40, 41]])
@pytest.mark.parametrize("rule", [*RULES.values(), POOLED, TAKEN_OVER], ids=[*RULES, "pooled", "taken over"])
@pytest.mark.parametrize("sealed", [0, 2])
def test_a_chunk_cut_into_pieces(native: Backend, rule: MakeRule, cut: list[int], sealed: int) -> None:
    heads_vote_together = rule in (POOLED, TAKEN_OVER)
    open_ = (201,) if heads_vote_together else (201, 160)
    whole = made([Held(open_, rows=41, sealed=(sealed,), fmt=INT8)], rule)
    pieces = copy_state(whole)
    slot, q = int(whole.batch.slots[0]), queries(whole)
    q[1::3] = q[0::3][: len(q[1::3])] + 0.1 * q[1::3]  # one row in three is much like the one before it
    expected, kept = attend(native, whole, q), whole.kv.kept[slot].clone()
    for first, last in pairwise(cut):
        pieces.kv.kept[slot] = kept - 41 + last
        pieces.batch = chunk_of(whole.batch, first, last)
        out = attend(native, pieces, q[first:last].contiguous())
        if isinstance(native, OnDevice):  # where chunks change the order of sums
            torch.testing.assert_close(out, expected[first:last], atol=2e-5, rtol=1e-5)
        else:
            assert_same_bits(out, expected[first:last])
    assert torch.equal(pieces.kv.reading[slot].touched, whole.kv.reading[slot].touched)


def test_a_row_takes_over_what_one_of_its_chunk_chose(native: Backend, reference: Backend) -> None:
    state = made([Held((150,), rows=9), Held((90,), sealed=(1,), fmt=INT8, rows=6)], TAKEN_OVER)
    theirs, q = copy_state(state), queries(state)
    q[2::3] = q[1::3] + 0.1 * q[2::3]
    torch.testing.assert_close(attend(native, state, q), attend(reference, theirs, q), atol=2e-5, rtol=1e-5)
    for b, slot in enumerate(state.batch.slots.tolist()):
        assert torch.equal(state.batch.choices[b], theirs.batch.choices[b])
        assert torch.equal(state.kv.reading[slot].touched, theirs.kv.reading[slot].touched)
        assert torch.equal(state.batch.choices[b][1, :, :80], state.batch.choices[b][2, :, :80])


# Layers --------------------------------------------------------------------------------------------------------------


def test_layers_take_their_part(native: Backend, reference: Backend) -> None:
    """One reads all, one chooses besides, one reads what that one chose."""
    plan = torch.tensor([ReadMode.ALL, ReadMode.ALL_AND_CHOOSE, ReadMode.CHOSEN_BEFORE], dtype=torch.uint8)
    rule = ReadRule(plan, 20, channels=channels(3, 32, 32))
    state = read_by(build(PageLayout(32), [Held((150,)), Held((300,), rows=2)], layers=3, kv_heads=HEADS), rule)
    dense, theirs, q = state.copy(), copy_state(state), queries(state)
    for layer in (0, 1):
        assert_same_bits(attend(native, state, q, 0, layer), attend(native, dense, q, 0, layer))
        attend(reference, theirs, q, 0, layer)
    chosen = {b: choice.clone() for b, choice in state.batch.choices.items()}
    out, expected = attend(native, state, q, 0, 2), attend(reference, theirs, q, 0, 2)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
    for b, choice in chosen.items():
        assert torch.equal(state.batch.choices[b], choice)
        assert torch.equal(theirs.batch.choices[b], choice)
    for slot, reading in theirs.kv.reading.items():
        assert torch.equal(state.kv.reading[slot].touched, reading.touched)


# Doors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda reading: reading.bounded.fill_(-3), id="bounds of negative pages"),
        pytest.param(
            lambda reading: setattr(reading, "bounds", reading.bounds[:, :, :2].contiguous()), id="few bounds"
        ),
        pytest.param(lambda reading: setattr(reading, "bounds", reading.bounds.float()), id="bounds of another type"),
        pytest.param(lambda reading: setattr(reading, "bounded", int32([0])), id="counts of another shape"),
    ],
)
def test_bounds_out_of_place_are_refused(native: Backend, spoil: Callable[[ReadState], None]) -> None:
    state = made([Held((150, 90))], RULES["pages"])
    reading = state.kv.reading[int(state.batch.slots[0])]
    spoil(reading)
    if isinstance(native, OnDevice) and reading.bounded.min() < 0:
        pytest.skip("what is in a device's memory is not looked at")
    with pytest.raises((IndexError, ValueError)):
        attend(native, state, queries(state))


@pytest.mark.parametrize("channel", [-1, 32])
def test_channels_out_of_place_are_refused(native: Backend, channel: int) -> None:
    state = made([Held((150, 90))], RULES["tokens"])
    reading = state.kv.reading[int(state.batch.slots[0])]
    assert reading.rule.channels is not None
    reading.rule.channels[0, 1, 3] = channel
    with pytest.raises((IndexError, ValueError)):
        attend(native, state, queries(state))


def test_heads_of_unequal_lanes_cannot_vote_together(ops: Backend) -> None:
    state = made([Held((150, 90))], POOLED)
    with pytest.raises((IndexError, ValueError)):
        attend(ops, state, queries(state))


@pytest.mark.parametrize(
    "wrong",
    [
        {"modes": modes(2, ReadMode.CHOSEN_BEFORE)},
        {"modes": torch.zeros(2)},
        {"tokens": 0},
        {"recent": 0},
        {"pool": 2},
        {"similarity": 0.5},
        {"channels": torch.zeros(2, 2, 4)},
    ],
)
def test_rules_without_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        ReadRule(**({"modes": modes(2), "tokens": 5} | wrong))  # type: ignore[arg-type]
