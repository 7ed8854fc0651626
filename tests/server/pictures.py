"""Images as requests bring them, and a processor that stands for a model's."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from io import BytesIO
from ipaddress import ip_address
from typing import Any

import httpx
import numpy as np
from PIL import Image

from winnow.engine.messages import Submit

from .fake_engine import FakeEngine

LOOPBACK = ip_address("127.0.0.1")
IMAGE, VIDEO, MARK = "<file_sep>", "<gh_stars>", "<jupyter_code>"
"""Tokens of the default model's vocabulary that stand for an image and a video, and one that ends a row"""


@dataclass(frozen=True)
class Processed:
    inputs: dict[str, np.ndarray]
    text: str


@dataclass
class Processor:
    """A placeholder for every 8x8 pixels, and a mark behind each row; a video's frames follow one another."""

    marks: dict[str, str] = field(default_factory=lambda: {"image": IMAGE, "video": VIDEO})
    alone: list[bool] = field(default_factory=list)
    seen: list[list[Image.Image]] = field(default_factory=list)

    def image(self, image: Image.Image, is_alone: bool) -> Processed:
        self.alone.append(is_alone)
        return self._processed([image], IMAGE)

    def video(self, frames: list[Image.Image]) -> Processed:
        return self._processed(frames, VIDEO)

    def _processed(self, frames: list[Image.Image], placeholder: str) -> Processed:
        self.seen.append(frames)
        width, height = frames[0].size
        if width > 400:
            raise ValueError("too wide")
        rows = [placeholder * (width // 8) + MARK] * (height // 8) * len(frames)
        pixels = np.stack([np.asarray(frame, np.float32) for frame in frames])
        return Processed({"pixel_values": pixels, "sizes": np.array([[width, height]])}, "".join(rows))


def png(width: int = 24, height: int = 16, colour: Any = "red", fmt: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    Image.new("RGB", (width, height), colour).save(out, fmt, **options)
    return out.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{b64encode(data).decode()}"


def image_part(url: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(png()) if url is None else url, **fields}}


def video_part(*frames: bytes) -> dict[str, Any]:
    url = "data:video/jpeg;base64," + ",".join(b64encode(frame).decode() for frame in frames)
    return {"type": "video_url", "video_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def ask(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A chat of one message."""
    return {"messages": [{"role": "user", "content": list(parts)}], **fields}


async def submitted(http: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]) -> Submit:
    """What the engine is asked for."""
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return engine.submits[-1]
