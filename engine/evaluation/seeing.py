"""A question about a picture as a prompt: the tokens and the picture that a server sends its engine for such a chat."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from winnow.engine.errors import EvalError
from winnow.engine.messages import Array, Picture

if TYPE_CHECKING:
    from winnow.engine.models.tokenizer import Tokenizer
    from winnow.engine.models.vision.processor import Processor


class Seeing:
    """What makes prompts for one model."""

    def __init__(self, tokenizer: Tokenizer, processor: Processor, placeholder: int):
        """`placeholder`: the token that stands for a part of an image."""
        self._tokenizer = tokenizer
        self._processor = processor
        self._placeholder = placeholder
        self._read = lru_cache(maxsize=64)(self._processed)

    def prompt(self, image: bytes, question: str) -> tuple[list[int], Picture]:
        """Of a chat of one turn, the picture before the question."""
        inputs, text, key = self._read(image)
        mark = self._processor.marks["image"]
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        content = parts if self._tokenizer.template_takes_parts else f"{mark}\n{question}"
        turn = [{"role": "user", "content": content}]
        whole, alone = (
            self._encoded(self._tokenizer.apply_chat_template(turn, add_generation_prompt=opens), mark, text)
            for opens in (True, False)
        )
        places = [place for place, token in enumerate(whole) if token == self._placeholder]
        return whole, Picture(
            key=key,
            first=places[0],
            span=places[-1] + 1 - places[0],
            inputs=inputs,
            text=self._tokenizer.encode(question, add_special_tokens=False),
            turn_end=len(alone),
        )

    def _encoded(self, written: str, mark: str, text: str) -> list[int]:
        if written.count(mark) != 1:
            raise EvalError("the model's chat template does not write one mark for an image")
        return self._tokenizer.encode(written.replace(mark, text), add_special_tokens=False)

    def _processed(self, image: bytes) -> tuple[dict[str, Array], str, bytes]:
        """What the tower reads, what stands for it in the prompt, and its key."""
        with Image.open(BytesIO(image)) as shown:
            seen = self._processor.image(shown.convert("RGB"))
        inputs = {
            name: Array(value.dtype.name, list(value.shape), np.ascontiguousarray(value).tobytes())
            for name, value in seen.inputs.items()
        }
        digest = blake2b(b"image", digest_size=16)
        for name, array in sorted(inputs.items()):
            digest.update(repr((name, array.dtype, array.shape)).encode() + array.data)
        return inputs, seen.text, digest.digest()
