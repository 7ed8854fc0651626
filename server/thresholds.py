"""`winnow thresholds`: how alike image tokens have to be for DyMU to merge them, found on a folder of images.

The measuring is in winnow.engine.calibration.merge_thresholds and needs torch; it is imported when the command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import ModelError, RequestError

if TYPE_CHECKING:
    from winnow.engine.compression.vision.plan import Vision
    from winnow.engine.models.vision.processor import Processor
    from winnow.engine.tower_protocol import Inputs

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}


def thresholds(
    model: Annotated[str, typer.Option(help="Directory or Hugging Face name of a model that sees.")],
    images: Annotated[Path, typer.Option(help="Folder of images: png, jpg, jpeg, webp, gif.")],
    keep: Annotated[str, typer.Option(help="What an image is to keep in the mean: 0.25 of its tokens, or 64.")] = "0.5",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if unset.")] = None,
) -> None:
    """Find the thresholds of the vision policy dy_mu for a model.

    Written as a plan's `vision`, for requests and profiles: images like these keep so many tokens in the mean, plain
    ones fewer. `keep` caps what any one keeps; raise it for busy images to keep more.
    """
    try:
        vision = _vision(keep)
        found = _measure(model, images, vision, threads)
    except ModelError as error:
        typer.echo(f"winnow: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(json.dumps({"policy": "dy_mu", "keep": vision.keep, "thresholds": [round(one, 4) for one in found]}))


def _vision(keep: str) -> Vision:
    try:
        count = float(keep) if "." in keep else int(keep)
        vision = Plan.parse({"vision": {"policy": "dy_mu", "keep": count}}).vision
    except (ValueError, RequestError) as error:
        raise ModelError(f"--keep is a fraction such as 0.25 or a count, not {keep}") from error
    if vision is None or vision.keeps_all:
        raise ModelError("--keep 1.0 merges nothing")
    return vision


def _measure(model: str, folder: Path, vision: Vision, threads: int | None) -> list[float]:
    import os

    import torch

    from winnow.engine.calibration.merge_thresholds import merge_thresholds
    from winnow.engine.models.files import resolve_model
    from winnow.engine.models.tokenizer import load_tokenizer
    from winnow.engine.models.vision.build import load_eyes
    from winnow.engine.models.vision.llava import LlavaTower
    from winnow.engine.models.vision.processor import load_processor

    torch.set_num_threads(threads or os.cpu_count() or 1)
    eyes = load_eyes(resolve_model(model), torch.device("cpu"), torch.float32)
    if not isinstance(eyes, LlavaTower):
        raise ModelError(f"{model}: dy_mu acts within the towers of LLaVA models alone")
    processor = load_processor(model, load_tokenizer(model))
    assert processor is not None
    return merge_thresholds(eyes, [_inputs(file, processor) for file in _files(folder)], vision)


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ModelError(f"{folder}: no images")
    return files


def _inputs(file: Path, processor: Processor) -> Inputs:
    from winnow.server.images.bad import BadImage
    from winnow.server.images.decode import Bounds, decode_image
    from winnow.server.settings import Settings

    try:
        return processor.image(decode_image(file.read_bytes(), Bounds.of(Settings()))).inputs
    except (BadImage, ValueError, OSError) as error:
        raise ModelError(f"{file}: {error}") from error
