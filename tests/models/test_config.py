"""What is read from a model's config, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.engine.errors import ModelError
from winnow.engine.models.config import ModelConfig, read_config
from winnow.engine.models.decoder import rope_tables

from .checkpoints import SIZES, random_model

LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def config_of(folder: Path, stated: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(stated))
    return read_config(folder)


def test_sizes(tmp_path: Path) -> None:
    config = config_of(tmp_path, LLAMA | {"head_dim": 32, "tie_word_embeddings": True})
    assert (config.architecture, config.vocab_size, config.hidden_size, config.intermediate_size) == (
        "llama",
        160,
        64,
        96,
    )
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (3, 4, 2, 32)
    assert (config.max_position, config.tied_embeddings, config.qk_norm) == (128, True, False)
    assert (config.windows, config.eos_token_ids) == ((0, 0, 0), (7,))


@pytest.mark.parametrize(
    ("stated", "windows"),
    [
        (MISTRAL | {"sliding_window": 9}, (9, 9, 9)),
        (MISTRAL | {"sliding_window": None}, (0, 0, 0)),
        (QWEN2 | {"sliding_window": 9, "max_window_layers": 1}, (0, 0, 0)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, (0, 9, 9)),
        (
            QWEN2
            | {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (9, 0, 9),
        ),
        (LLAMA | {"sliding_window": 9}, (0, 0, 0)),
    ],
    ids=["mistral", "mistral none", "qwen2 unused", "qwen2 upper layers", "qwen2 by layer", "llama has none"],
)
def test_windows(stated: dict[str, Any], windows: tuple[int, ...], tmp_path: Path) -> None:
    assert config_of(tmp_path, stated).windows == windows


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
def test_rope_in_the_old_and_the_new_style(style: str, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    stated = {"rope_scaling": scaling, "rope_theta": 500.0}
    if style == "rope_parameters":
        stated = {style: scaling | {"rope_theta": 500.0}}
    config = config_of(tmp_path, LLAMA | stated)
    rotary = random_model("llama", **stated).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(512)[None])
    assert config.max_position == 512
    assert torch.equal(rope_tables(config)[0], cos[0, :, :8])
    assert torch.equal(rope_tables(config)[1], sin[0, :, :8])


@pytest.mark.parametrize(
    ("generation", "stated", "ids"),
    [
        ({"eos_token_id": [3, 4]}, 7, (3, 4)),
        ({"eos_token_id": 3}, 7, (3,)),
        ({"eos_token_id": None}, [7, 8], (7, 8)),
        (None, 7, (7,)),
        (None, None, ()),
    ],
)
def test_end_tokens(generation: dict[str, Any] | None, stated: Any, ids: tuple[int, ...], tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert config_of(tmp_path, LLAMA | {"eos_token_id": stated}).eos_token_ids == ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None}, "without architectures is not supported"),
        ({"model_type": "qwen2"}, "LlamaForCausalLM does not go with model type qwen2"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' changes with the context"),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "factor": 2.0,
                }
            },
            "'longrope' changes with the context",
        ),
        ({"partial_rotary_factor": 0.5}, "partial rotary embeddings"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by awq"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 KV heads"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16"),
        ({"intermediate_size": 100}, "multiples of 8"),
        ({"num_hidden_layers": "many"}, "config.json cannot be used"),
    ],
)
def test_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        config_of(tmp_path, LLAMA | change)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_config_that_is_not_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)
