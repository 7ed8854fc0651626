"""Images and videos of requests, from what stands in a part to what the vision tower reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from winnow.server.images.bad import BadImage
from winnow.server.images.decode import Bounds, decode_image, decode_video
from winnow.server.images.fetch import Fetcher
from winnow.server.images.uri import frames_of, image_of, is_data
from winnow.server.metrics import ModelMetrics
from winnow.server.protocol.chat import MediaPart
from winnow.server.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class Processed(Protocol):
    """An image or a video as a model takes it."""

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """What its vision tower reads"""

    @property
    def text(self) -> str:
        """What stands for it in the prompt, placeholders and the marks between them"""


class Processor(Protocol):
    """A model's own image processor; threads may share it."""

    @property
    def marks(self) -> Mapping[str, str]:
        """Of each kind that the model sees ("image", "video"): what the chat template writes for one"""

    def image(self, image: Image, is_alone: bool) -> Processed:
        """`is_alone`: the only image of its prompt. Raises ValueError: the model cannot take one of this shape"""

    def video(self, frames: list[Image]) -> Processed:
        """Frames of one size. Raises as `image`."""


class ImageReader:
    """One for a model: its threads, and what it fetches at a time, are bounded.

    A request has one image in work at a time, so that many images of one do not keep another's waiting.
    """

    def __init__(self, settings: Settings, processor: Processor, metrics: ModelMetrics):
        self.settings = settings
        self.processor = processor
        self.metrics = metrics
        self.bounds = Bounds.of(settings)
        self.fetcher = Fetcher(settings)
        self._pool = ThreadPoolExecutor(settings.image_threads, "images")

    async def stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self.fetcher.close()

    async def read(self, part: MediaPart, is_alone: bool) -> Processed:
        """
        Args
            is_alone: no other image is in the prompt
        Raises
            BadImage
        """
        fetched = None
        if not is_data(part.url):
            fetched = await self.fetcher.fetch(part.url)
            self.metrics.image_fetched(len(fetched))
        began = time.monotonic()
        processed = await asyncio.get_running_loop().run_in_executor(self._pool, self._decode, part, is_alone, fetched)
        self.metrics.image_read(part.kind, time.monotonic() - began)
        return processed

    def _decode(self, part: MediaPart, is_alone: bool, fetched: bytes | None) -> Processed:
        most = self.settings.max_image_bytes
        try:
            if part.kind == "image":
                data = image_of(part.url, most) if fetched is None else fetched
                return self.processor.image(decode_image(data, self.bounds, part.is_low), is_alone)
            parts = frames_of(part.url, most, self.bounds.max_frames) if fetched is None else [fetched]
            return self.processor.video(decode_video(parts, self.bounds))
        except ValueError as error:
            raise BadImage("has a shape that the model does not take", "image_parse_error") from error
