"""Images and videos as a model takes them: what its tower reads, and what stands for them in the prompt.

For the server, in threads. The arithmetic on pixels is that of transformers' image processors on PIL. They import
torch, so they are imported when a model that sees is loaded, and never for one that reads text only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from winnow.engine.errors import ModelError
from winnow.engine.models.files import read_json, resolve_model
from winnow.engine.models.vision.anyres import layout_for
from winnow.engine.models.vision.names import vision_type

if TYPE_CHECKING:
    from PIL.Image import Image

    from winnow.engine.models.tokenizer import Tokenizer

FRAMES_PER_SECOND = 2.0
"""What videos are taken to be sampled at, as those were that Qwen2.5-VL is made for"""


@dataclass(frozen=True)
class Processed:
    """An image or a video, ready for tower and prompt."""

    inputs: dict[str, NDArray[Any]]
    """What the tower reads, under transformers' names: of one image, so without the axis that counts images"""
    text: str
    """What stands for it instead of the mark that the chat template writes"""


def load_processor(path_or_name: str, tokenizer: Tokenizer) -> Processor | None:
    """The image processor of a model, named as for `load_model`; None where the model reads text only.

    Raises
        ModelError: its files are missing or cannot be used
    """
    path = resolve_model(path_or_name, weights=False)
    kind = vision_type(path)
    if kind is None:
        return None
    from transformers import AutoConfig, AutoImageProcessor

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        images = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True, trust_remote_code=False)
        return _PROCESSORS[kind](config, images, _video_settings(path), tokenizer)
    except Exception as error:  # the library raises no narrower type
        raise ModelError(f"{path}: the image processor cannot be loaded: {error}") from error


def _video_settings(path: Path) -> dict[str, Any]:
    """Where videos are to be processed otherwise than images are."""
    nested = read_json(path / "processor_config.json").get("video_processor", {})
    return read_json(path / "video_preprocessor_config.json") or nested


class Processor(ABC):
    """Threads may share it."""

    def __init__(self, config: Any, images: Any, videos: Mapping[str, Any], tokenizer: Tokenizer):
        """
        Args
            config: transformers' of the whole model
            images: transformers' image processor
            videos: what differs for videos
        """
        self._config = config
        self._images = images
        self._videos = videos
        self.marks = {"image": tokenizer.token_text(config.image_token_id)}
        """Of each kind that the model sees: what the chat template writes for one, and what its placeholders are"""

    @abstractmethod
    def image(self, image: Image, is_alone: bool = True) -> Processed:
        """
        Args
            image: in mode RGB
            is_alone: it is the only one of the prompt

        Raises
            ValueError: the model cannot take an image of this shape
        """

    def video(self, frames: Sequence[Image]) -> Processed:
        """Frames in mode RGB, of one size. Raises as `image`; and for models that see no videos."""
        raise ValueError("this model reads no videos")

    @staticmethod
    def _read(processor: Callable[..., Any], images: Any, **options: Any) -> dict[str, NDArray[Any]]:
        """What a processor of transformers makes of images."""
        try:
            return dict(processor(images, return_tensors="np", **options))
        except (ValueError, TypeError, ZeroDivisionError) as error:  # which, of what cannot be fitted, differs
            raise ValueError(str(error)) from error


