"""Which channels of keys stay, against the norms of whole products; what formats that shrink keys do not go with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from winnow.engine.compression.channels import choose_channels
from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported
from winnow.kernels.dispatch import backend
from winnow.kernels.kv import Energy
from winnow.kernels.layout import PageLayout

from ..kernels.build import Held, build, randn

HEADS, GROUP, DIM = 2, 3, 32
COMPACT = {"policy": "streaming_llm", "positions": "compact", "budget": 40, "block": 16}


def test_channels_of_the_largest_products_stay() -> None:
    state = build(PageLayout(DIM), [Held((90, 31, 60), rows=0)], layers=2)
    slot = int(state.batch.slots[0])
    queries = randn(2, HEADS, GROUP * 32, DIM) * (1 + torch.arange(DIM) % 5)
    state.kv.energy[slot] = Energy(queries.double().square().sum(2), 0, 32)
    chosen = choose_channels(backend("cpu"), state.kv, slot)
    for layer in range(2):
        for head in range(HEADS):
            keys = state.keys[slot, layer, head]
            norms = [float((queries[layer, head, :, [c]] @ keys[:, [c]].T).norm()) for c in range(DIM)]
            best = sorted(range(DIM), key=lambda c: -norms[c])[: 60 * DIM // 100]
            assert chosen[layer, head].nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize(
    ("plan", "path", "why"),
    [
        ({"kv": {"format": "think", "evict": COMPACT}}, "kv.format", "compact positions seal pages before"),
        ({"kv": {"format": "cskv", "evict": COMPACT}}, "kv.format", "loses what leaves its basis"),
        ({"kv": {"evict": COMPACT}, "on_pressure": {"format": "matryoshka"}}, "on_pressure", "loses what leaves"),
        ({"on_pressure": {"format": "think"}}, "on_pressure.format", "the last queries of the prompt"),
    ],
)
def test_combinations_that_cannot_be(plan: dict[str, Any], path: str, why: str) -> None:
    with pytest.raises(PlanNotSupported, match=why) as caught:
        Plan.parse(plan)
    assert caught.value.param == f"compression.{path}"
