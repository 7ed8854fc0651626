"""Towers run under policies that take tokens away within them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import EncoderPolicy, with_marks
from winnow.engine.compression.vision.ranking import share
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.errors import PlanNotSupported
from winnow.engine.models.vision.build import load_eyes
from winnow.engine.models.vision.reduction import run_layers

from .vision_checkpoints import image_of, image_processor, save_vlm

ENCODER = [name for name in VISION if isinstance(vision_policy(name), EncoderPolicy)]
SIGLIP: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "vision_use_head": False,
        "initializer_range": 0.25,
    },
    "vision_feature_select_strategy": "full",
}
CHANGES: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "CLIP, the class token read": {"vision_feature_select_strategy": "full"},
    "SigLIP": SIGLIP,
    "SigLIP, the last layer": {**SIGLIP, "vision_feature_layer": -1},
}


def plan(name: str, keep: float) -> Vision:
    vision = Plan.parse({"vision": {"policy": name, "keep": keep}}).vision
    assert vision is not None
    return vision


def loaded(folder: Path, family: str, **changes: Any) -> Any:
    save_vlm(folder, family, **changes)
    return load_eyes(folder, torch.device("cpu"), torch.float32)


def read(family: str, height: int = 40, width: int = 60) -> dict[str, np.ndarray]:
    given = image_processor(family)(image_of(height, width), return_tensors="np")
    return {name: value if family in ("llava", "qwen2_vl", "qwen2_5_vl") else value[0] for name, value in given.items()}


@pytest.fixture(scope="module", params=CHANGES)
def eyes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LLaVA-1.5's, of 16 patches."""
    return loaded(tmp_path_factory.mktemp("llava"), "llava", **CHANGES[request.param])


@pytest.mark.parametrize("name", ENCODER)
def test_keeping_all_is_what_the_tower_makes(eyes: Any, name: str) -> None:
    inputs = read("llava")
    view, features = eyes.reduced(inputs, plan(name, 16)), eyes.encode(inputs)
    assert view.tokens.tolist() == list(range(len(features.places)))
    assert torch.equal(view.embeddings, features.embeddings)


@pytest.mark.parametrize("keep", [1, 2, 7, 15])
@pytest.mark.parametrize("name", ENCODER)
def test_as_many_tokens_as_are_kept(eyes: Any, name: str, keep: int) -> None:
    inputs = read("llava")
    view, places = eyes.reduced(inputs, plan(name, keep)), eyes.encode(inputs).places
    assert bool((view.tokens.diff() > 0).all())
    is_patch = places[view.tokens, 0] >= 0
    assert int(is_patch.sum()) == keep
    assert view.tokens[~is_patch].tolist() == (places[:, 0] < 0).nonzero().squeeze(1).tolist()
    assert view.embeddings.dtype == torch.float32 and bool(view.embeddings.isfinite().all())
    again = eyes.reduced(inputs, plan(name, keep))
    assert torch.equal(view.tokens, again.tokens) and torch.equal(view.embeddings, again.embeddings)
    # What is projected is what the layers leave of each patch, at its place.
    embedded = eyes.embed(eyes.pixels(inputs))[0]
    states, left = run_layers(eyes.stack, embedded, eyes.has_class, plan(name, keep), keep)
    expected = eyes._projector(states[-keep:])
    torch.testing.assert_close(view.embeddings[is_patch], expected)
    assert (view.tokens[is_patch] - int((places[:, 0] < 0).sum())).tolist() == left.tolist()


def test_one_crop_of_a_model_that_has_newlines(tmp_path: Path) -> None:
    """OneVision sees an image among others as one crop."""
    eyes = loaded(tmp_path, "llava_onevision")
    inputs = {"pixel_values": read("llava_onevision")["pixel_values"][:1]}
    whole = eyes.encode(inputs)
    assert torch.equal(eyes.reduced(inputs, plan("to_me", 9)).embeddings, whole.embeddings)
    view = eyes.reduced(inputs, plan("to_me", 4))
    # The newline ends the last row: it goes with it, as everywhere.
    assert (9 in view.tokens.tolist()) is bool((view.tokens[view.tokens < 9] >= 6).any())
    assert int((view.tokens < 9).sum()) == 4


@pytest.fixture(scope="module")
def cropping(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """LLaVA-NeXT's, of 16 patches a crop."""
    return loaded(tmp_path_factory.mktemp("next"), "llava_next")


@pytest.mark.parametrize("size", [(32, 32), (40, 60), (90, 20)])  # with padding at the sides, above, and neither
@pytest.mark.parametrize("keep", [1, 3, 0.25, 0.9])
@pytest.mark.parametrize("name", ENCODER)
def test_crops(cropping: Any, name: str, keep: float, size: tuple[int, int]) -> None:
    """Each crop keeps its share, and what is left of it depends on that crop alone."""
    inputs = read("llava_next", *size)
    features, vision = cropping.encode(inputs), plan(name, keep)
    view = cropping.reduced(inputs, vision)
    is_patch = features.places[view.tokens, 0] >= 0
    assert int(is_patch.sum()) == vision.tokens(len(features.patches))
    assert torch.equal(view.tokens, with_marks(features.places, view.tokens[is_patch]))
    assert torch.equal(view.embeddings[~is_patch], features.embeddings[view.tokens[~is_patch]])
    sizes = features.grid[:, 0].bincount().tolist()
    parts = share(vision.tokens(sum(sizes)), sizes, sizes)
    pixels = cropping.pixels(inputs)
    for crop, part in enumerate(parts):
        mine = view.tokens[is_patch & (features.places[view.tokens, 0] == crop)]
        assert len(mine) == part
        if part:
            at = features.places[features.places[:, 0] == crop]
            shown = at[:, 1] * 4 + at[:, 2]
            states, left = run_layers(cropping.stack, cropping.embed(pixels[[crop]])[0], True, vision, part, shown)
            assert (features.places[mine, 1] * 4 + features.places[mine, 2]).tolist() == left.tolist()
            expected = cropping._projector(states[1:])
            torch.testing.assert_close(view.embeddings[torch.isin(view.tokens, mine)], expected)


def test_keeping_all_crops(cropping: Any) -> None:
    inputs = read("llava_next")
    features, view = cropping.encode(inputs), cropping.reduced(inputs, plan("to_me", 1000))
    assert torch.equal(view.tokens, torch.arange(len(features.places)))
    assert torch.equal(view.embeddings, features.embeddings)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        (
            "llava_onevision",
            {},
            "that of llava_onevision has its grid of patches shrunk, for which all are needed",
        ),
        ("llava", {"vision_feature_layer": [-2, -1]}, "that of llava has states of several layers put side by side"),
        ("qwen2_vl", {}, "that of qwen2_vl makes each token of a square of patches"),
        ("qwen2_5_vl", {}, "that of qwen2_5_vl makes each token of a square of patches"),
        ("idefics3", {}, "that of idefics3 makes each token of a square of patches"),
        ("smolvlm", {}, "that of smolvlm makes each token of a square of patches"),
    ],
)
def test_towers_that_cannot(family: str, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(PlanNotSupported) as caught:
        loaded(tmp_path, family, **changes).reduced(read(family), plan("to_me", 0.5))
    assert caught.value.param == "compression.vision.policy"
    assert caught.value.message == (
        f"compression.vision.policy: 'to_me' takes tokens away within the vision tower, and {why}"
    )