class LlavaProcessor(Processor):
    """LLaVA-1.5 and LLaVA-NeXT."""

    def image(self, image: Image, is_alone: bool = True) -> Processed:
        read = self._read(self._images, image)
        if self._config.model_type == "llava":
            return self._processed({"pixel_values": read["pixel_values"]}, self._crop_tokens)
        return self._cropped(read)

    def _cropped(self, read: Mapping[str, NDArray[Any]]) -> Processed:
        pixels, size = read["pixel_values"][0], np.asarray(read["image_sizes"][0], np.int64)
        height, width = size.tolist()
        tokens = self._crop_tokens + layout_for(self._config, (height, width)).tokens
        return self._processed({"pixel_values": pixels, "image_sizes": size}, tokens)

    def _processed(self, inputs: dict[str, NDArray[Any]], tokens: int) -> Processed:
        return Processed(inputs, self.marks["image"] * tokens)

    @property
    def _side(self) -> int:
        """Patches along an edge of a crop."""
        return int(self._config.vision_config.image_size // self._config.vision_config.patch_size)

    @property
    def _crop_tokens(self) -> int:
        """Of one crop; its class token may be among them."""
        vision = self._config.vision_config
        keeps_class = vision.model_type == "clip_vision_model" and self._config.vision_feature_select_strategy == "full"
        return self._side**2 + keeps_class


class OnevisionProcessor(LlavaProcessor):
    """LLaVA-OneVision: only an image that is alone is cropped."""

    def __init__(self, config: Any, images: Any, videos: Mapping[str, Any], tokenizer: Tokenizer):
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        super().__init__(config, images, videos, tokenizer)
        self.marks["video"] = tokenizer.token_text(config.video_token_id)
        shared = ("size", "resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
        settings = {name: getattr(images, name) for name in shared}
        self._whole = SiglipImageProcessorPil(**settings)
        self._frame = SiglipImageProcessorPil(**settings | {name: videos[name] for name in shared if name in videos})

    def image(self, image: Image, is_alone: bool = True) -> Processed:
        if is_alone:
            return self._cropped(self._read(self._images, image))
        colour = tuple(int(255 * mean) for mean in self._images.image_mean)
        square = self._images.pad_to_square(np.asarray(image).transpose(2, 0, 1), colour)
        pixels = self._read(self._whole, square, input_data_format="channels_first")["pixel_values"]
        size = np.array([image.height, image.width])
        return self._processed({"pixel_values": pixels, "image_sizes": size}, self._crop_tokens + 1)

    def video(self, frames: Sequence[Image]) -> Processed:
        pixels = self._read(self._frame, list(frames))["pixel_values"]
        half = math.ceil(self._side / 2)
        return Processed({"pixel_values_videos": pixels}, self.marks["video"] * (len(frames) * half**2 + 1))


class QwenProcessor(Processor):
    """Qwen2-VL and Qwen2.5-VL."""

    def __init__(self, config: Any, images: Any, videos: Mapping[str, Any], tokenizer: Tokenizer):
        super().__init__(config, images, videos, tokenizer)
        self.marks["video"] = tokenizer.token_text(config.video_token_id)
        stated = videos.get("size") or {}
        self._frame_size = {
            "shortest_edge": videos.get("min_pixels") or stated.get("shortest_edge") or images.size.shortest_edge,
            "longest_edge": videos.get("max_pixels") or stated.get("longest_edge") or images.size.longest_edge,
        }
        """Pixels of a frame, at least and at most"""

    def image(self, image: Image, is_alone: bool = True) -> Processed:
        read = self._read(self._images, image)
        inputs = {"pixel_values": read["pixel_values"], "image_grid_thw": read["image_grid_thw"][0]}
        return Processed(inputs, self.marks["image"] * self._tokens(inputs["image_grid_thw"]))

    def video(self, frames: Sequence[Image]) -> Processed:
        deep = self._images.temporal_patch_size  # frames that a patch spans; the last is repeated to fill one
        padded = [*frames, *[frames[-1]] * (-len(frames) % deep)]
        read = self._read(self._images, padded, temporal_patch_size=1, size=self._frame_size)
        _, height, width = read["image_grid_thw"][0].tolist()
        flat, square = height * width, self._images.patch_size**2
        by_frame = read["pixel_values"].reshape(len(padded) // deep, deep, flat, -1, square)
        patches = by_frame.transpose(0, 2, 3, 1, 4).reshape(len(padded) // deep * flat, -1)
        grid = np.array([len(padded) // deep, height, width])
        inputs = {"pixel_values_videos": patches, "video_grid_thw": grid}
        if self._config.model_type == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = np.array(deep / FRAMES_PER_SECOND, np.float32)
        return Processed(inputs, self.marks["video"] * self._tokens(grid))

    def _tokens(self, grid: NDArray[Any]) -> int:
        return int(grid.prod()) // self._images.merge_size**2


class IdeficsProcessor(Processor):
    """Idefics3 and SmolVLM: marks say which row and column a crop is of."""

    def image(self, image: Image, is_alone: bool = True) -> Processed:
        read = self._read(self._images, image, return_row_col_info=True)
        pixels = read["pixel_values"][0]
        side = pixels.shape[-1] // self._config.vision_config.patch_size // self._config.scale_factor
        crop, around = self.marks["image"] * side**2, "<fake_token_around_image>"
        grid = {name: np.asarray(read[name][0], np.int64) for name in ("rows", "cols")}
        rows, columns = (int(count[0]) for count in grid.values())
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{around}<row_{row}_col_{column}>{crop}" for column in range(1, columns + 1)) + "\n"
        text += "\n" if rows else ""
        return Processed({"pixel_values": pixels} | grid, f"{text}{around}<global-img>{crop}{around}")


_PROCESSORS: dict[str, type[Processor]] = {
    "llava": LlavaProcessor,
    "llava_next": LlavaProcessor,
    "llava_onevision": OnevisionProcessor,
    "qwen2_vl": QwenProcessor,
    "qwen2_5_vl": QwenProcessor,
    "idefics3": IdeficsProcessor,
    "smolvlm": IdeficsProcessor,
}
