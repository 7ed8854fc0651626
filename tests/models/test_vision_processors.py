"""What the server gives towers and prompts is what transformers' own processors make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    SmolVLMProcessor,
)

from winnow.engine.errors import ModelError, RequestError
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.models.vision.build import load_eyes
from winnow.engine.models.vision.processor import Processed, load_processor

from .checkpoints import random_model
from .vision_checkpoints import FAMILIES, IDS, WITH_VIDEO, chat_template, image_of, image_processor, save_vlm, tokenizer

SIZES = [(50, 70), (32, 32), (20, 90), (130, 60), (1, 1), (3, 200), (400, 5)]
_ANYRES: dict[str, Any] = {
    "patch_size": 8,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
_ONEVISION = {"num_image_tokens": 9, "vision_aspect_ratio": "anyres_max_4", "vision_feature_select_strategy": "full"}
_IDEFICS = {"image_seq_len": 4, "fake_image_token": "<fake_token_around_image>", "global_image_tag": "<global-img>"} | {
    "global_image_token": "<global-img>"
}
_OWN: dict[str, tuple[Any, dict[str, Any]]] = {
    "llava": (LlavaProcessor, _ANYRES),
    "llava_next": (LlavaNextProcessor, _ANYRES),
    "llava_onevision": (LlavaOnevisionProcessor, _ONEVISION),
    "qwen2_vl": (Qwen2VLProcessor, {}),
    "qwen2_5_vl": (Qwen2_5_VLProcessor, {}),
    "idefics3": (Idefics3Processor, _IDEFICS),
    "smolvlm": (SmolVLMProcessor, _IDEFICS),
}


class Model:
    """A checkpoint, its processor here, and transformers', of which those for videos too cannot be made here."""

    def __init__(self, family: str, folder: Path):
        save_vlm(folder, family)
        self.family = family
        self.images = image_processor(family)
        self.tokenizer = load_tokenizer(str(folder))
        self.processor: Any = load_processor(str(folder), self.tokenizer)
        self.eyes: Any = load_eyes(folder, torch.device("cpu"), torch.float32)
        cls, options = _OWN[family]
        self.own = cls.__new__(cls)
        vars(self.own).update(options, image_processor=self.images, video_processor=self.images)
        marks = ("<|image_pad|>", "<|video_pad|>") if family.startswith("qwen") else ("<image>", "<video>")
        self.own.image_token, self.own.video_token = marks

    def check(self, made: Processed, kind: str = "image") -> None:
        """There are as many placeholders as the tower makes tokens."""
        ids = self.tokenizer.encode(made.text, add_special_tokens=False)
        assert ids.count(self.eyes.sees[kind]) == len(self.eyes.encode(made.inputs).embeddings)
        assert IDS["<unk>"] not in ids


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("size", SIZES)
def test_an_image(model: Model, size: tuple[int, int]) -> None:
    image = image_of(*size)
    made = model.processor.image(image)
    more = {"return_row_col_info": True} if model.family in ("idefics3", "smolvlm") else {}
    read = model.images(image, return_tensors="np", **more)
    assert made.text == model.own.replace_image_token(read, 0)
    for name, value in made.inputs.items():
        is_flat = name == "pixel_values" and model.family in ("llava", "qwen2_vl", "qwen2_5_vl")
        assert np.array_equal(value, read[name] if is_flat else read[name][0]), name
    left_out = {"pixel_attention_mask", "batch_num_images"}
    assert made.inputs.keys() == read.keys() - left_out
    model.check(made)


@pytest.mark.parametrize("size", SIZES)
def test_how_crops_lie(model: Model, size: tuple[int, int]) -> None:
    made = model.processor.image(image_of(*size))
    features = model.eyes.encode(made.inputs)
    crops = int(features.places[:, 0].max())  # behind the thumbnail
    if features.crop_grid is None:
        assert not crops
        return
    rows, columns = features.crop_grid
    assert crops in (rows * columns, 0)  # of an image that is all but a line nothing beside padding may be left
    assert columns > rows or size[1] < 2 * size[0]
    assert rows > columns or size[0] < 2 * size[1]
    if "rows" in made.inputs:
        with pytest.raises(RequestError, match=f"must say how {crops} crops lie"):
            model.eyes.encode(made.inputs | {"cols": made.inputs["cols"] + 1})


