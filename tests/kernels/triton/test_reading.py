"""Choosing what is read, in the interpreter: the reference's choices, state and count of bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadMode, ReadRule

from ..build import Held, State, build
from ..test_reading import POOLED, RULES, TAKEN_OVER, channels, copy_state, made, queries, read_by

F32, BF16, INT8, INT4, INT2, FP8, F16, *_ = PageFormat


def _choose(ops: Backend, state: State, q: Tensor, window: int = 0, layer: int = 0) -> None:
    ops.choose_reads(q, state.batch, state.kv, layer, 32**-0.5, window)


def _assert_same(ours: State, theirs: State) -> None:
    for b, choice in theirs.batch.choices.items():
        assert torch.equal(ours.batch.choices[b], choice), f"sequence {b}"
    for slot, one in theirs.kv.reading.items():
        other = ours.kv.reading[slot]
        for name in ("touched", "bounded", "anchored", "anchors", "anchor_choice"):
            if getattr(one, name) is not None:
                assert torch.equal(getattr(other, name), getattr(one, name)), name
        if one.bounds is not None and other.bounds is not None:
            known = torch.arange(one.bounds.shape[2]) < one.bounded[..., None]
            assert torch.equal(other.bounds[known], one.bounds[known])


def _assert_parity(triton: Backend, reference: Backend, state: State, window: int = 0, rounds: int = 1) -> None:
    theirs = copy_state(state)
    for seed in range(rounds):
        state.batch.choices, theirs.batch.choices = {}, {}
        q = queries(state, seed)
        _choose(triton, state, q, window)
        _choose(reference, theirs, q, window)
        _assert_same(state, theirs)


@pytest.mark.parametrize(
    ("rule", "window"),
    [("a share of pages, with sinks", 0), ("tokens by a few channels", 50)],
)
def test_choices_of_every_format(triton: Backend, reference: Backend, rule: str, window: int) -> None:
    held = [
        Held((60, 44), rows=2, evicted=True),
        Held((20, 17), sealed=(1, 0), fmt=INT8),
        Held((9,), sealed=(1,), fmt=INT4),
        Held((33, 17), sealed=(1, 0), fmt=INT2),
        Held((20,), sealed=(0, 1), fmt=FP8),
        Held((17,), sealed=(2, 1), fmt=BF16),
        Held((17,), sealed=(1, 2), fmt=F16),
    ]
    _assert_parity(triton, reference, made(held, RULES[rule]), window)


def test_choices_in_bf16(triton: Backend, reference: Backend) -> None:
    held = [Held((150, 90)), Held((40,), sealed=(2, 1), fmt=INT8)]
    _assert_parity(triton, reference, made(held, RULES["pages"], 80, BF16))


def test_heads_that_vote_together(triton: Backend, reference: Backend) -> None:
    held = [Held((90,), rows=2), Held((20,), sealed=(1,), fmt=INT8), Held((30,))]
    _assert_parity(triton, reference, made(held, POOLED))


def test_choices_that_are_taken_over(triton: Backend, reference: Backend) -> None:
    """From earlier steps, and from earlier rows of the same one."""
    state = made([Held((60,), rows=4), Held((45,), rows=2)], TAKEN_OVER)
    _assert_parity(triton, reference, state)
    theirs, q = copy_state(state), queries(state, 2)
    q[2::3] = q[1::3] + 0.1 * q[2::3]
    q[4] = state.kv.reading[int(state.batch.slots[1])].anchors[0]  # type: ignore[index]
    for ops, one in ((triton, state), (reference, theirs)):
        one.batch.choices = {}
        _choose(ops, one, q)
    _assert_same(state, theirs)


def test_layers_take_their_part(triton: Backend, reference: Backend) -> None:
    plan = torch.tensor([ReadMode.ALL, ReadMode.ALL_AND_CHOOSE, ReadMode.CHOSEN_BEFORE], dtype=torch.uint8)
    rule = ReadRule(plan, 20, channels=channels(3, 32, 32))
    layout = made([Held((1,))], RULES["pages"]).kv.layout
    state = read_by(build(layout, [Held((90,)), Held((70,), rows=2)], layers=3, kv_heads=2), rule)
    theirs, q = copy_state(state), queries(state)
    for layer in range(3):
        _choose(triton, state, q, 0, layer)
        _choose(reference, theirs, q, 0, layer)
        _assert_same(state, theirs)


@pytest.mark.parametrize("channel", [-1, 32])
def test_channels_out_of_place_are_refused(triton: Backend, channel: int) -> None:
    state = made([Held((50,))], RULES["tokens"])
    rule = state.kv.reading[int(state.batch.slots[0])].rule
    assert rule.channels is not None
    rule.channels[0, 1, 3] = channel
    with pytest.raises(IndexError):
        _choose(triton, state, queries(state))


def test_lanes_in_two_formats_are_refused(triton: Backend) -> None:
    state = made([Held((50,), sealed=(1,), rest=(1,))], RULES["tokens"])
    with pytest.raises(ValueError, match="two formats"):
        _choose(triton, state, queries(state))
