"""Every vision policy on checkpoints with towers of their own: keeping all is no plan, and all of them, composed with
eviction and formats, run in one batch as each does alone."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.policy import VIDEOS, EncoderPolicy
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.messages import Picture
from winnow.kernels.dispatch import Backend

from .bench import Seen, assert_same
from .test_vision_models import OTHER, TWO, VIDEO, Model, Part

NEW = 4
KV: list[dict[str, Any]] = [
    {},
    {"evict": {"policy": "snapkv", "budget": 0.5, "window": 8}},
    {"format": "int4", "residual": 8},
    {"evict": {"policy": "knorm", "budget": 24}, "format": "int8"},
]
"""What stands beside `vision`, in turn"""


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ops: Backend) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param), ops)


def request(model: Model, parts: list[Part]) -> tuple[list[int], list[Picture]]:
    """The prompt, and its pictures with its last tokens as their text."""
    prompt, pictures = model.request(parts)
    return prompt, [structs.replace(one, text=prompt[-4:], turn_end=len(prompt)) for one in pictures]


def asked(model: Model, keep: float) -> list[tuple[str, list[int], list[Picture], dict[str, Any]]]:
    """One request for each policy that this model's pictures can be pruned by."""
    found = []
    for index, name in enumerate(VISION):
        policy = vision_policy(name)
        kinds, acts_in_tower = policy.kinds, isinstance(policy, EncoderPolicy)
        if (kinds == VIDEOS and "video" not in model.eyes.sees) or (
            acts_in_tower and model.family == "llava_onevision"
        ):
            continue  # OneVision's tower cannot be reduced where it shrinks the grid of an image afterwards
        parts = VIDEO if kinds == VIDEOS else (OTHER, TWO)[index % 2]
        plan = {"vision": {"policy": name, "keep": keep}, "kv": KV[index % len(KV)]}
        found.append((name, *request(model, parts), plan))
    return found


def alone(model: Model, prompt: list[int], pictures: list[Picture], plan: dict[str, Any]) -> Seen:
    return model.bench(prefix_caching=False, image_cache_gib=0).alone(prompt, NEW, plan, pictures=pictures)


def test_keeping_all_is_no_plan(model: Model) -> None:
    without: dict[str, Seen] = {}
    for name, prompt, pictures, plan in asked(model, 10_000):
        seen = alone(model, prompt, pictures, plan)
        assert seen.rejected is None, (name, seen.rejected)
        same = repr((prompt, plan["kv"]))
        if same not in without:
            without[same] = alone(model, prompt, pictures, {"kv": plan["kv"]})
        assert_same(seen, without[same])
        report = seen.last.compression
        assert report is not None and report.image_tokens_kept == report.image_tokens > 0, name


def test_all_policies_in_one_batch(model: Model) -> None:
    requests = asked(model, 0.4)
    bench = model.bench(max_step_tokens=64)
    for name, prompt, pictures, plan in requests:
        bench.submit(name, prompt, NEW, plan, pictures=pictures)
    bench.run()
    for name, prompt, pictures, plan in requests:
        seen, other = bench.seen[name, 0], alone(model, prompt, pictures, plan)
        assert seen.rejected is None, (name, seen.rejected)
        assert_same(seen, other)
        vision = Plan.parse(plan).vision
        assert vision is not None
        report = seen.last.compression
        assert report is not None, name
        assert report.tokens_kept_mean < len(prompt) + NEW - 1, name
        assert "pre_llm" not in vision.stages or report.image_tokens_kept < report.image_tokens, name
