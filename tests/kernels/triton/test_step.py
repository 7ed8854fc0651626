"""What is checked of a step before a kernel follows it: also of lanes that the device has seen before."""

from __future__ import annotations

import pytest
import torch

from winnow.kernels.kv import LaneBatch
from winnow.kernels.layout import PageFormat, PageLayout
from winnow.kernels.triton.step import device_batch, device_table

from ..build import Held, State, build, int32


def _next_step(state: State) -> LaneBatch:
    """One more token in all lanes of the sequence."""
    slot = state.batch.slots
    state.kv.kept[slot.long()] += 1
    return LaneBatch(slot, int32([0, 1]), state.batch.positions + 1, int32([1]))


def _seen(open_tokens: int) -> State:
    """A sequence of which the device has the tables."""
    state = build(PageLayout(16), [Held((open_tokens, 3), sealed=(1, 0), fmt=PageFormat.INT8)], layers=2)
    state.kv.data = state.kv.data.to(device_table(state.kv).device)
    device_batch(state.batch, state.kv, 0)
    return state


def test_open_tokens_are_those_behind_full_pages() -> None:
    state = _seen(20)
    step = device_batch(_next_step(state), state.kv, 0)
    assert step.open_tokens.tolist() == [[[21, 4], [21, 4]]]
    assert step.angles_end == int(state.batch.positions[0]) + 2


def test_a_lane_that_grows_behind_its_pages() -> None:
    state = _seen(16)
    with pytest.raises(IndexError, match="pages"):
        device_batch(_next_step(state), state.kv, 0)


@pytest.mark.parametrize("page", [-1, 10_000])
def test_a_page_that_changes(page: int) -> None:
    state = _seen(20)
    slot = int(state.batch.slots[0])
    state.kv.table[slot, 1, 0, 0] = page
    state.kv.stale.add(slot)
    with pytest.raises(IndexError, match="arena"):
        device_batch(_next_step(state), state.kv, 0)


def test_a_lane_that_gets_a_page_in_time() -> None:
    state = _seen(16)
    slot = int(state.batch.slots[0])
    state.kv.table[slot, :, 0, 2] = state.free[:2]
    state.kv.stale.add(slot)
    step = device_batch(_next_step(state), state.kv, 0)
    assert torch.equal(step.table[slot].cpu(), state.kv.table[slot])
