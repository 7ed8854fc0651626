"""Which vision-language checkpoints there are, and what their tensors are called.

Torch-free: the server uses it too. Checkpoints name the same parts in several ways, by when they were written; here
they all have one name:

    model.embed_tokens, model.layers.N, model.norm, lm_head    the language model, as in a checkpoint of its own
    vision_tower, multi_modal_projector, image_newline         LLaVA's
    visual                                                     Qwen's, merger included
    vision_model, connector                                    Idefics3's and SmolVLM's
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from winnow.engine.models.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

VISION_MODELS = {
    "LlavaForConditionalGeneration": "llava",
    "LlavaNextForConditionalGeneration": "llava_next",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Idefics3ForConditionalGeneration": "idefics3",
    "SmolVLMForConditionalGeneration": "smolvlm",
}
"""Architecture in config.json -> model type"""

_VISION = re.compile(
    r"(?:model\.)?(vision_tower|multi_modal_projector|image_newline|visual|vision_model|connector)(?:\.(.+))?"
)
_TEXT = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(.+)")
_HEAD = re.compile(r"(?:language_model\.)?(lm_head\..+)")


def vision_type(path: Path) -> str | None:
    """The model type of a vision-language checkpoint; None for any other model."""
    names = read_json(path / "config.json").get("architectures") if path.is_dir() else None
    return VISION_MODELS.get(names[0]) if names else None


class Source(Protocol):
    """`loader.Source`"""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read_into(self, name: str, out: Tensor) -> None: ...


class Part:
    """The language model's tensors of a vision-language checkpoint, or all the others."""

    def __init__(self, source: Source, is_text: bool):
        self.path = source.path
        self._source = source
        named = {name: _one_name(name) for name in source.shapes}
        self._names = {new: name for name, (new, belongs) in named.items() if belongs == is_text}
        self.shapes = {new: source.shapes[name] for new, name in self._names.items()}

    def read_into(self, name: str, out: Tensor) -> None:
        self._source.read_into(self._names[name], out)


def _one_name(name: str) -> tuple[str, bool]:
    """The tensor's name here, and whether it is the language model's."""
    if match := _HEAD.fullmatch(name):
        return match[1], True
    if match := _TEXT.fullmatch(name):
        return f"model.{match[1]}", True
    if match := _VISION.fullmatch(name):
        part, rest = match[1], match[2]
        if part == "vision_tower" and rest is not None:
            rest = rest.removeprefix("vision_model.")  # towers were wrapped once
        return part if rest is None else f"{part}.{rest}", False
    return name, True