def test_an_image_among_others(model: Model) -> None:
    image = image_of(50, 70)
    made = model.processor.image(image, is_alone=False)
    model.check(made)
    if model.family != "llava_onevision":
        assert made.text == model.processor.image(image).text
        return
    read = model.images([[image, image_of(20, 20)]], return_tensors="np")
    assert made.text == model.own.replace_image_token(read, 0)
    assert np.array_equal(made.inputs["pixel_values"], read["pixel_values"][0][:1])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_video(model: Model, count: int) -> None:
    frames = [image_of(40, 60, seed) for seed in range(count)]
    if model.family not in WITH_VIDEO:
        with pytest.raises(ValueError, match="no videos"):
            model.processor.video(frames)
        return
    made = model.processor.video(frames)
    model.check(made, "video")
    pixels = made.inputs["pixel_values_videos"]
    if model.family == "llava_onevision":
        assert made.text == model.own.replace_video_token({"pixel_values_videos": pixels[None]}, 0)
        for frame, seen in zip(frames, pixels, strict=True):  # a frame is resized as an image's thumbnail is
            assert np.array_equal(seen, model.images(frame, return_tensors="np")["pixel_values"][0][0])
        return
    grid = made.inputs["video_grid_thw"]
    assert made.text == model.own.replace_video_token({"video_grid_thw": grid[None]}, 0)
    assert grid[0] == -(-count // 2)
    of_frames = pixels.reshape(*grid.tolist(), 3, 2, 16)
    for i in range(2 * int(grid[0])):
        alone = model.images(frames[min(i, count - 1)], return_tensors="np")["pixel_values"]
        seen = alone.reshape(*grid[1:].tolist(), 3, 2, 16)[..., 0, :]  # an image's patch holds it twice
        assert np.array_equal(of_frames[i // 2, ..., i % 2, :], seen)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ["video_preprocessor_config.json", "processor_config.json"])
def test_videos_have_their_own_sizes(family: str, name: str, tmp_path: Path) -> None:
    save_vlm(tmp_path, family)
    settings = {"size": {"shortest_edge": 64, "longest_edge": 16 * 16}}
    (tmp_path / name).write_text(json.dumps({"video_processor": settings} if name.startswith("proc") else settings))
    processor: Any = load_processor(str(tmp_path), load_tokenizer(str(tmp_path)))
    grid = processor.video([image_of(48, 48)]).inputs["video_grid_thw"]
    assert grid.tolist() == [1, 4, 4]
    assert processor.image(image_of(48, 48)).inputs["image_grid_thw"].tolist() == [1, 12, 12]


def test_what_a_model_cannot_take(model: Model) -> None:
    if model.family.startswith("qwen"):
        with pytest.raises(ValueError, match="aspect ratio"):
            model.processor.image(image_of(1, 300))
    else:
        model.check(model.processor.image(image_of(1, 300)))


def test_marks_are_what_the_template_writes(model: Model) -> None:
    parts = [{"type": "text", "text": "what"}, *({"type": kind} for kind in model.processor.marks)]
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": parts}])
    assert all(text.count(mark) == 1 for mark in model.processor.marks.values())
    assert model.processor.marks.keys() == model.eyes.sees.keys()


def test_a_chat_template_of_the_processor(tmp_path: Path) -> None:
    """Older checkpoints have it in a file of its own."""
    save_vlm(tmp_path, "llava")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": chat_template("llava")}))
    assert load_tokenizer(str(tmp_path)).chat_template == chat_template("llava")


def test_a_model_that_reads_text_only(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), load_tokenizer(str(tmp_path))) is None
    assert load_eyes(tmp_path, torch.device("cpu"), torch.float32) is None
    script = f"""
import sys
from winnow.engine.models.tokenizer import load_tokenizer
from winnow.engine.models.vision.processor import load_processor
assert load_processor({str(tmp_path)!r}, load_tokenizer({str(tmp_path)!r})) is None
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ), timeout=120)


def test_a_checkpoint_without_its_image_processor(tmp_path: Path) -> None:
    save_vlm(tmp_path, "llava")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="the image processor cannot be loaded"):
        load_processor(str(tmp_path), load_tokenizer(str(tmp_path)))
