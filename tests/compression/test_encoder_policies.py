"""Policies within the vision tower, on small random towers: against the papers' rules written out."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import EncoderPolicy
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.models.vision.reduction import run_layers

from . import encoder_oracles as oracles

ENCODER = [name for name in VISION if isinstance(vision_policy(name), EncoderPolicy)]
ORACLES: list[tuple[str, dict[str, Any], oracles.Reduce]] = [
    ("to_me", {}, oracles.to_me),
    ("pi_to_me", {}, oracles.pi_to_me(0.9, 1.0)),
    ("pi_to_me", {"margin": 0.4, "alpha": 3.0}, oracles.pi_to_me(0.4, 3.0)),
    ("diff_rate", {}, oracles.diff_rate(0.5)),
    ("diff_rate", {"merge": 0.9}, oracles.diff_rate(0.9)),
    ("dy_mu", {}, oracles.dy_mu([2.0])),  # no cosine is above
    ("dy_mu", {"thresholds": [0.5, 0.8, 0.3]}, oracles.dy_mu([0.5, 0.8, 0.3])),
    ("zero_tprune", {}, oracles.zero_tprune(0.5)),
    ("zero_tprune", {"similar": 0.0}, oracles.zero_tprune(0.0)),
]
LAYERS = 5


@cache
def tower(kind: str) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
    }
    torch.manual_seed(3)
    made: Any
    if kind == "clip":
        made = CLIPVisionModel(CLIPVisionConfig(**shape, initializer_factor=8.0))
    else:
        made = SiglipVisionModel(SiglipVisionConfig(**shape, vision_use_head=False))
        for weight in made.parameters():
            weight.data.normal_(std=0.3)
    return made.eval()


def embedded(kind: str, pixels: Tensor) -> Tensor:
    """[lead + 36, 16]"""
    vit = tower(kind)
    x = vit.embeddings(pixels[None])
    return (vit.pre_layrnorm(x) if kind == "clip" else x)[0]


def pixels(seed: int, blocks: int = 1) -> Tensor:
    """An image of squares that are `blocks` patches wide: their patches are alike."""
    edge = 24 // (4 * blocks)
    small = torch.randn(3, edge, edge, generator=torch.Generator().manual_seed(seed))
    return small.repeat_interleave(4 * blocks, 1).repeat_interleave(4 * blocks, 2)


def plan(name: str, keep: float, **knobs: Any) -> Vision:
    vision = Plan.parse({"vision": {"policy": name, "keep": keep} | knobs}).vision
    assert vision is not None
    return vision


KINDS = pytest.mark.parametrize(("kind", "has_class"), [("clip", True), ("siglip", False)])


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODER)
@KINDS
def test_keeping_all_is_the_tower_itself(kind: str, has_class: bool, name: str) -> None:
    image = pixels(1)
    states, places = run_layers(tower(kind).encoder.layers, embedded(kind, image), has_class, plan(name, 36), 36)
    layers = tower(kind)(image[None], output_hidden_states=True).hidden_states
    expected = layers[-1] if kind == "clip" else tower(kind).encoder(embedded(kind, image)[None]).last_hidden_state
    assert torch.equal(states, expected[0])
    assert places.tolist() == list(range(36))
    states, _ = run_layers(tower(kind).encoder.layers[:-2], embedded(kind, image), has_class, plan(name, 36), 36)
    assert torch.equal(states, layers[-3][0])


def test_every_policy_has_an_oracle() -> None:
    assert {name for name, _, _ in ORACLES} == set(ENCODER)


@torch.no_grad()
@pytest.mark.parametrize(("name", "knobs", "oracle"), ORACLES)
@KINDS
@pytest.mark.parametrize(
    ("keep", "layers", "blocks", "padding"),
    [
        (1, 5, 1, 0),
        (1, 2, 2, 0),  # layers lose more than half of their tokens
        (9, 5, 2, 0),
        (20, 5, 1, 0),
        (33, 5, 2, 0),  # layers lose nothing
        (18, 1, 1, 0),
        (11, 4, 1, 6),  # the first and the last row of patches are padding
        (5, 3, 1, 12),  # most patches are
    ],
)
def test_equals_the_rule_of_the_paper(
    kind: str,
    has_class: bool,
    name: str,
    knobs: dict[str, Any],
    oracle: oracles.Reduce,
    keep: int,
    layers: int,
    blocks: int,
    padding: int,
) -> None:
    vision = plan(name, keep, **knobs)
    stack = deepcopy(tower(kind).encoder.layers[:layers]).double()  # nearly equal merits are not decided by rounding
    x = embedded(kind, pixels(keep, blocks)).double()
    shown = list(range(padding, 36 - padding))
    policy: Any = vision_policy(name)
    states, places = run_layers(stack, x, has_class, vision, keep, torch.tensor(shown) if padding else None)
    counts = policy.counts(layers, len(shown), keep, vision)
    expected, at = oracles.tower(stack, x, has_class, shown, counts, oracle)
    assert places.tolist() == at
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-4)
    assert len(places) == keep or ("thresholds" in knobs and len(places) < keep)


@pytest.mark.parametrize("name", ENCODER)
@given(layers=st.integers(1, 30), patches=st.integers(2, 800), share=st.floats(0, 1, exclude_max=True))
def test_counts_fall_to_what_is_kept(name: str, layers: int, patches: int, share: float) -> None:
    keep = min(1 + int(share * patches), patches - 1)
    policy: Any = vision_policy(name)
    counts = policy.counts(layers, patches, keep, plan(name, keep))
    assert len(counts) == layers and counts[-1] == keep
    assert all(before >= after for before, after in zip([patches, *counts], counts, strict=False))
