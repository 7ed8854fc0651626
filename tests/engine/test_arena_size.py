"""How many pages an arena has on a GPU, by what its driver says of the memory. On a GPU tests/gpu/test_memory.py asks a
real one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from winnow.engine import memory
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError
from winnow.engine.models.decoder import Decoder
from winnow.engine.ranks import Ranks
from winnow.kernels.layout import PageFormat, PageLayout

GIB = 1 << 30
LAYOUT = PageLayout(128, PageFormat.BF16, 32)
GPU: Any = SimpleNamespace(device=lambda: torch.device("cuda", 0))
TOTAL, IN_USE, STEP, RECORDED = 80 * GIB, 17 * GIB, 3 * GIB, GIB


@pytest.fixture(autouse=True)
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A card of 80 GiB with a model on it; (tokens, sequences, longest, steps) of the steps that are measured."""
    asked = []

    def peak(model: Any, layout: Any, device: Any, *step: int) -> int:
        asked.append(step)
        return STEP if step[0] > 256 else RECORDED

    monkeypatch.setattr(memory, "_peak_bytes", peak)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (TOTAL - IN_USE, TOTAL))
    return asked


def pages(model: Decoder, **settings: Any) -> int:
    return memory.arena_pages(EngineSettings(device="cuda", **settings), model, LAYOUT, GPU)


@pytest.mark.parametrize("utilization", [0.5, 0.9, 1.0])
def test_pages_fill_the_share_that_the_model_and_a_step_leave(tiny: Decoder, utilization: float) -> None:
    room = utilization * TOTAL - IN_USE - STEP - RECORDED
    assert room - LAYOUT.page_bytes < pages(tiny, memory_utilization=utilization) * LAYOUT.page_bytes <= room


def test_what_is_measured(tiny: Decoder, peaks: list[tuple[int, ...]]) -> None:
    """The largest step, as far as sequences reach; and the largest of those that are recorded, if any are."""
    longest, left = tiny.config.max_position, pages(tiny)
    assert peaks == [(2048, 256, longest, 2), (256, 256, 1, 2)]
    peaks.clear()
    more = pages(tiny, cuda_graphs=False, async_scheduling=False, max_step_tokens=4096, max_model_len=100)
    assert peaks == [(4096, 256, 100, 1)]
    assert (more - left) * LAYOUT.page_bytes == RECORDED


def test_a_size_that_is_given(tiny: Decoder, peaks: list[tuple[int, ...]]) -> None:
    assert pages(tiny, kv_memory_gib=2.5) * LAYOUT.page_bytes == 2.5 * GIB
    assert not peaks


def test_ranks_have_as_many_pages_as_the_fullest_card_leaves(tiny: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "least", lambda ranks, number: number - 5 * GIB)
    room = 0.9 * TOTAL - IN_USE - STEP - RECORDED - 5 * GIB
    assert 0 <= room - pages(tiny) * LAYOUT.page_bytes < LAYOUT.page_bytes


def test_nothing_is_left(tiny: Decoder) -> None:
    with pytest.raises(ModelError, match=r"memory_utilization 0\.2: of 80\.0 GiB, nothing is left"):
        pages(tiny, memory_utilization=0.2)
