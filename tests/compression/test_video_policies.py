"""Video policies on scenes that move a little and are cut, which frames drawn at random never are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.features import Features
from winnow.engine.compression.vision.policy import View

from .images import MARK, FakeSignals, drawn, grid
from .video_oracles import ORACLES
from .vision_oracles import Case, assert_left

NO_TEXT = torch.zeros(0, 8)


def video(
    scenes: list[int], height: int, width: int, seed: int = 0, change: float = 0.3, newline: bool = True
) -> Features:
    """Scenes of so many frames, each like the one before but for noise of this length; a newline at the end."""
    frames = []
    for scene, length in enumerate(scenes):
        frame = drawn((height * width, 8), 100 * seed + scene)
        for step in range(length):
            frames.append(frame)
            frame = frame + change * drawn((height * width, 8), 100 * seed + 10 * scene + step + 1)
    places = torch.tensor([place for number in range(len(frames)) for place in grid(number, height, width)])
    marks = torch.tensor([MARK] * newline, dtype=torch.int64).view(-1, 3)
    at = torch.cat((places, marks))
    embeddings = torch.cat((*frames, drawn((len(marks), 8), 99)))
    return Features(embeddings=embeddings, places=at, signals=FakeSignals(at[:, 0] >= 0, seed, 0))


def pruned(name: str, keep: float, picture: Features, **knobs: Any) -> View:
    vision = Plan.parse({"vision": {"policy": name, "keep": keep} | knobs}).vision
    assert vision is not None
    return vision.view(picture, NO_TEXT, 5)


@settings(max_examples=15, deadline=None)
@given(
    keep=st.floats(0.02, 0.98),
    scenes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    change=st.sampled_from([0.05, 0.3, 0.8]),
    threshold=st.sampled_from([0.5, 0.8, 0.97]),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("name", ORACLES)
def test_as_the_paper_says(
    name: str, keep: float, scenes: list[int], change: float, threshold: float, seed: int
) -> None:
    picture = video(scenes, 3, 4, seed, change)
    knobs = (
        {"segments": 2, "segment_threshold": threshold, "temporal_threshold": threshold} if name == "flash_vid" else {}
    )
    vision = Plan.parse({"vision": {"policy": name, "keep": keep} | knobs}).vision
    assert vision is not None
    left = ORACLES[name](Case(picture, vision.tokens(len(picture.patches)), NO_TEXT, 5, vision))
    assert_left(picture, vision.view(picture, NO_TEXT, 5), left)


def test_evs_keeps_what_changes() -> None:
    """Of a still scene of which one cell changes, that cell stays, and the first frame, whole."""
    picture = video([4], 3, 4, change=0.0, newline=False)
    picture.embeddings[2 * 12 + 7] += drawn((8,), 3)
    assert pruned("evs", 14, picture).tokens.tolist() == [*range(12), 31, 43]  # it changes, and changes back
    assert pruned("evs", 13, picture).tokens.tolist() == [*range(12), 31]
    for keep in (1, 12):
        assert pruned("evs", keep, picture).tokens.tolist() == list(range(12))


def test_evs_leaves_a_single_frame_whole() -> None:
    assert pruned("evs", 3, video([1], 3, 4, newline=False)).tokens.tolist() == list(range(12))


def test_flash_vid_merges_through_time() -> None:
    """A token that stays where it is becomes one tree, which stands in the first frame of its scene."""
    picture = video([2, 2], 2, 2, change=0.0, newline=False)
    view = pruned("flash_vid", 8, picture, alpha=0.0, segments=2)
    assert view.tokens.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    torch.testing.assert_close(view.embeddings, picture.embeddings[view.tokens])


def test_flash_vid_follows_what_moves() -> None:
    """Tokens that shift by one column from frame to frame join their own, not those of their cell."""
    first = torch.eye(8)[:4]
    rows = (
        torch.cat((first, first.roll(1, 0), first.roll(2, 0)))
        * torch.tensor([1.0, 2.0, 6.0]).repeat_interleave(4)[:, None]
    )
    picture = video([3], 1, 4, newline=False)
    picture = Features(embeddings=rows, places=picture.places, signals=picture.signals)
    view = pruned("flash_vid", 4, picture, alpha=0.0, segments=1)
    assert view.tokens.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(view.embeddings, 3 * first)


def test_aot_keeps_what_is_distinct_in_later_frames() -> None:
    """In a scene at rest one cell changes: it is what the second frame keeps."""
    rows = torch.cat((torch.eye(8), torch.eye(8)))
    rows[8 + 5] = torch.ones(8)
    places = torch.tensor(grid(0, 2, 4) + grid(1, 2, 4))
    picture = Features(embeddings=rows, places=places, signals=FakeSignals(places[:, 0] >= 0, 0, 0))
    assert pruned("aot", 9, picture, clips=1, distinct=0.125).tokens.tolist() == [*range(8), 13]


def test_stc_sees_no_later_frame() -> None:
    """What stays of the first frames does not depend on those that follow."""
    long, short = (video(scenes, 3, 4, newline=False) for scenes in ([3, 3], [3]))
    before = [token for token in pruned("stc", 0.5, long).tokens.tolist() if token < 36]
    assert before == pruned("stc", 0.5, short).tokens.tolist()
