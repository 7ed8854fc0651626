"""Bytes to RGB pixels. PNG, JPEG, WebP and GIF; what the bytes are, they say themselves.

Turned as EXIF says; what is transparent lies on white; of 16 bits the upper 8, of an animation the first frame. Sizes
are checked before any pixel is decoded. Takes its time: call it in a thread.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageSequence, UnidentifiedImageError

from winnow.server.images.bad import BadImage
from winnow.server.settings import Settings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
LOW_SIDE = 512
"""Pixels of the longer side that `detail: low` leaves"""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes an orientation of EXIF"""

MAX_SCANS = 100
"""Passes over all of a JPEG, each of which may be some bytes; those that cameras and libraries write are about ten"""
_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")
_SCAN, _END = b"\xda", b"\xd9"

warnings.simplefilter("error", Image.DecompressionBombWarning)  # what is above Pillow's limit is refused


@dataclass(frozen=True)
class Bounds:
    """Sizes that are read."""

    max_pixels: int
    """Of an image"""
    max_video_pixels: int
    """Of all frames of a video"""
    max_frames: int
    min_side: int
    max_aspect: float
    """The longer side over the shorter"""

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        return cls(
            max_pixels=settings.max_image_pixels,
            max_video_pixels=settings.max_video_pixels,
            max_frames=settings.max_video_frames,
            min_side=settings.min_image_side,
            max_aspect=settings.max_image_aspect,
        )

    def check(self, width: int, height: int) -> None:
        """
        Raises
            BadImage
        """
        size = f"is {width}x{height} pixels"
        if min(width, height) < self.min_side:
            message = f"{size}, and this server takes sides of at least {self.min_side}"
            raise BadImage(message, "image_too_small")
        if max(width, height) > self.max_aspect * min(width, height):
            message = f"{size}: a side may be at most {self.max_aspect:g} times the other"
            raise BadImage(message, "image_too_large")
        if width * height > self.max_pixels:
            raise BadImage(f"{size}, and this server takes at most {self.max_pixels} in all", "image_too_large")

    def check_video(self, width: int, height: int, frames: int) -> None:
        """
        Raises
            BadImage
        """
        self.check(width, height)
        if frames > self.max_frames:
            message = f"has more frames than this server takes ({self.max_frames})"
            raise BadImage(message, "image_too_large")
        if frames * width * height > self.max_video_pixels:
            size = f"is {width}x{height} pixels in each of {frames} frames"
            message = f"{size}, and this server takes at most {self.max_video_pixels} in all"
            raise BadImage(message, "image_too_large")


def decode_image(data: bytes, bounds: Bounds, is_low: bool = False) -> Image.Image:
    """An image in mode RGB, shrunk to fit `LOW_SIDE` if it is wanted in low detail.

    Raises
        BadImage
    """
    with _opened(data, bounds) as image:
        bounds.check(*image.size)
        whole = _rgb(image)
    if is_low:
        whole.thumbnail((LOW_SIDE, LOW_SIDE), Image.Resampling.BICUBIC)
        bounds.check(*whole.size)
    return whole


def decode_video(parts: Sequence[bytes], bounds: Bounds) -> list[Image.Image]:
    """Frames of one size in mode RGB: those of one animated GIF, or an image each.

    Raises
        BadImage
    """
    frames: list[Image.Image] = []
    for part in parts:
        with _opened(part, bounds) as image:
            for frame in ImageSequence.Iterator(image) if len(parts) == 1 else [image]:
                bounds.check_video(*frame.size, frames=max(len(parts), len(frames) + 1))
                frames.append(_rgb(frame))
    if len({frame.size for frame in frames}) > 1:
        raise BadImage("has frames of several sizes", "image_parse_error")
    return frames


@contextmanager
def _opened(data: bytes, bounds: Bounds) -> Iterator[Image.Image]:
    """Whatever a decoder says of what it cannot decode is one error."""
    if not data:
        raise BadImage("holds no bytes", "empty_image_file")
    if data.startswith(b"\xff\xd8"):
        _check_scans(data)
    # Of the process, as a server's settings are: for what has room made before its size is told, as a GIF's frames.
    Image.MAX_IMAGE_PIXELS = bounds.max_pixels
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            yield image
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"has more pixels than this server takes ({bounds.max_pixels})"
        raise BadImage(message, "image_too_large") from error
    except UnidentifiedImageError as error:
        raise BadImage("is no PNG, JPEG, WebP or GIF", "unsupported_image_media_type") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error, …
        raise BadImage("is damaged: it cannot be decoded", "image_parse_error") from error


def _check_scans(data: bytes) -> None:
    """BadImage where a JPEG has too many, before the end of its first image."""
    at = scans = 0
    while (marker := _MARKER.search(data, at)) is not None and marker[1] != _END and scans <= MAX_SCANS:
        at = marker.end()
        if at > 2:  # its segment; the first marker has none
            at += int.from_bytes(data[at : at + 2])
        scans += marker[1] == _SCAN
    if scans > MAX_SCANS:
        raise BadImage(f"has more than {MAX_SCANS} scans, of which a JPEG needs about ten", "image_too_large")


def _rgb(image: Image.Image) -> Image.Image:
    """A copy in mode RGB, upright."""
    image.load()  # here what is wrong with pixels is an error; where EXIF looks for itself behind them, it is none
    turn = _turn(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What EXIF says must be done; EXIF that cannot be read says nothing."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as decoders, and the pixels are there
        return None
