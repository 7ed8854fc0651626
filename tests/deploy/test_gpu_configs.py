"""Settings for a card and a model: the card can do what they ask, and what their first lines say is so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from winnow.engine.models.tokenizer import Tokenizer, load_tokenizer
from winnow.server.app import create_app
from winnow.server.settings import load

from ..server.fake_engine import FakeEngine

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "gpu").glob("*.yaml"))
GIB = 2**30
STEP_GIB = 3
"""What a step and CUDA itself take, at most"""


@dataclass(frozen=True)
class Card:
    gib: float
    """As its driver reports them"""
    has_fp8: bool


@dataclass(frozen=True)
class Model:
    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    context: int

    @property
    def token_bytes(self) -> int:
        """In bf16 pages."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


CARDS = {
    "h100": Card(79.6, True),
    "h200": Card(139.8, True),
    "a100-80g": Card(79.2, False),
    "l40s": Card(45.0, True),
    "l4": Card(22.5, True),
    "rtx-4090": Card(24.0, True),
}
MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": Model(8.03e9, 32, 8, 128, 131072),
    "Qwen/Qwen3-4B": Model(4.02e9, 36, 8, 128, 40960),
    "Qwen/Qwen3-32B": Model(32.8e9, 64, 8, 128, 40960),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("default")


def test_there_are_some() -> None:
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_card_holds_what_the_file_says(path: Path, tokenizer: Tokenizer) -> None:
    settings = load(path)
    create_app(load(path, model="default"), (FakeEngine(tokenizer), tokenizer))  # its plans are served
    card = CARDS[max((name for name in CARDS if path.stem.startswith(f"{name}-")), key=len)]
    model = MODELS[settings.model]
    assert settings.device == "cuda" and settings.weights in ("bf16", "fp8")
    assert card.has_fp8 or settings.weights != "fp8"
    assert path.stem.endswith(settings.model.split("/")[1].removesuffix("-Instruct").lower())

    weights = model.parameters * (1 if settings.weights == "fp8" else 2)
    pages = settings.memory_utilization * card.gib * GIB - weights - STEP_GIB * GIB
    tokens = pages / model.token_bytes
    said = re.search(r"about (\d+) GiB .*?([\d,]+) tokens uncompressed", path.read_text().splitlines()[0])
    assert said is not None
    assert 0.85 < int(said[1]) * GIB / pages < 1.05
    assert 0.85 < int(said[2].replace(",", "")) / tokens < 1.05
    assert settings.max_model_len is not None and settings.max_model_len <= min(tokens, model.context)
