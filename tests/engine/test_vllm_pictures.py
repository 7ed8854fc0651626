"""Images and videos for vLLM: which plans it carries out on them, and how it sees them. It need not be installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from winnow.engine.compression.capabilities import for_engine, for_pictures
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.policy import Kind
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError, PlanNotSupported
from winnow.engine.messages import EngineInfo
from winnow.engine.vllm.arguments import engine_arguments
from winnow.engine.vllm.pictures import placed
from winnow.engine.vllm.positions import place_as_whole
from winnow.engine.vllm.requests import refusals

from .test_vllm import info_of

KEEP = 0.25
EVS = {"vision": {"policy": "evs", "keep": KEEP}}
WHOLE: dict[str, Any] = {"kv": {"format": "fp8"}}


def info_with(video_keep: float | None) -> EngineInfo:
    sees = {"image": 7, "video": 8}
    return msgspec.structs.replace(info_of("fp8"), refuses=refusals(video_keep), video_keep=video_keep, sees=sees)


# Plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [KEEP, KEEP + 1e-12])
def test_what_it_was_started_with_may_be_asked_for(keep: float) -> None:
    asked = Plan.parse(WHOLE | {"vision": {"policy": "evs", "keep": keep, "positions": "original"}})
    plan = for_engine(asked, info_with(KEEP))
    assert plan.prunes is not None and plan.prunes.keep == keep
    for kinds in ({"video"}, {"video", "image"}):
        assert for_pictures(plan, kinds, info_with(KEEP)) is plan
    with pytest.raises(PlanNotSupported, match="'evs' prunes videos, and there are images"):
        for_pictures(plan, {"image"}, info_with(KEEP))


@pytest.mark.parametrize(
    "vision",
    [
        {"policy": "evs", "keep": 0.5},
        {"policy": "evs", "keep": 1.0},
        {"policy": "evs", "keep": 16},
        {"policy": "uniform", "keep": KEEP},
        {"policy": "evs", "keep": KEEP, "positions": "contiguous"},
    ],
)
def test_no_other_pruning(vision: dict[str, Any]) -> None:
    for info, can in ((info_with(KEEP), '{"policy": "evs", "keep": 0.25}'), (info_with(None), "video_pruning_rate")):
        with pytest.raises(PlanNotSupported) as refused:
            for_engine(Plan.parse({"vision": vision}), info)
        assert refused.value.param == "compression.vision"
        assert can in str(refused.value)


def test_evs_is_refused_where_it_was_not_started_with_it() -> None:
    with pytest.raises(PlanNotSupported, match="video_pruning_rate"):
        for_engine(Plan.parse(EVS), info_with(None))


@pytest.mark.parametrize("kinds", [{"video"}, {"image", "video"}])
def test_a_plan_says_that_videos_are_pruned(kinds: set[Kind]) -> None:
    """Who asks for nothing is told; who asks for a plan without it is refused."""
    default = Plan.parse(WHOLE)
    assert for_pictures(default, kinds, info_with(KEEP), is_asked=False) == Plan.parse(WHOLE | EVS)
    for asked in (default, Plan()):
        with pytest.raises(PlanNotSupported, match="prunes every video") as refused:
            for_pictures(asked, kinds, info_with(KEEP))
        assert refused.value.param == "compression.vision"


@pytest.mark.parametrize("is_asked", [True, False])
def test_images_stay_whole(is_asked: bool) -> None:
    for kinds in (["image"], []):
        assert for_pictures(Plan(), kinds, info_with(KEEP), is_asked) == Plan()
    assert for_pictures(Plan(), {"image", "video"}, info_with(None), is_asked) == Plan()


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "reads_text_only", "is_pruned"),
    [
        ("Qwen2_5_VLForConditionalGeneration", False, True),
        ("Qwen2VLForConditionalGeneration", False, False),
        ("LlavaForConditionalGeneration", True, False),
        ("Qwen3VLForConditionalGeneration", True, False),
        ("LlamaForCausalLM", True, False),
    ],
)
def test_arguments_of_models_that_see(
    tmp_path: Path, architecture: str, reads_text_only: bool, is_pruned: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    said = engine_arguments(EngineSettings(engine="vllm"), tmp_path)
    assert said["skip_tokenizer_init"] is said["language_model_only"] is reads_text_only
    pruning = EngineSettings(engine="vllm", vllm_args={"video_pruning_rate": 0.75})
    if is_pruned:
        assert engine_arguments(pruning, tmp_path)["video_pruning_rate"] == 0.75
        return
    with pytest.raises(ModelError, match=r"vllm_args\.video_pruning_rate: .* Qwen2\.5-VL"):
        engine_arguments(pruning, tmp_path)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_where_pictures_stand() -> None:
    """An image, a video of which two of five stay, and an image behind it."""
    prompt = [1, 7, 7, 2, 3, 8, 8, 8, 8, 8, 4, 7, 5]
    places = [np.array(own) for own in ([1, 2], [5, 6, 7, 8, 9], [11])]
    assert placed(prompt, places, [2, 2, 1]) == ([1, 7, 7, 2, 3, 8, 8, 4, 7, 5], [1, 5, 8])
    assert placed(prompt, places, [2, 5, 1]) == (prompt, [1, 5, 11])


# Positions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    offset: int
    length: int


@dataclass
class Feature:
    """vLLM's description of a picture, which has steps, rows and columns."""

    grid: tuple[int, int, int]
    mm_position: Place


