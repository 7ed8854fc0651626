"""Vision policies against the papers' rules, computed token by token (`vision_oracles`)."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision import ranking
from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import TokenPolicy, View
from winnow.engine.compression.vision.ranking import Likeness, evenly, share, spread, top
from winnow.engine.compression.vision.registry import VISION, vision_policy

from .images import LAYOUTS, drawn, grid, image, layouts
from .pooling_oracles import ORACLES as POOLING_ORACLES
from .video_oracles import ORACLES as VIDEO_ORACLES
from .vision_oracles import ORACLES as IMAGE_ORACLES
from .vision_oracles import Case, assert_left, shares

ORACLES = IMAGE_ORACLES | POOLING_ORACLES | VIDEO_ORACLES

DRAWN = {"random", "token_corr"}
"""Policies that draw, of which tests of their own look at how"""

KNOBS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "vtc_cls": {"layers": st.integers(1, 9)},
    "vision_zip": {"contextual": st.sampled_from([0.0, 0.15625, 0.5, 0.95])},
    "vis_pruner": {"important": st.sampled_from([0.0, 0.5, 1.0]), "step": st.sampled_from([1, 3, 8])},
    "holo_v": {"segments": st.integers(1, 40), "variance_weight": st.sampled_from([0.0, 0.09, 2.0])},
    "apet": {"basis": st.integers(1, 12)},
    "duet_vlm": {"contextual": st.sampled_from([0.0, 0.17, 0.95]), "width": st.integers(1, 5)},
    "must_drop": {
        "window": st.integers(1, 4),
        "similarity": st.sampled_from([-1.0, 0.0, 0.1, 0.8]),
        "key_share": st.sampled_from([0.0, 0.08, 0.5, 1.0]),
    },
    "flash_vlm": {"text_weight": st.sampled_from([0.0, 0.5, 1.0]), "diverse": st.sampled_from([0.0, 0.5, 1.0])},
    "id_pruner": {"relevance": st.sampled_from([0.0, 0.5, 1.0])},
    "stc": {"chunk": st.integers(1, 4)},
    "flash_vid": {"alpha": st.sampled_from([0.0, 0.5, 1.0]), "segments": st.integers(1, 9)},
    "aot": {"clips": st.integers(1, 9), "distinct": st.sampled_from([0.0, 0.3, 1.0])},
    "global_com2": {"temperature": st.sampled_from([0.5, 10.0])},
}


def plan(name: str, keep: float, **knobs: Any) -> Vision:
    vision = Plan.parse({"vision": {"policy": name, "keep": keep} | knobs}).vision
    assert vision is not None
    return vision


def patches(picture: Features, view: View) -> list[int]:
    return [token for token in view.tokens.tolist() if picture.places[token, 0] >= 0]


def test_every_policy_has_an_oracle() -> None:
    assert set(ORACLES) | DRAWN >= {name for name in VISION if isinstance(vision_policy(name), TokenPolicy)}


@settings(max_examples=25, deadline=None)
@given(data=st.data(), keep=st.floats(0.02, 0.98), seed=st.integers(0, 50))
@pytest.mark.parametrize("name", ORACLES)
def test_as_the_paper_says(name: str, data: st.DataObject, keep: float, seed: int) -> None:
    picture = image(*LAYOUTS[data.draw(st.sampled_from(layouts(name)), "layout")], seed=seed)
    knobs = {knob: data.draw(values, knob) for knob, values in KNOBS.get(name, {}).items()}
    vision = plan(name, keep, **knobs)
    tokens = vision.tokens(len(picture.patches))
    assume(tokens < len(picture.patches))
    text = drawn((data.draw(st.sampled_from([0, 1, 6]), "words"), 8), seed + 1)
    view = vision.view(picture, text, 5)
    assert_left(picture, view, ORACLES[name](Case(picture, tokens, text, 5, vision)))


@pytest.mark.parametrize("name", ["vtc_cls", "holo_v", "id_pruner", "flash_vlm", "vis_pruner", "vision_zip"])
def test_equal_attention_keeps_what_stands_first(name: str) -> None:
    knobs = {"vis_pruner": {"important": 1.0}, "vision_zip": {"contextual": 0.0}, "flash_vlm": {"diverse": 0.0}}
    knobs |= {"id_pruner": {"relevance": 1.0}, "holo_v": {"segments": 1}}
    picture = image(grid(0, 6, 6), levels=1)
    view = plan(name, 9, **knobs.get(name, {})).view(picture, torch.zeros(0, 8), 5)
    assert view.tokens.tolist() == list(range(9))


@pytest.mark.parametrize("name", ["div_prune", "to_dre", "id_pruner"])
def test_duplicates_come_last(name: str) -> None:
    """Three directions, each several times: one of each stays before any stays twice, the first of equal ones."""
    directions = torch.eye(8)[[0, 1, 1, 0, 2, 2, 2, 1, 0]]
    picture = image(grid(0, 3, 3), levels=1)
    picture = Features(embeddings=directions, places=picture.places, signals=picture.signals)
    assert plan(name, 3).view(picture, torch.zeros(0, 8), 5).tokens.tolist() == [0, 1, 4]
    assert plan(name, 4).view(picture, torch.zeros(0, 8), 5).tokens.tolist() == [0, 1, 2, 4]


def test_text_is_what_flash_vlm_goes_by() -> None:
    picture = image(grid(0, 6, 6), levels=1)
    embeddings = drawn((36, 8), 3)
    picture = Features(embeddings=embeddings, places=picture.places, signals=picture.signals)
    for word in (4, 30):
        view = plan("flash_vlm", 2, diverse=0.0).view(picture, embeddings[[word]], 5)
        assert word in view.tokens.tolist()


def test_draws_are_the_images_own() -> None:
    picture = image(grid(0, 6, 6))
    for name in sorted(DRAWN):
        views = [plan(name, 9, seed=knob).view(picture, torch.zeros(0, 8), seed) for knob in (0, 1) for seed in (5, 6)]
        assert len({tuple(view.tokens.tolist()) for view in views}) == 4


def test_random_draws_evenly() -> None:
    picture = image(grid(0, 4, 4))
    counts = Counter(
        token
        for seed in range(400)
        for token in plan("random", 4).view(picture, torch.zeros(0, 8), seed).tokens.tolist()
    )
    assert sum(counts.values()) == 1600
    assert all(abs(counts[token] - 100) < 45 for token in range(16))  # five standard deviations


def test_token_corr_draws_by_attention() -> None:
    """Of one token each time: as often as it is looked at."""
    picture = image(grid(0, 2, 3), seed=4)
    attention = picture.signals.attention(-1)
    chances = (attention / attention.sum()).tolist()
    counts = Counter(plan("token_corr", 1).view(picture, torch.zeros(0, 8), seed).tokens.item() for seed in range(1000))
    for token, chance in enumerate(chances):
        assert abs(counts[token] - 1000 * chance) < 5 * math.sqrt(1000 * chance * (1 - chance))


def test_token_corr_gives_more_to_crops_whose_tokens_differ() -> None:
    picture = image(*LAYOUTS["frames"], seed=1)

    class Signals:
        layers, nbytes = 1, 0

        def attention(self, layer: int) -> torch.Tensor:
            return torch.full((48,), 1 / 16)

        def keys(self, layer: int) -> torch.Tensor:
            keys = torch.eye(48)
            keys[:16] = keys[0]  # the first says one thing, of the second a half, and the third never the same
            keys[16:24] = keys[16]
            return keys

        def hidden(self, layer: int) -> torch.Tensor:
            raise AssertionError

    picture = Features(embeddings=picture.embeddings, places=picture.places, signals=Signals())
    view = plan("token_corr", 12).view(picture, torch.zeros(0, 8), 5)
    assert [int(((view.tokens // 16) == crop).sum()) for crop in range(3)] == [0, 4, 8]


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7), data=st.data())
def test_shares(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(0, 4), min_size=len(sizes), max_size=len(sizes)))
    count = data.draw(st.integers(0, sum(sizes)))
    parts = share(count, weights, sizes)
    assert sum(parts) == count
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
    assert parts == shares(count, [float(weight) for weight in weights], sizes)


@pytest.mark.parametrize(
    ("count", "weights", "sizes", "parts"),
    [
        (4, [1, 1, 1], [9, 9, 9], [2, 1, 1]),  # what is left over goes to the first of equals
        (5, [1, 0, 0], [3, 9, 9], [3, 1, 1]),  # what the only one of weight cannot take, the others do
        (6, [9, 1, 1], [2, 9, 9], [2, 2, 2]),
        (3, [0, 0], [2, 4], [1, 2]),
        (0, [1, 1], [2, 2], [0, 0]),
        (4, [1, 1], [2, 2], [2, 2]),
    ],
)
def test_how_parts_are_shared(count: int, weights: list[float], sizes: list[int], parts: list[int]) -> None:
    assert share(count, weights, sizes) == parts


def test_ties_go_to_the_first() -> None:
    assert top(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
    assert evenly(7, 3).tolist() == [1, 3, 5]
    assert evenly(3, 3).tolist() == [0, 1, 2]


def test_many_tokens_are_compared_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    units = ranking.unit(drawn((50, 8), 3))
    full = Likeness(units, 20)
    monkeypatch.setattr(ranking, "MOST_IN_FULL", 49)
    monkeypatch.setattr(ranking, "BLOCK", 16)
    piecewise, few = Likeness(units, 20), Likeness(units, 3)
    chosen = torch.arange(3, 30, 2)
    assert (
        spread(piecewise, chosen, 20).tolist() == spread(few, chosen, 20).tolist() == spread(full, chosen, 20).tolist()
    )
    others = (units @ units.T).fill_diagonal_(-2).amax(1)
    for like in (full, piecewise, few):
        torch.testing.assert_close(like.largest(), others)
        torch.testing.assert_close(like.of(3), units @ units[3])
        torch.testing.assert_close(like.nearest(chosen), (units @ units[chosen].T).amax(1))
