"""A tiny model with a tokenizer of characters, asked in this process."""

import os

# Before torch loads its OpenMP: threads that spin between calls would fight over the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from winnow.engine.evaluation.parity import KeptTarget

from ..models.checkpoints import random_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers and two KV heads with random weights; every ASCII character is a token."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    model = random_model("llama", vocab_size=128, num_hidden_layers=2, max_position_embeddings=2048, eos_token_id=0)
    model.save_pretrained(folder)
    bytes_ = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items() if byte < 128}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(tiny_folder: Path) -> KeptTarget:
    return KeptTarget(str(tiny_folder), "f32", threads=1, kv_memory_gib=0.1)
