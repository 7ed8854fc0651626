"""Each merge method against its paper's rule, lane by lane."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from winnow.engine.compression.merge import MergeView, Survivors
from winnow.engine.compression.merge_plan import merge_model
from winnow.engine.compression.registry import MERGE, merge_method
from winnow.kernels.dispatch import backend

from .merge_oracles import ORACLES, Lane

SINKS, RECENT = 2, 5
LANES = [(60, 24), (41, 41), (33, 9), (50, 1)]
"""Tokens held and kept: the second lane gives nothing up, the last keeps one token"""

CASES: list[tuple[str, dict[str, Any]]] = [
    ("kv_merging", {}),
    ("kv_merging", {"threshold": 0.4}),
    ("kv_merging", {"fraction": 0.3}),
    ("kv_merging", {"threshold": 0.3, "fraction": 0.7, "proportional": True}),
    ("ems", {"threshold": 0.2}),
    ("ems", {"threshold": 0.5, "candidates": 1.5}),
    ("ems", {"threshold": 0.0, "candidates": 1.0}),
    ("compensation", {}),
]


def view_of(seed: int, weighted: bool) -> MergeView:
    generator = torch.Generator().manual_seed(seed)
    held, count = torch.tensor(LANES).unbind(1)
    tokens, most = int(held.max()), int(count.max())
    # Few directions, so that keys are alike, as they are in a lane.
    basis = torch.randn(len(LANES), 6, 16, generator=generator)
    keys = torch.randn(len(LANES), tokens, 6, generator=generator) @ basis
    values = torch.randn(len(LANES), tokens, 16, generator=generator)
    log_weights = (
        2 * torch.rand(len(LANES), tokens, generator=generator) if weighted else torch.zeros(len(LANES), tokens)
    )
    keep = torch.full((len(LANES), most), -1)
    is_held = torch.arange(tokens) < held[:, None]
    for lane, (n, m) in enumerate(LANES):
        protected = {*range(SINKS), *range(n - RECENT, n)} if m > SINKS + RECENT else set()
        rest = [i for i in torch.randperm(n, generator=generator).tolist() if i not in protected]
        keep[lane, :m] = torch.tensor(sorted([*protected, *rest][:m]))
    return MergeView(
        keys=keys * is_held[..., None],
        values=values * is_held[..., None],
        kept=held,
        keep=keep,
        count=count,
        scores=torch.rand(len(LANES), tokens, generator=generator).masked_fill(~is_held, torch.nan),
        log_weights=log_weights * is_held,
        sinks=SINKS,
        recent=RECENT,
        ops=backend("cpu"),
    )


def merged(view: MergeView, name: str, knobs: dict[str, Any]) -> Survivors:
    return merge_method(name).merge(view, merge_model(name).model_validate({"policy": name} | knobs))


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(MERGE) == {name for name, _ in CASES}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_merges_what_the_paper_merges(name: str, knobs: dict[str, Any], weighted: bool) -> None:
    for seed in range(3):
        view = view_of(seed, weighted)
        stay = merged(view, name, knobs)
        changed = 0
        for lane, (n, m) in enumerate(LANES):
            kept = view.keep[lane, :m].tolist()
            before = Lane(
                view.keys[lane, :n].double(),
                view.values[lane, :n].double(),
                view.scores[lane, :n].double(),
                view.log_weights[lane, :n].double().exp().tolist(),
                kept,
                SINKS,
                RECENT,
            )
            keys, values, stands_for = ORACLES[name](before, **knobs)
            for place, i in enumerate(kept):
                close(stay.keys[lane, place], keys[i])
                close(stay.values[lane, place], values[i])
                changed += not torch.equal(stay.values[lane, place], view.values[lane, i])
                if stay.log_weights is not None:
                    close(stay.log_weights[lane, place].exp(), torch.tensor(stands_for[i], dtype=torch.float64))
        assert changed or knobs.get("candidates") == 1.0


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_lanes_that_give_nothing_up_stay_as_they_are(name: str, knobs: dict[str, Any]) -> None:
    view = view_of(3, weighted=True)
    stay = merged(view, name, knobs)
    assert torch.equal(stay.keys[1], view.keys[1, : LANES[1][0]])
    assert torch.equal(stay.values[1], view.values[1, : LANES[1][0]])
    if stay.log_weights is not None:
        assert torch.equal(stay.log_weights[1], view.log_weights[1, : LANES[1][0]])


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_padding_says_nothing(name: str, knobs: dict[str, Any]) -> None:
    """The bits of a lane are those it has without the longer lanes beside it."""
    view = view_of(4, weighted=True)
    together = merged(view, name, knobs)
    for lane, (n, m) in enumerate(LANES):
        part = slice(lane, lane + 1)
        alone = MergeView(
            *(side[part, :n] for side in (view.keys, view.values)),
            view.kept[part],
            view.keep[part, :m],
            view.count[part],
            view.scores[part, :n],
            view.log_weights[part, :n],
            SINKS,
            RECENT,
            view.ops,
        )
        stay = merged(alone, name, knobs)
        assert torch.equal(stay.keys[0], together.keys[lane, :m])
        assert torch.equal(stay.values[0], together.values[lane, :m])
        if stay.log_weights is not None and together.log_weights is not None:
            assert torch.equal(stay.log_weights[0], together.log_weights[lane, :m])
