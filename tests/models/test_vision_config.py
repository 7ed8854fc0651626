"""The language models inside vision-language ones: what their configs say, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from winnow.engine.errors import ModelError
from winnow.engine.models.config import ModelConfig, read_config
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend

from .vision_checkpoints import FAMILIES, save_vlm


def changed(folder: Path, change: dict[str, Any], part: str | None = "text_config") -> ModelConfig:
    path = folder / "config.json"
    stated = json.loads(path.read_text())
    stated.update({part: stated[part] | change} if part else change)
    path.write_text(json.dumps(stated))
    return read_config(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    save_vlm(tmp_path, family)
    config = read_config(tmp_path)
    decoders = {"llava_next": "mistral", "llava_onevision": "qwen2", "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2"}
    assert config.architecture == decoders.get(family, "llama")
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert config.qkv_bias == (config.architecture == "qwen2")
    assert config.tied_embeddings == (family in ("idefics3", "smolvlm"))
    assert config.rope_sections == ((2, 3, 3) if family.startswith("qwen") else ())


def test_a_flat_config(tmp_path: Path) -> None:
    """Qwen2-VL's on the hub have the language model's sizes beside the tower's config."""
    save_vlm(tmp_path, "qwen2_vl")
    config, path = read_config(tmp_path), tmp_path / "config.json"
    stated = json.loads(path.read_text())
    text = stated.pop("text_config")
    rope = text.pop("rope_parameters")
    theta, section = rope["rope_theta"], rope["mrope_section"]
    flat = {"rope_theta": theta, "rope_scaling": {"type": "mrope", "mrope_section": section}}
    path.write_text(json.dumps(text | stated | flat))
    assert read_config(tmp_path) == config


def test_end_tokens_of_the_language_model(tmp_path: Path) -> None:
    save_vlm(tmp_path, "llava")
    (tmp_path / "generation_config.json").unlink()
    assert changed(tmp_path, {"eos_token_id": [5, 9]}).eos_token_ids == (5, 9)
    assert changed(tmp_path, {"eos_token_id": 4}, part=None).eos_token_ids == (4,)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llava", {"model_type": "gpt2"}, "language model of type 'gpt2' is not supported"),
        ("llava", {"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        (
            "qwen2_vl",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 4]}},
            "mrope_section .2, 3, 4. must be three numbers that add up to 8",
        ),
    ],
)
def test_refused(family: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_vlm(tmp_path, family)
    with pytest.raises(ModelError, match=message):
        changed(tmp_path, change)


def test_a_tensor_of_the_language_model_that_is_missing(tmp_path: Path, ops: Backend) -> None:
    save_vlm(tmp_path, "llava")
    changed(tmp_path, {"num_hidden_layers": 3})
    with pytest.raises(ModelError, match=r"tensor model\.layers\.2\.[\w.]+ is missing"):
        load_model(str(tmp_path), ops, "f32")
