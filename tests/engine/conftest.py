"""Models that the engine's tests share."""

import os

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoConfig, Qwen2VLTextModel

from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import Backend, backend

from ..models.checkpoints import SIZES, random_model
from .seeing import SECTIONS, with_axes


@pytest.fixture(scope="session")
def ops() -> Backend:
    return backend("cpu")


@pytest.fixture(scope="session")
def tiny(ops: Backend, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A llama of three layers and two KV heads with random weights."""
    path: Path = tmp_path_factory.mktemp("tiny")
    random_model("llama", max_position_embeddings=1024).save_pretrained(path)
    return load_model(str(path), ops, "f32")


@pytest.fixture(scope="session")
def windowed(ops: Backend, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A mistral of two layers whose window is shorter than most prompts."""
    path: Path = tmp_path_factory.mktemp("windowed")
    random_model("mistral", num_hidden_layers=2, sliding_window=60, max_position_embeddings=256).save_pretrained(path)
    return load_model(str(path), ops, "f32")


@pytest.fixture(scope="session")
def default_model(ops: Backend) -> Decoder:
    """SmolLM2-135M-Instruct with f32 weights."""
    return load_model("default", ops, "f32")


@pytest.fixture(scope="session")
def turning(ops: Backend, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    """A language model with M-RoPE, and transformers' own."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*SECTIONS]}
    path: Path = tmp_path_factory.mktemp("turning")
    plain = random_model("qwen2", max_position_embeddings=1024)
    plain.save_pretrained(path)
    model = load_model(str(path), ops, "f32")
    theirs = Qwen2VLTextModel(AutoConfig.for_model("qwen2_vl_text", **SIZES, rope_parameters=rope)).eval()
    theirs.set_attn_implementation("eager")
    theirs.load_state_dict(plain.model.state_dict())
    theirs.lm_head = plain.lm_head
    return with_axes(model, ops), theirs