class Model:
    """What vLLM's says of prompts none of whose videos is pruned."""

    config = SimpleNamespace(image_token_id=7, video_token_id=8)

    def __init__(self) -> None:
        place_as_whole(SimpleNamespace(get_model=lambda: self, model_runner=SimpleNamespace()))

    def iter_mm_grid_thw(self, features: Sequence[Feature]) -> list[tuple[int, int, int, int, float]]:
        return [(feature.mm_position.offset, *feature.grid, 1.0) for feature in features]

    def get_mrope_input_positions(self, tokens: list[int], features: Sequence[Feature]) -> tuple[Tensor, int]:
        columns, at, behind = [], 0, 0
        for feature in features:
            offset, grid = feature.mm_position.offset, feature.grid
            columns += [(behind + i,) * 3 for i in range(offset - at)]
            behind += offset - at
            columns += [tuple(behind + i for i in one) for one in np.ndindex(grid)]
            behind += max(grid)
            at = offset + int(np.prod(grid))
        columns += [(behind + i,) * 3 for i in range(len(tokens) - at)]
        assert len(columns) == len(tokens)
        return torch.tensor(columns).T, max(map(max, columns)) + 1 - len(tokens)

    def recompute_mrope_positions(self, **_: Any) -> Any:
        raise AssertionError("vLLM's own was asked")


PICTURES: list[tuple[tuple[int, int, int], list[int]]] = [
    ((2, 3, 1), [0, 1, 2, 4]),  # of a video taller than wide, what stays
    ((1, 2, 2), [0, 1, 2, 3]),  # an image
    ((9, 1, 1), [0, 3]),  # longer than what is left of the prompt, and its end is pruned
]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_what_stays_stands_where_it_would(step: int) -> None:
    """However many tokens are read at once."""
    whole, left, stays, features, whole_features, embedded = [1], [1], [0], [], [], []
    for grid, kept in PICTURES:
        token, size = 7 if grid[0] == 1 else 8, int(np.prod(grid))
        features.append(Feature(grid, Place(len(left), len(kept))))
        whole_features.append(Feature(grid, Place(len(whole), size)))
        stays += [len(whole) + i for i in [*kept, size]]
        whole += [token] * size + [2]
        left += [token] * len(kept) + [2]
        own = np.array(list(np.ndindex(grid)))[kept]
        embedded.append(np.column_stack([np.full(len(kept), 0.5), own, np.full(len(kept), grid[2])]))
    model = Model()
    expected = Model.get_mrope_input_positions(model, whole, whole_features)[0][:, stays]
    positions, ahead = model.get_mrope_input_positions(left, features[::-1])
    rows, is_own = torch.from_numpy(np.concatenate(embedded)), torch.tensor(left) > 2
    for first in range(0, len(left), step):
        read = slice(first, min(first + step, len(left)))
        bounds = [(one.mm_position.offset, one.mm_position.offset + one.mm_position.length) for one in features]
        before = [int(is_own[: max(min(edge, read.stop), first)].sum()) for bound in bounds for edge in bound]
        parts = [rows[a:b] for a, b in zip(before[::2], before[1::2], strict=True) if a < b]
        seen, positions, ahead = model.recompute_mrope_positions(
            input_ids=left, multimodal_embeddings=parts, mrope_positions=positions, num_computed_tokens=first
        )
        assert all(one.shape == (len(part), 1) for one, part in zip(seen, parts, strict=True))
        assert torch.equal(positions[:, : read.stop], expected[:, : read.stop])
        assert (positions[:, ~is_own] == expected[:, ~is_own]).all(), "text has its place from the start"
    assert ahead == int(expected.max()) + 1 - len(left)


def test_text_alone() -> None:
    model = Model()
    positions, ahead = model.get_mrope_input_positions([1, 2, 3], [])
    assert positions.tolist() == [[0, 1, 2]] * 3 and ahead == 0
