"""What holds for every vision policy in the registry."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.vision.features import Features, Signals, VisionSignal
from winnow.engine.compression.vision.plan import Vision, vision_model, vision_schema
from winnow.engine.compression.vision.policy import ANY_KIND, STAGES, TokenPolicy, View, kept, stages_of
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import PlanNotSupported

from .images import LAYERS, LAYOUTS, MARK, beside, drawn, grid, image, layouts

TOKEN = [name for name in VISION if isinstance(vision_policy(name), TokenPolicy)]


def test_one_file_and_one_line_per_policy() -> None:
    folder = Path(import_module("winnow.engine.compression.vision.policies").__path__[0])
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(VISION)
    for name, place in VISION.items():
        assert place.startswith(f"winnow.engine.compression.vision.policies.{name}:")
    assert list(vision_schema()) == list(VISION)


@pytest.mark.parametrize("name", VISION)
def test_conforms(name: str) -> None:
    policy = vision_policy(name)
    assert policy is vision_policy(name)
    assert all(isinstance(signal, VisionSignal) for signal in policy.signals)
    assert policy.kinds and policy.kinds <= ANY_KIND
    assert isinstance(policy.reads_text, bool)
    assert issubclass(policy.Params, PolicyParams)
    assert set(stages_of(policy)) <= set(STAGES) and stages_of(policy)
    assert not set(policy.Params.model_fields) & set(Vision.model_fields), "a knob hides a common one"
    assert all(field.description for field in policy.Params.model_fields.values())
    params = vision_model(name).model_validate({"policy": name, "keep": 0.5})
    assert isinstance(params, policy.Params)
    assert params.stages == stages_of(policy)
    assert (params.kinds, params.reads_text) == (policy.kinds, policy.reads_text)
    module = import_module(VISION[name].split(":")[0])
    assert module.__doc__ is not None and type(policy).__doc__ is not None
    assert "(" in module.__doc__


MERGES = {"avg_pool", "downsample", "vision_zip", "apet", "flash_vid", "aot", "duet_vlm", "must_drop"}
"""Policies that average tokens; the others leave those that stay as they are"""
KEEPS_LESS = {"avg_pool", "downsample"}
"""Policies whose grids need not have exactly `keep` cells"""
KEEPS_MORE = {"must_drop"}
"""A policy that comes to `keep` within the language model"""
WHOLE_FRAME = {"evs"}
"""Policies that keep the first frame, however little `keep` is"""


def view_of(name: str, picture: Features, keep: float, text: torch.Tensor | None = None, seed: int = 5) -> View:
    vision = Plan.parse({"vision": {"policy": name, "keep": keep}}).vision
    assert vision is not None
    return vision.view(picture, torch.zeros(0, 8) if text is None else text, seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VISION)
def test_keeping_all_is_no_pruning(name: str, layout: str) -> None:
    picture = image(*LAYOUTS[layout])
    for keep in (1.0, len(picture.patches), 10_000):
        view = view_of(name, picture, keep)
        assert torch.equal(view.tokens, torch.arange(len(picture.places)))
        assert torch.equal(view.embeddings, picture.embeddings)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    keep=st.floats(0.01, 0.99),
    levels=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("name", TOKEN)
def test_views(name: str, data: st.DataObject, keep: float, levels: int, seed: int) -> None:
    layout = data.draw(st.sampled_from(layouts(name)), "layout")
    picture = image(*LAYOUTS[layout], seed=seed, levels=levels)
    text = drawn((5, 8), seed + 50, levels)
    view = view_of(name, picture, keep, text)
    again = view_of(name, image(*LAYOUTS[layout], seed=seed, levels=levels), keep, text)
    assert torch.equal(view.tokens, again.tokens) and torch.equal(view.embeddings, again.embeddings)
    assert bool((view.tokens.diff() > 0).all())
    assert view.embeddings.shape == (len(view.tokens), 8)
    assert bool(view.embeddings.isfinite().all())
    is_patch = picture.places[view.tokens, 0] >= 0
    asked = max(1, round(keep * len(picture.patches)))
    asked = max(asked, int((picture.places[:, 0] == 0).sum())) if name in WHOLE_FRAME else asked
    assert int(is_patch.sum()) >= 1
    assert int(is_patch.sum()) == asked or name in (KEEPS_LESS if int(is_patch.sum()) < asked else set()) | KEEPS_MORE
    is_itself = (view.embeddings == picture.embeddings[view.tokens]).all(1)
    assert bool(is_itself.all()) or name in MERGES
    assert bool(is_itself[~is_patch].all())
    assert torch.equal(view.tokens[~is_patch], marks_beside(picture, view.tokens[is_patch]))


def marks_beside(picture: Features, stay: torch.Tensor) -> torch.Tensor:
    """Marks of rows that hold some of these patches, counted one by one."""
    places, marks, row = picture.places.tolist(), [], []
    for index, place in enumerate(places):
        if tuple(place) == MARK:
            if any(one in stay.tolist() for one in row) or not row:
                marks.append(index)
            if index + 1 < len(places) and tuple(places[index + 1]) != MARK:
                row = []
        else:
            if row and (places[row[-1]][1], places[row[-1]][0] == 0) != (place[1], place[0] == 0):
                row = []
            row.append(index)
    return torch.tensor(marks, dtype=torch.int64)


@pytest.mark.parametrize(
    ("places", "chosen", "tokens"),
    [
        (grid(0, 2, 2, newlines=True), [4], [4, 5]),
        (grid(0, 2, 2, newlines=True), [0, 4], [0, 2, 4, 5]),
        ([*grid(0, 2, 2), MARK], [1], [1]),  # the newline ends the last row
        ([*grid(0, 2, 2), MARK], [3], [3, 4]),
        ([*grid(0, 1, 2), *beside([1, 2], 1, 2)], [0], [0]),  # a thumbnail of one row is not of the crops' row
        ([*grid(0, 1, 2), *beside([1, 2], 1, 2)], [2], [2, 6]),  # crops side by side are
        ([MARK, *grid(0, 2, 2, newlines=True), MARK], [1], [0, 1, 3]),  # a mark before all ends no row; two end one
    ],
)
def test_marks_go_with_their_rows(places: list[tuple[int, int, int]], chosen: list[int], tokens: list[int]) -> None:
    picture = image(places)
    view = kept(picture, torch.tensor(chosen))
    assert view.tokens.tolist() == tokens
    assert torch.equal(view.embeddings, picture.embeddings[tokens])


def test_what_is_merged_stands_at_its_place() -> None:
    picture = image(grid(0, 2, 3, newlines=True))
    merged = drawn((2, 8), 3)
    view = kept(picture, torch.tensor([5, 0]), merged)
    assert view.tokens.tolist() == [0, 3, 5, 7]
    assert torch.equal(view.embeddings[[2, 0]], merged)
    assert torch.equal(view.embeddings[[1, 3]], picture.embeddings[[3, 7]])


@dataclass(frozen=True)
class Watched:
    """Signals that note what they are asked for."""

    signals: Signals
    asked: set[VisionSignal] = field(default_factory=set)
    layers: int = LAYERS
    nbytes: int = 0

    def attention(self, layer: int) -> Tensor:
        self.asked.add(VisionSignal.ATTENTION)
        return self.signals.attention(layer)

    def keys(self, layer: int) -> Tensor:
        self.asked.add(VisionSignal.KEYS)
        return self.signals.keys(layer)

    def hidden(self, layer: int) -> Tensor:
        self.asked.add(VisionSignal.HIDDEN)
        return self.signals.hidden(layer)


TOWER = {VisionSignal.ATTENTION, VisionSignal.KEYS, VisionSignal.HIDDEN}


@pytest.mark.parametrize("name", TOKEN)
def test_what_a_policy_says_that_it_goes_by(name: str) -> None:
    policy = vision_policy(name)
    picture = image(*LAYOUTS["square"])
    watched = Watched(picture.signals)
    text = drawn((5, 8), 1)
    view = view_of(name, replace(picture, signals=watched), 0.5, text)
    assert watched.asked == policy.signals & TOWER
    other = view_of(name, picture, 0.5, drawn((5, 8), 2))
    assert torch.equal(view.tokens, other.tokens) is not policy.reads_text
    scrambled = replace(picture, embeddings=drawn((36, 8), 9))
    same = torch.equal(view.tokens, view_of(name, scrambled, 0.5, text).tokens)
    assert same or VisionSignal.EMBEDDINGS in policy.signals


def test_an_image_whose_crops_lie_in_no_grid() -> None:
    picture = image(LAYOUTS["thumbnail and crops"][0])
    with pytest.raises(PlanNotSupported) as caught:
        view_of("global_com2", picture, 0.5)
    assert caught.value.param == "compression.vision.policy"
    assert caught.value.message.endswith("'global_com2' needs crops that lie in a grid, and a thumbnail")


@pytest.mark.parametrize("places", [[(0, 0, 0), (0, 0, 1), (0, 1, 0)], [(0, 0, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1)]])
@pytest.mark.parametrize("name", sorted(KEEPS_LESS))
def test_tokens_that_form_no_grid_are_not_pooled(name: str, places: list[tuple[int, int, int]]) -> None:
    with pytest.raises(PlanNotSupported, match=f"'{name}' averages grids, and this image's tokens form none"):
        view_of(name, image(places), 2)
