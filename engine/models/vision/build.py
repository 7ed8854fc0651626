"""Loads the vision tower and the projector of a checkpoint, and nothing of its language model."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights

from winnow.engine.errors import ModelError
from winnow.engine.models.loader import SafetensorsSource
from winnow.engine.models.vision.idefics import IdeficsTower
from winnow.engine.models.vision.llava import LlavaTower
from winnow.engine.models.vision.names import Part, Source, vision_type
from winnow.engine.models.vision.qwen import QwenTower
from winnow.engine.tower_protocol import Eyes

log = logging.getLogger(__name__)

_TOWERS: dict[str, Callable[[Any, Any], Any]] = {
    "llava": LlavaTower,
    "llava_next": LlavaTower,
    "llava_onevision": LlavaTower,
    "qwen2_vl": QwenTower,
    "qwen2_5_vl": QwenTower,
    "idefics3": IdeficsTower,
    "smolvlm": IdeficsTower,
}
_VITS = ("clip_vision_model", "siglip_vision_model")
"""Those that LLaVA checkpoints may have"""


def load_eyes(path: Path, device: torch.device, dtype: torch.dtype) -> Eyes | None:
    """Tower and projector of a model's directory; None where the model reads text only.

    Raises
        ModelError: tensors are missing, damaged or of other shapes than the config says, or it cannot be run
    """
    kind = vision_type(path)
    if kind is None:
        return None
    began = time.monotonic()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if kind.startswith("llava") and config.vision_config.model_type not in _VITS:
            raise ModelError(f"{path}: a vision tower of type {config.vision_config.model_type!r} is not supported")
        parts = _without_language_model(config)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"{path}: the vision tower's config cannot be used: {error}") from error
    _load(parts, Part(SafetensorsSource(path), is_text=False), device, dtype)
    eyes = _TOWERS[kind](config, parts)
    log.info("loaded the vision tower of %s in %.1f s", path, time.monotonic() - began)
    return eyes


def _without_language_model(config: Any) -> nn.Module:
    """The model's other modules, with weights of no meaning, under the names of `names.Part`."""
    small = copy.deepcopy(config)
    text = small.text_config
    text.num_hidden_layers, text.layer_types, text.vocab_size, text.pad_token_id = 0, [], 1, None
    with no_init_weights():
        model: Any = AutoModel.from_config(small)
    for name in ("language_model", "text_model"):
        if hasattr(model, name):
            delattr(model, name)
    return model.eval().requires_grad_(False)


def _load(parts: nn.Module, source: Source, device: torch.device, dtype: torch.dtype) -> None:
    """Fills all parameters. Their type is `dtype`; buffers, which are computed, keep theirs."""
    wanted = dict(parts.named_parameters())
    for name in source.shapes:
        if name not in wanted and not name.endswith("position_ids"):  # which old checkpoints have
            raise ModelError(f"{source.path}: unexpected tensor {name}; the model has parts that the config does not")
    for name, parameter in wanted.items():
        if name not in source.shapes:
            raise ModelError(f"{source.path}: tensor {name} is missing")
        if source.shapes[name] != tuple(parameter.shape):
            found, asked = list(source.shapes[name]), list(parameter.shape)
            raise ModelError(f"{source.path}: tensor {name} has shape {found}; the config asks for {asked}")
        weights = torch.empty(parameter.shape, dtype=dtype, device=device)
        source.read_into(name, weights)
        owner, _, own_name = name.rpartition(".")
        setattr(parts.get_submodule(owner), own_name, nn.Parameter(weights, requires_grad=False))
    parts.to(device)
