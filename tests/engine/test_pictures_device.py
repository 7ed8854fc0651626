"""Pictures on a device whose memory is not the host's: towers, policies and the rows they leave, to the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from winnow.engine.compression.vision.policy import EncoderPolicy
from winnow.engine.compression.vision.registry import VISION, vision_policy
from winnow.engine.models.loader import load_model
from winnow.engine.models.vision.build import load_eyes
from winnow.kernels.dispatch import Backend, backend

from .bench import Bench, assert_same
from .device import DEVICE, OpsThere
from .test_vision_models import ONE, TEXT, TWO, VIDEO, Model

THERE = OpsThere(backend("cpu"))
NEW = 6
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
POLICIES = {name: vision_policy(name) for name in VISION}
SIGNALS = ["vtc_cls", "vision_zip", "vis_pruner", "must_drop", "sparse_vlm"]
"""By attention, keys and states of the tower, and by what is attended to between layers"""
SNAPKV: dict[str, Any] = {"evict": {"policy": "snapkv", "budget": 0.6, "window": 4}, "format": "int4", "residual": 4}


def plans(model: Model) -> list[dict[str, Any]]:
    """None, policies, and one whose tokens are compressed as all others are. Of policies all on LLaVA's images, and on
    other models' those that ask for something that is made there."""
    named = [name for name, policy in POLICIES.items() if "image" in policy.kinds]
    if model.family == "llava_next":
        named = [name for name in named if isinstance(POLICIES[name], EncoderPolicy)]
    elif model.family != "llava":
        named = SIGNALS
    seen = [{"vision": {"policy": name, "keep": 0.5}} for name in named]
    return [{}, *seen, {"vision": {"policy": "vtc_cls", "keep": 0.5}, "kv": SNAPKV}]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, ops: Backend, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param), ops)


def test_all_in_one_batch(model: Model) -> None:
    """Encoded, pruned before the model reads them and between its layers, and answered, in chunks that end within."""
    there = Bench(
        load_model(str(model.folder), THERE, "f32"),
        ops=THERE,
        profiles={},
        eyes=load_eyes(model.folder, DEVICE, torch.float32),
        max_step_tokens=50,
    )
    here = model.bench(profiles={}, max_step_tokens=50)
    films = [name for name, policy in POLICIES.items() if policy.kinds == {"video"}] if VIDEO in model.prompts else []
    asked = [(f"{i}", TWO if i % 2 else ONE, plan) for i, plan in enumerate(plans(model))]
    asked += [(name, VIDEO, {"vision": {"policy": name, "keep": 0.5}}) for name in films]
    for bench in (here, there):
        for name, parts, plan in [*asked, ("text", TEXT, {})]:
            tokens, pictures = model.request(parts)
            bench.submit(name, tokens, NEW, plan, pictures=pictures)
        bench.run()
    for choice, wanted in here.seen.items():
        assert wanted.rejected is None, (choice, wanted.rejected)
        assert_same(there.seen[choice], wanted)
        assert there.seen[choice].last.compression == wanted.last.compression
