"""`winnow thresholds`: DyMU's, found on images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from winnow.engine.calibration.merge_thresholds import merge_thresholds
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.vision.plan import Vision
from winnow.engine.errors import ModelError
from winnow.engine.models.vision.build import load_eyes
from winnow.server.cli import app

from ..models.vision_checkpoints import image_of, image_processor, save_vlm

IMAGES, PATCHES = 8, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 model."""
    path = tmp_path_factory.mktemp("llava")
    save_vlm(path, "llava")
    return path


@pytest.fixture(scope="module")
def eyes(folder: Path) -> Any:
    return load_eyes(folder, torch.device("cpu"), torch.float32)


def shown(seed: int) -> Image.Image:
    """Noise; in every second image only at the left, and the rest is of a colour of its own."""
    image = np.array(image_of(32, 32, seed))
    if seed % 2:
        image[:, 8:] = 60 + 10 * seed
    return Image.fromarray(image)


def inputs(seed: int) -> dict[str, np.ndarray]:
    return dict(image_processor("llava")(shown(seed), return_tensors="np"))


def plan(keep: float, **knobs: Any) -> Vision:
    vision = Plan.parse({"vision": {"policy": "dy_mu", "keep": keep} | knobs}).vision
    assert vision is not None
    return vision


@pytest.mark.parametrize("keep", [6, 8, 11])
def test_images_keep_in_the_mean_what_they_are_to(eyes: Any, keep: int) -> None:
    images = [inputs(seed) for seed in range(IMAGES)]
    found = merge_thresholds(eyes, images, plan(keep))
    assert len(found) == len(eyes.stack)
    capped = plan(PATCHES - 1, thresholds=found)
    left = [len(eyes.reduced(one, capped).tokens) for one in images]
    assert sum(left) == IMAGES * keep
    assert sum(left[1::2]) < sum(left[::2]), "plain images keep less than busy ones"


def test_thresholds_are_means_over_batches(eyes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [inputs(seed) for seed in range(IMAGES)]
    halves = [merge_thresholds(eyes, images[at : at + 4], plan(8)) for at in (0, 4)]
    monkeypatch.setattr("winnow.engine.calibration.merge_thresholds.BATCH", 4)
    both = merge_thresholds(eyes, images, plan(8))
    torch.testing.assert_close(torch.tensor(both), torch.tensor(halves).mean(0))


def test_images_that_cannot_be_used(eyes: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="16 patches for this model: to keep 16 merges nothing"):
        merge_thresholds(eyes, [inputs(0)], plan(16))
    save_vlm(tmp_path, "llava_next")
    crops: Any = load_eyes(tmp_path, torch.device("cpu"), torch.float32)
    read = image_processor("llava_next")(shown(0), return_tensors="np")
    with pytest.raises(ModelError, match="several crops"):
        merge_thresholds(crops, [{name: value[0] for name, value in read.items()}], plan(8))


def test_the_command_writes_a_plan(folder: Path, eyes: Any, tmp_path: Path) -> None:
    for seed in range(3):
        shown(seed).save(tmp_path / f"{seed}.png")
    options = ["--model", str(folder), "--images", str(tmp_path), "--keep", "0.5", "--threads", "1"]
    done = CliRunner().invoke(app, ["thresholds", *options])
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    expected = merge_thresholds(eyes, [inputs(seed) for seed in range(3)], plan(0.5))
    assert written.pop("thresholds") == [round(one, 4) for one in expected]
    assert written == {"policy": "dy_mu", "keep": 0.5}
    assert Plan.parse({"vision": json.loads(done.stdout)}).vision is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--images": "/nowhere"}, "/nowhere: no images"),
        ({"--keep": "much"}, "--keep is a fraction such as 0.25 or a count, not much"),
        ({"--keep": "1.5"}, "--keep is a fraction such as 0.25 or a count, not 1.5"),
        ({"--keep": "1.0"}, "--keep 1.0 merges nothing"),
        ({"--model": "/nowhere"}, "no such directory"),
        ({"--model": "default"}, "default: dy_mu acts within the towers of LLaVA models alone"),
    ],
)
def test_mistakes_are_said_in_one_line(options: dict[str, str], message: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    stated = {"--model": str(folder), "--images": str(tmp_path)} | options
    result = CliRunner().invoke(app, ["thresholds", *(word for pair in stated.items() for word in pair)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_image(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no image")
    result = CliRunner().invoke(app, ["thresholds", "--model", str(folder), "--images", str(tmp_path)])
    assert result.exit_code == 2
    assert "0.png: " in result.stderr
