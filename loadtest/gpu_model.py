"""A model of random weights, made on the device: as fast as a trained one, and no checkpoint is needed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.engine.models.config import ModelConfig, read_config
from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import build_model
from winnow.kernels.dispatch import Backend, WeightKind

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""Llama-3.1-8B"""

TINY: dict[str, Any] = LLAMA_8B | {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


class RandomWeights:
    """Matrices that keep the size of what goes through them, and norms of one."""

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}

    def read_into(self, name: str, out: Tensor) -> None:
        if out.dim() == 1:
            out.fill_(1)
        else:
            out.normal_(std=out.shape[1] ** -0.5)


def random_model(stated: dict[str, Any], ops: Backend, kind: WeightKind) -> Decoder:
    """The model that a config.json describes."""
    torch.manual_seed(0)
    return build_model(model_config(stated), RandomWeights(Path("random")), ops, kind)


def model_config(stated: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(stated))
        return read_config(Path(folder))
