"""`data:` URIs (RFC 2397) that hold images, in base64 (RFC 4648, by the letter)."""

from __future__ import annotations

import re
from binascii import a2b_base64

from winnow.server.images.bad import BadImage

IMAGE_TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif")
FRAMES = "video/jpeg"
"""Frames of a video, separated by commas"""

_HEAD = re.compile(r"data:([A-Za-z0-9.+-]+/[A-Za-z0-9.+-]+);base64,", re.IGNORECASE)
_HEAD_CHARS = 128


def is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def media_type_of(url: str) -> tuple[str, str]:
    """The media type of a `data:` URI, and what follows its head.

    Raises
        BadImage
    """
    head = _HEAD.match(url[:_HEAD_CHARS])
    if head is None:
        raise BadImage("must begin with data:TYPE;base64, without other parameters", "invalid_image_url")
    return head[1].lower(), url[head.end() :]


def image_of(url: str, max_bytes: int) -> bytes:
    """The bytes of an image. Its type must be one of `IMAGE_TYPES`, but the bytes say themselves what they are.

    Raises
        BadImage
    """
    kind, text = media_type_of(url)
    if kind not in IMAGE_TYPES:
        raise BadImage(f"must be one of {', '.join(IMAGE_TYPES)}", "unsupported_image_media_type")
    return decoded(text, max_bytes)


def frames_of(url: str, max_bytes: int, max_frames: int) -> list[bytes]:
    """The frames of a video: `data:video/jpeg;base64,FRAME,FRAME,…`, or those of one animated GIF, undivided.

    Raises
        BadImage
    """
    kind, text = media_type_of(url)
    if kind == "image/gif":
        return [decoded(text, max_bytes)]
    if kind != FRAMES:
        message = f"must be {FRAMES} (frames, separated by commas) or image/gif"
        raise BadImage(message, "unsupported_image_media_type")
    if (count := text.count(",") + 1) > max_frames:
        raise BadImage(f"has {count} frames, and this server takes at most {max_frames}", "image_too_large")
    return [decoded(frame, max_bytes) for frame in text.split(",")]


def decoded(text: str, max_bytes: int) -> bytes:
    """Raises
    BadImage: not base64 with its padding, or too long, which is seen before anything is decoded
    """
    if not text:
        raise BadImage("holds no bytes", "empty_image_file")
    if len(text) // 4 * 3 - 2 > max_bytes:
        raise too_many_bytes(max_bytes)
    try:
        if len(text) % 4 or text.endswith("==="):  # which strict mode lets pass
            raise ValueError
        data = a2b_base64(text, strict_mode=True)
    except ValueError as error:  # not in the alphabet, or not ASCII
        raise BadImage("is not valid base64 (the alphabet with + and /, padded)", "invalid_base64_image") from error
    if len(data) > max_bytes:
        raise too_many_bytes(max_bytes)
    return data


def too_many_bytes(max_bytes: int) -> BadImage:
    return BadImage(f"has more bytes than this server takes ({max_bytes})", "image_too_large")
