"""Models that the tests of prompt compression share: the engine's tiny one, and encoders with random weights."""

import os

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from winnow.engine.models.decoder import Decoder
from winnow.engine.models.loader import load_model
from winnow.kernels.dispatch import backend

from ..models.checkpoints import random_model
from .encoders import random_classifier, random_sentence_encoder


@pytest.fixture(scope="session")
def reference() -> PreTrainedModel:
    """A llama of three layers and two KV heads with random weights, as transformers has it."""
    return random_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def tiny(reference: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The same as the engine has it."""
    path: Path = tmp_path_factory.mktemp("tiny")
    reference.save_pretrained(path)
    return load_model(str(path), backend("cpu"), "f32")


@pytest.fixture(scope="session")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_sentence_encoder(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="session", params=["bert", "xlm-roberta"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_classifier(request.param, tmp_path_factory.mktemp("classifier"))
